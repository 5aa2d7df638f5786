"""`python -m moe.profiling`."""

import sys

from moe.profiling.cli import cli

sys.argv[0] = "python -m moe.profiling"  # what its help calls it
cli()
