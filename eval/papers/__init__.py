"""Tables of the papers: declarative specs (specs/<paper>/*.yaml), published values, one runner, several formats."""
