"""`python -m moe.training`."""

from moe.training.fit import cli

cli()
