"""The control problem: scenario, knobs, and both made concrete on a profile."""
