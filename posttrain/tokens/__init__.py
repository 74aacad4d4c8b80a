"""Token ids and the mask of trained tokens, proven; packed rows."""
