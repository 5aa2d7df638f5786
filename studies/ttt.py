"""What test-time training buys under an energy budget: `python -m studies.ttt`.

Every seed is one repeat (`studies.repeats`): it trains the models, draws the streams and serves each of them
without adaptation and in every way of adapting. Every batch is scored before it is learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from moe.errors import one_line_errors
from studies.repeats import RepeatArguments, StudyError, ensure_repeats, load_all
from studies.ttt_config import load_study
from studies.ttt_measure import run_repeat
from studies.ttt_report import write_report


@dataclass(frozen=True, kw_only=True)
class Arguments(RepeatArguments):
    """Compare methods, gates, budgets, guards and norms on streams of shifts."""

    out: Path = Path("runs/ttt")
    config: str = "ttt"


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there."""
    if not arguments.report_only:
        study = load_study(arguments.config)
        if arguments.size not in study.sizes:
            raise StudyError(f"{arguments.config} has no size {arguments.size!r}, only {tuple(study.sizes)}")
        ensure_repeats(arguments, study, run_repeat)
    write_report(load_all(arguments), arguments.out, Console())


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
