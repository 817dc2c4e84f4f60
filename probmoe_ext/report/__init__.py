"""Reports on finished runs: a page that needs no network, and its figures as PNG and SVG."""
