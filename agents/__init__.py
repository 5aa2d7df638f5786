"""Decisions and their evaluation: policies by rule and by learning, rollout, metrics, figures, report."""
