"""One module per table of the documentation; `scripts/tables/` runs them."""
