"""A small Mixture-of-Experts transformer: its model, training, test-time training, data and serving loop."""
