"""Run folders: where results go, what they say about their origin, and how a trained run is loaded."""

from __future__ import annotations

import io
import json
import os
import platform
import shlex
import sys
import zipfile
import zlib
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agents.policies import POLICIES, Policy, make_policy
from thermoe_env.fields import FIELDS, observation_space
from thermoe_env.knobs import KNOB_NAMES
from thermoe_env.problem import Problem

_PACKAGES = (
    "thermalmoe", "numpy", "numba", "scipy", "pandas", "matplotlib", "gymnasium", "torch",
    "stable-baselines3",
)  # fmt: skip
_MODE_OF_SPACE = {"MultiDiscrete": "multi_discrete", "Discrete": "discrete", "Box": "box"}


class RunFolderError(FileExistsError):
    """A run folder that was asked for already holds results."""


class ModelFileError(ValueError):
    """A trained model cannot be used; the message names the file."""


class UntrustedModelError(ModelFileError):
    """Loading a model would run code from its file, and nobody said that the file is trusted."""


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
    plain = json.loads(json.dumps(config, default=str))  # tuples and paths have no plain YAML form
    write_file(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    write_file(folder / "command.txt", shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    write_file(folder / "versions.json", json.dumps(versions, indent=1) + "\n")


def policy_label(name_or_path: str | Path) -> str:
    """Short name of a policy for tables and figures: its name, or that of its run folder or zip."""
    if str(name_or_path) in POLICIES:
        return str(name_or_path)
    path = Path(name_or_path)
    return path.stem if path.suffix == ".zip" else path.resolve().name


def load_policy(name_or_path: str | Path, problem: Problem, trust_pickle: bool = False) -> Policy:
    """Load a policy: by name, from a run folder (its best model), or from a Stable-Baselines3 PPO zip.

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
        return _load_model(best, problem, trust_pickle)
    of_run = path.name in ("best_model.zip", "last_model.zip") and (path.parent / "config.yaml").is_file()
    if not (of_run or trust_pickle):
        raise UntrustedModelError(
            f"{path} lies outside a run folder, and loading it can run code that it holds: "
            "pass --trust-pickle if you know where it comes from"
        )
    return _load_model(path, problem, trust_pickle)


class _ModelPolicy:
    """A trained model as a `Policy`: whatever its action space, it answers with levels."""

    def __init__(self, model: Any, mode: str, problem: Problem) -> None:
        self._model, self._mode, self._knobs = model, mode, problem.knobs
        self._columns = [KNOB_NAMES.index(name) for name in problem.knobs.controlled]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Levels of the controlled knobs; see `Policy.predict`."""
        action, state = self._model.predict(observation, state, episode_start, deterministic)
        return self._knobs.indices(action, self._mode)[:, self._columns], state


def _load_model(path: Path, problem: Problem, trust_pickle: bool) -> Policy:
    """Read a PPO zip and check that it fits `problem`."""
    from stable_baselines3 import PPO

    content = path.read_bytes()
    data = _read_data(path, content)
    mode = _action_mode(path, data)
    _check_spaces(path, data, problem, mode)
    custom = None if trust_pickle else _without_pickle(path, data, problem, mode)
    try:
        model = PPO.load(io.BytesIO(content), device="cpu", custom_objects=custom)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"{path} is not a PPO model of this version ({error}); train it again"
        ) from error
    return _ModelPolicy(model, mode, problem)


def _check_spaces(path: Path, data: dict[str, Any], problem: Problem, mode: str) -> None:
    """Compare the spaces that the zip describes with the problem's."""
    found = [data["observation_space"].get("_shape"), data["action_space"].get("nvec")]
    wanted = [[len(FIELDS)], str(problem.knobs.nvec)]
    if mode != "multi_discrete":
        key, value = (
            ("n", str(problem.knobs.nvec.prod()))
            if mode == "discrete"
            else ("_shape", [len(problem.knobs.nvec)])
        )
        found[1], wanted[1] = data["action_space"].get(key), value
    if found[0] != wanted[0]:
        raise ModelFileError(
            f"{path} was trained on observations of shape {found[0]}, this version has {len(FIELDS)} fields: "
            "train it again (python train_agent.py), or use the version that it was trained with"
        )
    if found != wanted:
        raise ModelFileError(
            f"{path} was trained for observations and actions {found}, this scenario has {wanted}: "
            "give the scenario it was trained on, or train it again"
        )


def _read_data(path: Path, content: bytes) -> dict[str, Any]:
    """The zip's JSON part, after every part's checksum has been verified."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ModelFileError(f"{path}: its part {damaged!r} is damaged; copy or train it again")
            return json.loads(archive.read("data"))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, json.JSONDecodeError) as error:
        raise ModelFileError(
            f"{path} is no whole Stable-Baselines3 zip ({error}); copy or train it again"
        ) from error


def _action_mode(path: Path, data: dict[str, Any]) -> str:
    """Action mode that the model was trained in, from the name of its action space's class."""
    kind = str(data.get("action_space", {}).get(":type:", "")).rstrip("'>").rpartition(".")[2]
    if kind not in _MODE_OF_SPACE:
        raise ModelFileError(
            f"{path}: action space {kind!r} is none of {sorted(_MODE_OF_SPACE)}; is it a PPO model?"
        )
    return _MODE_OF_SPACE[kind]


def _without_pickle(path: Path, data: dict[str, Any], problem: Problem, mode: str) -> dict[str, Any]:
    """Stand-ins for everything pickled in the zip, so that loading it for prediction runs no code of it."""
    from stable_baselines3.common.buffers import RolloutBuffer
    from stable_baselines3.common.policies import ActorCriticPolicy

    known: dict[str, Any] = {
        "policy_class": ActorCriticPolicy,
        "observation_space": observation_space(),
        "action_space": problem.knobs.action_space(mode),
        "rollout_buffer_class": RolloutBuffer,
        "learning_rate": 0.0,
        "lr_schedule": None,
        "clip_range": 0.2,
        "clip_range_vf": None,
        "n_envs": 1,
        "n_steps": 1,
        **dict.fromkeys(("_last_obs", "_last_episode_starts", "_last_original_obs", "_vec_normalize_env")),
        **dict.fromkeys(("ep_info_buffer", "ep_success_buffer", "action_noise", "_logger")),
    }
    pickled = {key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value}
    if pickled - set(known):
        raise UntrustedModelError(
            f"{path} holds pickled {sorted(pickled - set(known))}, which can run code: "
            "pass --trust-pickle if you know where it comes from"
        )
    return known
