"""Live episodes, and live against twin."""
