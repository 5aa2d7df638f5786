"""Trained models as policies: any Stable-Baselines3 zip, whatever its algorithm and action mode."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from agents.files import command
from agents.learning.interface import is_of_run, mismatch
from agents.policies.policy import Policy
from moe.files import DAMAGED
from moe.workload import KNOB_NAMES
from thermoe_env.configs import read_yaml
from thermoe_env.mdp.fields import FIELDS, observation_space
from thermoe_env.problem.knobs import KnobTable
from thermoe_env.problem.problem import Problem

_MODE_OF_SPACE = {"MultiDiscrete": "multi_discrete", "Discrete": "discrete", "Box": "box"}


class ModelFileError(ValueError):
    """A trained model cannot be used; the message names the file."""


class UntrustedModelError(ModelFileError):
    """Loading a model would run code from its file, and nobody said that the file is trusted."""


class ModelPolicy:
    """A trained model as a `Policy`: whatever its action mode, it answers with levels."""

    def __init__(self, network: Any, mode: str, knobs: KnobTable) -> None:
        """Take a Stable-Baselines3 policy network and the action mode that it acts in."""
        self._network, self._mode, self._knobs = network, mode, knobs
        self._columns = [KNOB_NAMES.index(name) for name in knobs.controlled]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Levels of the controlled knobs; see `Policy.predict`."""
        action, state = self._network.predict(observation, state, episode_start, deterministic)
        return self._knobs.indices(action, self._mode)[:, self._columns], state


def run_model(path: str | Path) -> Path:
    """The zip of a trained model: a run folder's best one, or the file itself.

    Raises:
        ModelFileError: there is none.
    """
    model = Path(path) / "best_model.zip" if Path(path).is_dir() else Path(path)
    if not model.is_file():
        raise ModelFileError(f"there is no model {model}: give the folder of a training run, or a zip")
    return model


def begin_with(model: Any, path: Path, problem: Problem) -> str:
    """Give an untrained Stable-Baselines3 model the weights of a trained one; nothing is unpickled.

    Optimizers, the schedule of the learning rate and the replay buffer begin anew.

    Returns:
        SHA-256 of the trained model's file.

    Raises:
        ModelFileError: the file is damaged, or of another algorithm or network, observations or knobs.
    """
    from stable_baselines3.common.save_util import load_from_zip_file

    content = path.read_bytes()
    _read_data(path, content)
    _refuse_mismatch(path, problem)
    try:
        weights = load_from_zip_file(io.BytesIO(content), load_data=False, device="cpu")[1]
        model.policy.load_state_dict(weights["policy"])
    except (RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise ModelFileError(
            f"{path} does not fit this run: give a model of the same algorithm, action mode and net_arch "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    return hashlib.sha256(content).hexdigest()


def load_model(path: Path, problem: Problem, trust_pickle: bool) -> Policy:
    """Read a zip and check that it fits `problem`.

    Without `trust_pickle` nothing is unpickled: the network's class comes from the `algo` in the config.yaml
    beside the zip, its spaces from `problem`, its sizes from JSON, its weights as tensors.

    Raises:
        ModelFileError: the model is cut, damaged, or made for other observations or actions.
        UntrustedModelError: it can only be loaded with `trust_pickle`.
    """
    from stable_baselines3.common.save_util import load_from_zip_file

    content = path.read_bytes()
    data = _read_data(path, content)
    mode = _action_mode(path, data)
    _refuse_mismatch(path, problem)
    _check_spaces(path, data, problem, mode)
    try:
        known, weights, _ = load_from_zip_file(io.BytesIO(content), load_data=trust_pickle, device="cpu")
        kind, arguments = _named(known) if known is not None else _unpickled(path, data, mode)
        spaces = observation_space(), problem.knobs.action_space(mode)
        network = kind(*spaces, lambda _: 0.0, **arguments)  # the learning rate is for training only
        network.load_state_dict(weights["policy"])
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        EOFError,
        UnpicklingError,
    ) as error:  # the last four: what is pickled cannot be made here
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is not a model of this version ({error}); train it again") from error
    return ModelPolicy(network, mode, problem.knobs)


def _refuse_mismatch(path: Path, problem: Problem) -> None:
    """Refuse the model of a run that was trained to read or set something else.

    Raises:
        ModelFileError: names the difference.
    """
    if is_of_run(path) and (changed := mismatch(path.parent, problem)):
        raise ModelFileError(
            f"{path} was trained for something else than this scenario has: {changed}. Give the scenario it "
            "was trained on, or train it again"
        )


def _named(known: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Class and arguments of the network, as the zip itself names them."""
    exploring = {"use_sde": True} if known.get("use_sde") else {}
    return known["policy_class"], {**known["policy_kwargs"], **exploring}


def _unpickled(path: Path, data: dict[str, Any], mode: str) -> tuple[type, dict[str, Any]]:
    """Class and arguments of the network, from the run's configuration and plain JSON."""
    from agents.learning.algorithms import algorithm, check_action_mode
    from agents.learning.config import load_train_config

    config, arguments = path.parent / "config.yaml", data["policy_kwargs"]
    try:
        name = read_yaml(config)["algo"]
        check_action_mode(name, mode)
        if ":serialized:" in arguments:  # some algorithms add a class, which is pickled with all the rest
            arguments = load_train_config(config).settings.network()
    except (KeyError, TypeError, ValueError) as error:
        raise UntrustedModelError(
            f"{config} does not say how {path.name} is built ({error}), and asking the zip itself can run "
            "code that it holds: pass --trust-pickle if you know where it comes from"
        ) from error
    return algorithm(name).networks[mode], arguments


def _check_spaces(path: Path, data: dict[str, Any], problem: Problem, mode: str) -> None:
    """Compare the spaces that the zip describes with the problem's."""
    nvec = problem.knobs.nvec
    key, wanted = {
        "multi_discrete": ("nvec", str(nvec)),
        "discrete": ("n", str(nvec.prod())),
        "box": ("_shape", [len(nvec)]),
    }[mode]
    found = [data["observation_space"].get("_shape"), data["action_space"].get(key)]
    if found[0] != [len(FIELDS)]:
        raise ModelFileError(
            f"{path} was trained on observations of shape {found[0]}, this version has {len(FIELDS)} fields: "
            f"train it again ({command('train')}), or use the version that it was trained with"
        )
    if found[1] != wanted:
        raise ModelFileError(
            f"{path} was trained for observations and actions {found}, this scenario has "
            f"{[[len(FIELDS)], wanted]}: give the scenario it was trained on, or train it again"
        )


def _read_data(path: Path, content: bytes) -> dict[str, Any]:
    """The zip's JSON part, after every part's checksum has been verified."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ModelFileError(f"{path}: its part {damaged!r} is damaged; copy or train it again")
            data = json.loads(archive.read("data"))
        for space in ("observation_space", "action_space"):
            data[space][":type:"]  # or it is a zip of something else
        return data
    except DAMAGED as error:
        raise ModelFileError(
            f"{path} is no whole Stable-Baselines3 zip ({error}); copy or train it again"
        ) from error


def _action_mode(path: Path, data: dict[str, Any]) -> str:
    """Action mode that the model was trained in, from the name of its action space's class."""
    kind = str(data["action_space"][":type:"]).rstrip("'>").rpartition(".")[2]
    if kind not in _MODE_OF_SPACE:
        raise ModelFileError(
            f"{path}: action space {kind!r} is none of {sorted(_MODE_OF_SPACE)}; is it a trained model?"
        )
    return _MODE_OF_SPACE[kind]
