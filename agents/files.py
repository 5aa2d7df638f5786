"""Run folders: where results go, and what they say about their origin."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from moe.files import write_file

_SCRIPTS = {"train": "train_agent.py", "evaluate": "evaluate.py"}
_PACKAGES = (
    "thermalmoe", "numpy", "numba", "scipy", "pandas", "matplotlib", "gymnasium", "torch",
    "stable-baselines3", "sb3-contrib", "optuna",
)  # fmt: skip
LOCK_FILE = ".lock"
"""In a run folder, held by the process that writes there; the file itself stays."""


class RunFolderError(FileExistsError):
    """A run folder that was asked for already holds results."""


class FolderInUseError(BlockingIOError):
    """Another process writes into a run folder; the message names it."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run folder for this process; the system frees it however the process ends.

    Raises:
        FolderInUseError: another process holds it.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise FolderInUseError(
                f"process {file.read().strip() or '?'} is training in {folder}: wait for its end or stop it, "
                "or give another folder"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def new_run_folder(kind: str, out: str | Path | None = None) -> Path:
    """Create the folder of a run: `out`, or `runs/<kind>-<time>` where none is given.

    Raises:
        RunFolderError: `out` exists and is not empty.
    """
    if out is not None:
        folder = Path(out)
        refuse_filled(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 1000):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RunFolderError(f"runs/{name} and a thousand more exist; give --out")


def refuse_filled(folder: Path) -> None:
    """Refuse a folder for a new run that holds something.

    Raises:
        RunFolderError: it does, or it is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(p.name != LOCK_FILE for p in folder.iterdir())):
        raise RunFolderError(f"{folder} exists and is not empty: give another --out, or move it away first")


def command(name: str) -> str:
    """How to call a command (`train`, `evaluate`) where this process was called: as a script or by name."""
    called = Path(sys.argv[0])
    in_checkout = called.name in _SCRIPTS.values()
    return f"python {called.with_name(_SCRIPTS[name])}" if in_checkout else f"thermalmoe-{name}"


def shown_name(name: str) -> str:
    """A name of a folder or file, as it may stand in tables, figures and reports.

    Raises:
        ValueError: it begins with anything but a letter or a digit, as a formula of a spreadsheet does, or
            holds what cannot be printed.
    """
    if not (name[:1].isalnum() and name.isprintable()):
        raise ValueError(
            f"{name!r} cannot stand in tables: a name is printable and begins with a letter or a digit, as "
            "spreadsheets take = + - @ for formulas; rename its folder or file"
        )
    return name


def write_origin(folder: Path, config: dict[str, Any]) -> None:
    """Write how a run came about: config.yaml, command.txt, versions.json."""
    write_file(folder / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    write_file(folder / "command.txt", shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    write_file(folder / "versions.json", json.dumps(versions, indent=1) + "\n")


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Settings as config.yaml holds them: tuples and paths have no plain YAML form."""
    return json.loads(json.dumps(config, default=str))


def training_runs(folder: str | Path) -> list[Path]:
    """The runs in a folder of a training with `--seeds`, by seed; none in any other."""
    return sorted(Path(folder).glob("seed-*/"), key=lambda run: (len(run.name), run.name))
