"""Models: base, loading, quantisation, checks, saving, merging, reward models."""
