"""Hugging Face checkpoints: their families, knobs and runner."""
