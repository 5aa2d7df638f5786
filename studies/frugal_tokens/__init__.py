"""Models that learn to read few experts in decode."""
