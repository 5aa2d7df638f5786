"""Token rows of running sequences through the model, step by step, on a card as captured graphs."""
