"""`python -m moe.profiling`."""

from moe.profiling.command import cli

cli()
