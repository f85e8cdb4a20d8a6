"""HTML pages that need no server and no network: shared layout (`skeleton`), the gallery, the report and the demo."""
