"""What test-time training buys under an energy budget: `python -m studies.ttt`.

Every seed is one repeat (`studies.repeats`): it trains the models, draws the streams and serves each of them
without adaptation and in every way of adapting. Every batch is scored before it is learned from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from moe.config import TASKS, Size, Task
from moe.errors import DataCorruptError, DataMissingError
from moe.meter import MeterUnavailableError
from moe.train import TrainingDiverged, pick_device
from moe.ttt import AdaptationDiverged
from studies.repeats import StudyError, ensure_repeat, load_repeats
from studies.ttt_config import load_study
from studies.ttt_measure import run_repeat
from studies.ttt_report import write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare methods, gates, budgets, guards and norms on streams of shifts."""

    task: Literal["vision", "language", "both"] = "both"
    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Repeats to run."""
    out: Path = Path("runs/ttt")
    """Folder of the repeats, the tables and the figures."""
    config: str = "ttt"
    """Settings: name in configs/studies, or path of a YAML file."""
    report_only: bool = False
    """Only make the tables and figures of the repeats that are there."""


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there."""
    tasks: tuple[Task, ...] = TASKS if arguments.task == "both" else (arguments.task,)
    if not arguments.report_only:
        study = load_study(arguments.config)
        if arguments.size not in study.sizes:
            raise StudyError(f"{arguments.config} has no size {arguments.size!r}, only {tuple(study.sizes)}")
        device = pick_device(arguments.device)
        if device.type == "cpu":
            torch.set_num_threads(1)  # the same arithmetic in every repeat
        for seed in arguments.seeds:
            for task in tasks:
                settings = study.settings(task, arguments.size, device.type)
                run = partial(run_repeat, study, task, arguments.size, device, seed)
                ensure_repeat(arguments.out, task, arguments.size, seed, settings, run)
    repeats = [r for task in tasks for r in load_repeats(arguments.out, task, arguments.size)]
    if not repeats:
        raise StudyError(f"{arguments.out} holds no repeat of {tasks} {arguments.size}: run it first")
    write_report(repeats, arguments.out, Console())


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (
        ValueError, OSError, ArithmeticError, DataMissingError, DataCorruptError, MeterUnavailableError,
        TrainingDiverged, AdaptationDiverged,
    ) as failure:  # fmt: skip
        sys.exit(f"{type(failure).__name__}: {failure}")
