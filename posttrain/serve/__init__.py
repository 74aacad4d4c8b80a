"""Serving: promoted artifacts answer over HTTP, proven to be the models that the gate judged."""
