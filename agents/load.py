"""Policies by name, by path or by class: shipped ones, run folders, model zips, classes of other packages."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any, cast

from agents.files import shown_name
from agents.learning.interface import changed_inputs, is_of_run
from agents.learning.models import ModelFileError, UntrustedModelError, load_model
from agents.policies.policy import Policy, PolicyError
from agents.policies.registry import POLICIES, make_policy
from thermoe_env.problem.problem import Problem


def policy_label(name_or_path: str | Path) -> str:
    """Short name of a policy for tables and figures: its name, or that of its class, run folder or zip.

    Raises:
        ValueError: the name of the folder or zip cannot stand in a table (`agents.files.shown_name`).
    """
    if str(name_or_path) in POLICIES:
        return str(name_or_path)
    if _is_class(name_or_path):
        return str(name_or_path).rpartition(":")[2]
    path = Path(name_or_path)
    return shown_name(path.stem if path.suffix == ".zip" else path.resolve().name)


def long_label(name_or_path: str | Path) -> str:
    """Name of a policy where several have the same short one: with its module, or the folder above."""
    if _is_class(name_or_path):
        return str(name_or_path)
    return f"{Path(name_or_path).resolve().parent.name}/{policy_label(name_or_path)}"


def model_file(path: str | Path) -> Path:
    """What a policy is made from: a run's best model, the file itself, or the module of its class.

    Raises:
        PolicyError: the module of the class does not import.
    """
    if _is_class(path):
        return Path(_module(str(path)).__file__ or "")
    return Path(path) / "best_model.zip" if Path(path).is_dir() else Path(path)


def load_policy(name_or_path: str | Path, problem: Problem, trust_pickle: bool = False) -> Policy:
    """Load a policy: by name, from a run folder (its best model), a Stable-Baselines3 zip, or a class.

    The model of a run folder is loaded without unpickling anything: spaces and classes come from
    `problem`, numbers from JSON, weights as tensors. Any other zip is unpickled, which can run code.

    Args:
        name_or_path: name in `POLICIES`, run folder, zip, or `package.module:Class`. The class is imported,
            from the current folder too, and called with the problem; see `Policy` for what it must be.
        problem: what the policy will be played on.
        trust_pickle: unpickle what a zip holds.

    Raises:
        ValueError: neither a known name, an existing path nor a class.
        PolicyError: a class that does not import, or is no policy.
        ModelFileError: the model is cut, damaged, or made for other observations or actions.
        InterfaceError: a run folder's interface.json is missing or damaged.
        UntrustedModelError: it can only be loaded with `trust_pickle`.
    """
    path = Path(name_or_path)
    if _is_class(name_or_path):
        return _of_class(str(name_or_path), problem)
    if str(name_or_path) in POLICIES or not path.exists():
        return make_policy(str(name_or_path), problem)
    if path.is_dir():
        best = path / "best_model.zip"
        if not best.is_file():
            raise ModelFileError(
                f"{path} holds no best_model.zip: give the folder of a training run, or a zip"
            )
        return load_model(best, problem, trust_pickle)
    if not (is_of_run(path) or trust_pickle):
        raise UntrustedModelError(
            f"{path} lies outside a run folder, and loading it can run code that it holds: "
            "pass --trust-pickle if you know where it comes from"
        )
    return load_model(path, problem, trust_pickle)


def trained_otherwise(name_or_path: str | Path, problem: Problem) -> tuple[str, ...]:
    """What a run was trained on that `problem` has otherwise (scenario, profile, twin, trace); else nothing.

    Raises:
        InterfaceError: the run's interface.json is missing or damaged.
    """
    if str(name_or_path) in POLICIES or _is_class(name_or_path) or not is_of_run(model_file(name_or_path)):
        return ()
    return tuple(changed_inputs(model_file(name_or_path).parent, problem))


def _is_class(name_or_path: str | Path) -> bool:
    """Whether a policy is named as `package.module:Class`; what exists is a path."""
    return ":" in str(name_or_path) and not Path(name_or_path).exists()


def _module(spec: str) -> Any:
    """The module of `package.module:Class`, from the current folder or installed."""
    name = spec.rpartition(":")[0]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name!r} in {os.getcwd()} or installed"
        else:
            reason = _reason(error)
        raise PolicyError(f"policy {spec!r}: module {name!r} does not import: {reason}") from error


def _of_class(spec: str, problem: Problem) -> Policy:
    module, name = _module(spec), spec.rpartition(":")[2]
    make = getattr(module, name, None)
    if make is None:
        found = sorted(key for key, value in vars(module).items() if hasattr(value, "predict"))
        raise PolicyError(f"policy {spec!r}: {module.__file__} has no {name!r}; what has `predict`: {found}")
    if not callable(make):
        raise PolicyError(f"policy {spec!r}: {name} is a {type(make).__name__}, name a class")
    try:
        inspect.signature(make).bind(problem)
    except TypeError as error:
        raise PolicyError(
            f"policy {spec!r}: {name} must take one argument, the problem that will be played ({error})"
        ) from error
    try:
        policy = make(problem)
    except Exception as error:
        raise PolicyError(f"policy {spec!r}: {name}(problem) failed: {_reason(error)}") from error
    if not callable(getattr(policy, "predict", None)):
        raise PolicyError(
            f"policy {spec!r}: {type(policy).__name__} lacks `predict(observation, state, episode_start, "
            "deterministic)`, see agents.policies.policy.Policy"
        )
    return cast(Policy, policy)


def _reason(error: BaseException) -> str:
    """An error of another package's code in one line, with the place where it arose."""
    places = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]  # fmt: skip
    where = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
