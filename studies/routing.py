"""Routing bias, expert count and training against energy, latency and quality: `python -m studies.routing`.

Every seed is one repeat (`studies.repeats`): all variants of the model are trained with it and measured side
by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from moe.errors import one_line_errors
from studies.repeats import RepeatArguments, ensure_repeats, load_all
from studies.routing_config import load_study
from studies.routing_measure import run_repeat
from studies.routing_report import write_report


@dataclass(frozen=True, kw_only=True)
class Arguments(RepeatArguments):
    """Compare variants of the model over expert counts and routing biases."""

    out: Path = Path("runs/routing")
    config: str = "routing"
    steps: int | None = None
    """Optimizer steps of every training, in place of the settings'."""


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there."""
    study = load_study(arguments.config, arguments.steps)
    if not arguments.report_only:
        ensure_repeats(arguments, study, run_repeat)
    write_report(load_all(arguments), study.quality_margin, arguments.out, Console())


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
