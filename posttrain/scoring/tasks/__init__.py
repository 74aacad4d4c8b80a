"""Tasks for files of one's own: lm-eval's YAML, and the functions that it names."""
