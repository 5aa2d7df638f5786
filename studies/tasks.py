"""Independent tasks of a study, here one after another or on a Ray cluster; one result file each.

A result is written when it is complete, and one that is there is not made again, so that a study may be cut
and continued. Workers return their results and the driver writes them: they share no disk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from tqdm import tqdm

from agents.files import write_file
from moe.files import read_json

RETRIES = 3
"""How often a task is begun again whose worker was lost."""
_LEFT_BEHIND = [".git", ".venv", "runs", "docs", "tests"]
"""What workers on other machines do not need of the checkout."""


class StudyError(ValueError):
    """Settings or results of a study cannot be used; the message names the file and the reason."""


class Task(Protocol):
    """A piece of a study that needs no other: a frozen dataclass, from which alone its result follows."""

    @property
    def name(self) -> str:
        """Name of the result file, without its suffix; unique in the study."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs that a worker must have free."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that the result follows from, as plain JSON types."""
        ...

    def run(self) -> dict[str, Any]:
        """The result, plain JSON types, with `settings()` as `"settings"`."""
        ...


def run_tasks(tasks: Sequence[Task], folder: Path, ray_address: str | None = None) -> None:
    """Make the results that are missing.

    Args:
        tasks: what to run.
        folder: of the results, `<name>.json` each.
        ray_address: None runs the tasks in this process; else what `ray.init` takes as `address`: `local` for
            the cores of this machine, `auto` for the cluster it belongs to, `ray://host:10001` for another.

    Raises:
        StudyError: two tasks of one name, a result of other settings, no Ray, or a worker lost too often.
        Exception: what a task raises; results until then are kept.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise StudyError(f"tasks of a study need different names, {twice} are there twice")
    missing = [task for task in tasks if not is_done(result_path(folder, task), task.settings())]
    with tqdm(total=len(missing), desc=folder.parent.name, unit="task", delay=2.0) as bar:

        def keep(task: Task, result: dict[str, Any]) -> None:
            write_file(result_path(folder, task), json.dumps(result) + "\n")
            bar.update()

        if ray_address is not None and missing:
            _run_on_ray(missing, ray_address, keep)
        else:
            for task in missing:
                keep(task, task.run())


def load_results(tasks: Sequence[Task], folder: Path) -> dict[str, dict[str, Any]]:
    """Read the results of all tasks, by name, in the tasks' order.

    Raises:
        StudyError: one is missing, or of other settings.
        DataCorruptError: one is damaged.
    """
    missing = [task.name for task in tasks if not is_done(result_path(folder, task), task.settings())]
    if missing:
        raise StudyError(
            f"{folder} lacks {len(missing)} results, {missing[0]} first: leave --report-only out"
        )
    return {task.name: read_result(result_path(folder, task)) for task in tasks}


def result_path(folder: Path, task: Task) -> Path:
    """File of a task's result."""
    return folder / f"{task.name}.json"


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a result is there.

    Raises:
        StudyError: it is, but of other settings.
        DataCorruptError: it is damaged.
    """
    if not path.exists():
        return False
    if read_result(path)["settings"] != json.loads(json.dumps(settings)):
        raise StudyError(f"{path} was made with other settings: give another --out, or move it away")
    return True


def read_result(path: Path) -> dict[str, Any]:
    """Read one result.

    Raises:
        DataCorruptError: it is cut, or no result of a study.
    """
    return read_json(path, "remove it to run it again", ("settings",))


def read_table(path: Path, columns: Sequence[str], study: str) -> pd.DataFrame:
    """Read a table of another study, which has at least some columns.

    Raises:
        StudyError: it is missing, cut, or another table.
    """
    remedy = f"give a folder of `python -m {study}` that is whole"
    if not path.is_file():
        raise StudyError(f"{path.parent} holds no {path.name}: {remedy}")
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise StudyError(f"{path} is no table ({error}): {remedy}") from error
    if lacking := [name for name in columns if name not in table]:
        raise StudyError(f"{path} lacks columns {lacking}: {remedy}")
    return table


def _run_on_ray(tasks: Sequence[Task], address: str, keep: Callable[[Task, dict[str, Any]], None]) -> None:
    """Run tasks on a cluster, each on one core; results are kept as they come."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise StudyError("--ray needs Ray, which is an extra: pip install '.[ray]'") from error
    own = not ray.is_initialized()
    if own:
        environment: dict[str, Any] = {"env_vars": {"NUMBA_NUM_THREADS": "1"}}  # a core each
        if address != "local":  # workers of this machine import from this checkout; others are sent it
            environment |= {"working_dir": str(Path(__file__).parents[1]), "excludes": _LEFT_BEHIND}
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING)
    # Only a lost worker's task is begun again: what a task raises would be raised again.
    remote = ray.remote(max_retries=RETRIES)(_run)
    waiting = {remote.options(num_gpus=task.gpus).remote(task): task for task in tasks}
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise StudyError(f"Ray gave up on {task.name} ({error}); what is done is kept") from error
            keep(task, result)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def _run(task: Task) -> dict[str, Any]:
    return task.run()
