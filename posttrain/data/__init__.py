"""Records: read from files and sources, recognised, checked, mixed."""
