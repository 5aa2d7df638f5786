"""Observation, signals and reward: what an interval means, in every world."""
