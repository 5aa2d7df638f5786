"""Routing bias, expert count and training against energy, latency and quality: `python -m studies.routing`.

Every seed is one repeat: all variants of the model are trained with it and measured side by side. A repeat
is written when it is complete, and a repeat that is there is not run again, so that a run may be cut and
continued, and several processes, each with its own seeds and GPU, may write to one folder.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from agents.runs import write_file
from moe.config import TASKS, Size, Task
from moe.errors import DataCorruptError, DataMissingError
from moe.meter import MeterUnavailableError
from moe.train import TrainingDiverged, pick_device
from studies.routing_config import Study, StudyError, load_study
from studies.routing_measure import run_repeat
from studies.routing_report import write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare variants of the model over expert counts and routing biases."""

    task: Literal["vision", "language", "both"] = "both"
    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Repeats to run."""
    out: Path = Path("runs/routing")
    """Folder of the repeats, the tables and the figures."""
    config: str = "routing"
    """Settings: name in configs/studies, or path of a YAML file."""
    steps: int | None = None
    """Optimizer steps of every training, in place of the settings'."""
    report_only: bool = False
    """Only make the tables and figures of the repeats that are there."""


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there."""
    tasks: tuple[Task, ...] = TASKS if arguments.task == "both" else (arguments.task,)
    study = load_study(arguments.config, arguments.steps)
    if not arguments.report_only:
        device = pick_device(arguments.device)
        if device.type == "cpu":
            torch.set_num_threads(1)  # as the measured service does: the same arithmetic in every repeat
        for seed in arguments.seeds:
            for task in tasks:
                ensure_repeat(study, task, arguments.size, device, seed, arguments.out)
    repeats = [r for task in tasks for r in load_repeats(arguments.out, task, arguments.size)]
    if not repeats:
        raise StudyError(f"{arguments.out} holds no repeat of {tasks} {arguments.size}: run it first")
    write_report(repeats, study.quality_margin, arguments.out, Console())


def ensure_repeat(
    study: Study, task: Task, size: Size, device: torch.device, seed: int, folder: Path
) -> Path:
    """Run a repeat unless its file is there; returns the file.

    Raises:
        StudyError: The file is there, of other settings.
    """
    path = folder / f"{task}-{size}-seed{seed}.json"
    if path.exists():
        if read_repeat(path)["settings"] != json.loads(json.dumps(study.settings(task, size, device.type))):
            raise StudyError(f"{path} was made with other settings: give another --out, or move it away")
        print(f"{path} is there")
        return path
    start_s = time.perf_counter()
    repeat = run_repeat(study, task, size, device, seed)
    write_file(path, json.dumps(repeat) + "\n")
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in repeat["spent_s"].items())
    print(f"wrote {path} after {time.perf_counter() - start_s:.0f} s ({parts})", flush=True)
    return path


def load_repeats(folder: Path, task: Task, size: Size) -> list[dict[str, Any]]:
    """Read the repeats of a task, by seed.

    Raises:
        StudyError: A file is damaged, or of other settings than the others.
    """
    repeats = [read_repeat(path) for path in folder.glob(f"{task}-{size}-seed*.json")]
    repeats.sort(key=lambda repeat: repeat["seed"])
    for repeat in repeats[1:]:
        if repeat["settings"] != repeats[0]["settings"]:
            raise StudyError(
                f"{folder}: the {task} repeats with seeds {repeats[0]['seed']} and {repeat['seed']} were "
                "made with different settings; move those of one apart"
            )
    return repeats


def read_repeat(path: Path) -> dict[str, Any]:
    """Read one repeat.

    Raises:
        StudyError: The file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StudyError(f"{path} is no JSON ({error}); remove it to run it again") from error


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (
        ValueError, OSError, DataMissingError, DataCorruptError, MeterUnavailableError, TrainingDiverged,
    ) as failure:  # fmt: skip
        sys.exit(f"{type(failure).__name__}: {failure}")
