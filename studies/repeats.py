"""Repeats of a study: one file per task, size and seed, and what is common to the tables made of them.

A repeat is written when it is complete, and one that is there is not run again, so that a run may be cut and
continued, and several processes, each with its own seeds and GPU, may write to one folder.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pandas as pd
import torch

from agents.files import write_file
from agents.play.metrics import student_interval
from moe.data import datasets as data
from moe.device.torch_device import device_name, one_thread_on_cpu, pick_device
from moe.model.config import TASKS, Size, Task
from moe.training.recipes import RECIPES, Recipe
from studies.tasks import StudyError, is_done, read_result

WARMUP_SHARE = 0.25
"""Most of a training that its warm-up may take: the studies' trainings are short."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatArguments:
    """What the commands of all studies of repeats take."""

    task: Literal["vision", "language", "both"] = "both"
    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Repeats to run."""
    out: Path
    """Folder of the repeats, the tables and the figures."""
    config: str
    """Settings: name in configs/studies, or path of a YAML file."""
    report_only: bool = False
    """Only make the tables and figures of the repeats that are there."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks to run and to report."""
        return TASKS if self.task == "both" else (self.task,)


class Settled(Protocol):
    """Settings of a study."""

    def settings(self, task: Task, size: Size, device_type: str) -> dict[str, Any]:
        """All that must be the same for repeats to belong together, as plain JSON types."""
        ...


_Study = TypeVar("_Study", bound=Settled)


def short_recipe(task: Task, size: Size, steps: int, **changes: Any) -> Recipe:
    """Return the recipe of a model, over fewer steps."""
    recipe = RECIPES[task, size]
    warmup_steps = min(recipe.warmup_steps, max(1, round(WARMUP_SHARE * steps)))
    return dataclasses.replace(recipe, **{"steps": steps, "warmup_steps": warmup_steps, **changes})


def provenance(task: Task, size: Size, device: torch.device, seed: int) -> dict[str, Any]:
    """What every repeat says about where it comes from."""
    return {
        "task": task,
        "size": size,
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": device_name(device),
        "torch": torch.__version__,
        "data_sha256": data.data_digest(task),
    }


def ensure_repeats(
    arguments: RepeatArguments,
    study: _Study,
    run_repeat: Callable[[_Study, Task, Size, torch.device, int], dict[str, Any]],
) -> None:
    """Run the repeats that are missing, see `ensure_repeat`."""
    device = pick_device(arguments.device)
    one_thread_on_cpu(device)  # as in the measured service: the same arithmetic in every repeat
    for seed in arguments.seeds:
        for task in arguments.tasks:
            settings = study.settings(task, arguments.size, device.type)
            run = partial(run_repeat, study, task, arguments.size, device, seed)
            ensure_repeat(arguments.out, task, arguments.size, seed, settings, run)


def load_all(arguments: RepeatArguments) -> list[dict[str, Any]]:
    """Read the repeats of all tasks, see `load_repeats`.

    Raises:
        StudyError: There is none.
    """
    repeats = [r for task in arguments.tasks for r in load_repeats(arguments.out, task, arguments.size)]
    if not repeats:
        raise StudyError(
            f"{arguments.out} holds no repeat of {arguments.tasks} {arguments.size}: run it first"
        )
    return repeats


def ensure_repeat(
    folder: Path,
    task: Task,
    size: Size,
    seed: int,
    settings: dict[str, Any],
    run: Callable[[], dict[str, Any]],
    part: str = "",
) -> Path:
    """Run a repeat, or a part of one, unless its file is there; returns the file.

    Args:
        folder: Where repeats are.
        task: Part of its name.
        size: Part of its name.
        seed: Part of its name.
        settings: All that must be the same for repeats to belong together; `run` puts it in `"settings"`.
        run: Makes the repeat, plain JSON types, with `"spent_s"` by part.
        part: Name of the part, where a repeat is kept in parts.

    Raises:
        StudyError: The file is there, of other settings.
    """
    path = repeat_path(folder, task, size, seed, part)
    if is_done(path, settings):
        print(f"{path} is there")
        return path
    start_s = time.perf_counter()
    repeat = run()
    write_file(path, json.dumps(repeat) + "\n")
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in repeat["spent_s"].items())
    print(f"wrote {path} after {time.perf_counter() - start_s:.0f} s ({parts})", flush=True)
    return path


def repeat_path(folder: Path, task: Task, size: Size, seed: int, part: str = "") -> Path:
    """File of a repeat, or of a part of one."""
    return folder / f"{task}-{size}-seed{seed}{part and f'-{part}'}.json"


def load_repeats(folder: Path, task: Task, size: Size) -> list[dict[str, Any]]:
    """Read the repeats of a task, or the parts of them, by seed.

    Raises:
        StudyError: A file is damaged, or of other settings than the others.
    """
    repeats = [read_result(path) for path in sorted(folder.glob(f"{task}-{size}-seed*.json"))]
    repeats.sort(key=lambda repeat: repeat["seed"])
    for repeat in repeats[1:]:
        if repeat["settings"] != repeats[0]["settings"]:
            raise StudyError(
                f"{folder}: the {task} repeats with seeds {repeats[0]['seed']} and {repeat['seed']} were "
                "made with different settings; move those of one apart"
            )
    return repeats


def origin(repeats: Sequence[dict[str, Any]]) -> str:
    """Where the numbers come from: machines, size, and how many repeats of which task."""
    machines = ", ".join(sorted({repeat["machine"] for repeat in repeats}))
    tasks = pd.Series([repeat["task"] for repeat in repeats]).value_counts(sort=False)
    counts = ", ".join(f"{task}: {n} repeat{'s' if n > 1 else ''}" for task, n in tasks.items())
    return f"{machines}, {repeats[0]['size']} models, {counts}"


def select(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """Rows in which the named columns have the given values."""
    chosen = np.ones(len(table), bool)
    for name, value in values.items():
        chosen &= (table[name] == value).to_numpy()
    return table.iloc[np.flatnonzero(chosen)]


def summarize(table: pd.DataFrame, by: list[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Mean over repeats of each metric that is there, with its interval in `_low` and `_high`."""
    rows = []
    present = [name for name in metrics if name in table]
    for _, group in table.groupby(by, sort=False):
        row: dict[str, Any] = {name: group[name].iloc[0] for name in by} | {"n": len(group)}
        for name in present:
            mean, low, high = student_interval(group[name].to_numpy())
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def range_text(
    mean: float, low: float, high: float, factor: float = 1.0, unit: str = "", sign: str = "", digits: int = 1
) -> str:
    """A mean and its interval to read; "-" where there is no number."""
    if math.isnan(mean):
        return "-"
    text, low_text, high_text = (f"{v * factor:{sign}.{digits}f}" for v in (mean, low, high))
    return f"{text}{unit}" if math.isnan(low) else f"{text}{unit} ({low_text} to {high_text})"


def shown(
    row: dict[str, Any], name: str, factor: float = 1.0, unit: str = "", sign: str = "", digits: int = 1
) -> str:
    """A number of a row of `summarize`, as `range_text` writes it; "-" where the row lacks it."""
    mean, low, high = (row.get(f"{name}{end}", math.nan) for end in ("", "_low", "_high"))
    return range_text(mean, low, high, factor, unit, sign, digits)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown, and an empty one behind it."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]
