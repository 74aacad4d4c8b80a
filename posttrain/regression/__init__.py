"""A gate about an existing adapter, for CI: candidate, baseline, changes."""
