"""Memory and disk that a training needs, from its settings and the headers of the model's files: imports no torch."""
