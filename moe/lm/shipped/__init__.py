"""What the package holds for its language models: see the README beside it."""
