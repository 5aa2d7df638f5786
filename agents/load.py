"""Policies by name or by path: shipped ones, run folders, Stable-Baselines3 zips."""

from __future__ import annotations

from pathlib import Path

from agents.files import shown_name
from agents.learning.models import ModelFileError, UntrustedModelError, load_model
from agents.policies.policy import Policy
from agents.policies.registry import POLICIES, make_policy
from thermoe_env.problem.problem import Problem


def policy_label(name_or_path: str | Path) -> str:
    """Short name of a policy for tables and figures: its name, or that of its run folder or zip.

    Raises:
        ValueError: the name of the folder or zip cannot stand in a table (`agents.files.shown_name`).
    """
    if str(name_or_path) in POLICIES:
        return str(name_or_path)
    path = Path(name_or_path)
    return shown_name(path.stem if path.suffix == ".zip" else path.resolve().name)


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
