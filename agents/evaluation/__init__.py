"""Comparison of policies on paired seeds: `evaluate.py`."""
