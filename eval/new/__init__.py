"""`vtr new` and `vtr check`, and the files that are copied: small, complete and tested, under another name."""
