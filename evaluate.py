"""Compare policies on the same requests: `python evaluate.py --policy rule_based`."""

from __future__ import annotations

import sys

import tyro

from agents.evaluation.command import EvaluateConfig, evaluate
from moe.terminal import plain_terminal
from thermoe_env.errors import ThermoeError


def main() -> None:
    """Parse the command line and evaluate."""
    plain_terminal()
    config = tyro.cli(EvaluateConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        evaluate(config)
    except (ValueError, OSError, ThermoeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
