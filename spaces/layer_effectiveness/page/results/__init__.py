"""Reports on the page."""
