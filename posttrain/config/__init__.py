"""Configuration: schema, composing by Hydra, explained errors, help."""
