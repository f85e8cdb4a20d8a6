"""Tables of the papers: declarative specs (scripts/<paper>/*.yaml), published values, one runner, several formats."""
