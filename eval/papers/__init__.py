"""Tables of the papers: what they contain, and what has been published."""
