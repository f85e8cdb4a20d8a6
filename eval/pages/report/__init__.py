"""The results page: every result.json below a folder in one sortable table and three plots."""
