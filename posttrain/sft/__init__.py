"""The core stage: settings, advice, examples, and the proof of its gradient."""
