"""Run folders: where results go, what they say about their origin, and how a trained run is loaded."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from agents.models import ModelFileError, UntrustedModelError, load_model
from agents.policies import POLICIES, Policy, make_policy
from thermoe_env.problem import Problem

_PACKAGES = (
    "thermalmoe", "numpy", "numba", "scipy", "pandas", "matplotlib", "gymnasium", "torch",
    "stable-baselines3", "sb3-contrib", "optuna",
)  # fmt: skip


class RunFolderError(FileExistsError):
    """A run folder that was asked for already holds results."""


def new_run_folder(kind: str, out: str | Path | None = None) -> Path:
    """Create the folder of a run: `out`, or `runs/<kind>-<time>` where none is given.

    Raises:
        RunFolderError: `out` exists and is not empty.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(
                f"{folder} exists and is not empty: give another --out, or move it away first"
            )
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


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: after an interruption it is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may write a file
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


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
    """The runs in a folder of `train_agent.py --seeds`, by seed; none in any other."""
    return sorted(Path(folder).glob("seed-*/"), key=lambda run: (len(run.name), run.name))


def policy_label(name_or_path: str | Path) -> str:
    """Short name of a policy for tables and figures: its name, or that of its run folder or zip."""
    if str(name_or_path) in POLICIES:
        return str(name_or_path)
    path = Path(name_or_path)
    return path.stem if path.suffix == ".zip" else path.resolve().name


def model_file(path: str | Path) -> Path:
    """Where a trained policy is kept: the best model of a run's folder, or the file itself."""
    return Path(path) / "best_model.zip" if Path(path).is_dir() else Path(path)


def load_policy(name_or_path: str | Path, problem: Problem, trust_pickle: bool = False) -> Policy:
    """Load a policy: by name, from a run folder (its best model), or from a Stable-Baselines3 zip.

    The model of a run folder is loaded without unpickling anything: spaces and classes come from
    `problem`, numbers from JSON, weights as tensors. Any other zip is unpickled, which can run code.

    Args:
        name_or_path: name in `POLICIES`, run folder, or zip.
        problem: what the policy will be played on.
        trust_pickle: unpickle what a zip holds.

    Raises:
        ValueError: neither a known name nor an existing path.
        ModelFileError: the model is cut, damaged, or made for other observations or actions.
        UntrustedModelError: it can only be loaded with `trust_pickle`.
    """
    path = Path(name_or_path)
    if str(name_or_path) in POLICIES or not path.exists():
        return make_policy(str(name_or_path), problem)
    if path.is_dir():
        best = path / "best_model.zip"
        if not best.is_file():
            raise ModelFileError(
                f"{path} holds no best_model.zip: give the folder of a training run, or a zip"
            )
        return load_model(best, problem, trust_pickle)
    of_run = path.name in ("best_model.zip", "last_model.zip") and (path.parent / "config.yaml").is_file()
    if not (of_run or trust_pickle):
        raise UntrustedModelError(
            f"{path} lies outside a run folder, and loading it can run code that it holds: "
            "pass --trust-pickle if you know where it comes from"
        )
    return load_model(path, problem, trust_pickle)
