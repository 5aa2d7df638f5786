"""Learning algorithms, their training in the twin, and what a run leaves."""
