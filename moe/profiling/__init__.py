"""What work costs and how good answers are, measured: `python -m moe.profiling`."""
