"""Models asked by lm-eval: tasks, systems, cache, scorecards."""
