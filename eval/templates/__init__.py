"""Files that `vtr new` copies: small, complete and tested. Their names are replaced by the new one's."""
