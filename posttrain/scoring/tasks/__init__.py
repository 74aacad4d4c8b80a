"""Tasks on your own files: lm-eval's YAML, and its functions."""
