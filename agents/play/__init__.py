"""Playing policies, and what their episodes come to."""
