"""Plugins: loaded, guarded, supervised, survived."""
