"""Training of the workload models: `python -m moe.training`."""
