"""The five questions of the research programme: `python -m studies.run rq1 rq2 rq3 rq4 rq5`.

Each question is a list of independent tasks (`studies.tasks`). They run here one after another, or with
`--ray` on the cores of this machine or of a cluster; then report and figures are made of the results.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from agents.evaluation.command import held_out_seeds
from moe.errors import one_line_errors
from studies import rq1, rq2, rq3, rq4, rq5
from studies.plays import Options, Trained
from studies.rq_report import write_findings
from studies.tasks import StudyError, load_results, run_tasks
from thermoe_env.configs import load_settings

QUESTIONS = {"rq1": rq1.Study, "rq2": rq2.Study, "rq3": rq3.Study, "rq4": rq4.Study, "rq5": rq5.Study}
"""Settings, tasks and findings by question; shipped settings are configs/studies/<question>.yaml."""
FEWEST_SEEDS = 3
"""An interval over fewer says nothing."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Answer questions with the twin, and with what was measured elsewhere."""

    questions: Annotated[tuple[Literal["rq1", "rq2", "rq3", "rq4", "rq5"], ...], tyro.conf.Positional]
    """Which; none given: all."""
    out: Path = Path("runs/studies")
    """Folder of the results; a sub-folder per question."""
    seeds: int = 20
    """Episodes per play."""
    seed: int = 5000
    """First seed; episode i has seed + i, for every play."""
    duration: int | None = None
    """Length of an episode in seconds, in place of the scenario's."""
    run: Path | None = None
    """Folder of a training run to play beside the rules."""
    routing: Path | None = None
    """Folder of a finished `python -m studies.routing`: rq2 reports it in place of its own small form, rq4
    its specialisation."""
    ray: str | None = None
    """Where Ray runs the tasks: local, auto, or ray://host:10001. None given: this process, without Ray."""
    report_only: bool = False
    """Only make the reports of results that are there."""

    def __post_init__(self) -> None:
        if self.seeds < FEWEST_SEEDS:
            raise StudyError(
                f"seeds must be at least {FEWEST_SEEDS}, got {self.seeds}: the intervals are over seeds"
            )


def main(arguments: Arguments) -> None:
    """Run what is missing and write the reports.

    Raises:
        StudyError: settings or results that cannot be used.
        ValueError, ThermoeError: as the tasks raise them; results until then are kept.
    """
    options = Options(
        seeds=tuple(held_out_seeds(arguments.seed, arguments.seeds)),
        duration_s=arguments.duration,
        agent=None if arguments.run is None else Trained.read(arguments.run),
        routing=arguments.routing,
    )
    command = shlex.join(["python", "-m", "studies.run", *sys.argv[1:]])
    for question in arguments.questions or QUESTIONS:
        study = load_settings(QUESTIONS[question], "studies", question)
        folder = arguments.out / question
        tasks = study.tasks(options)
        if not arguments.report_only:
            run_tasks(tasks, folder / "tasks", arguments.ray)
        results = load_results(tasks, folder / "tasks")
        findings = study.findings(results, options)
        write_findings(findings, folder, command)
        print(f"{question}: {findings.question}")
        for sentence in findings.answer:
            print(f"  {sentence}")
        print(f"  report: {folder / 'report.md'}", flush=True)


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; results are kept, run the command again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
