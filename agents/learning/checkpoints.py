"""Checkpoints: a Stable-Baselines3 zip that also holds what is needed to continue its training."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from agents.files import write_file
from moe.errors import ThermoeError
from moe.files import DAMAGED

_STATE = "training_state.json"
# Rewritten at every round's start, and pickled if they were kept.
_LEFT_OUT = [
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "_last_lstm_states",
    "ep_info_buffer",
    "ep_success_buffer",
]
# Numbers that learning goes on from, where an algorithm has them.
_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate")
_REPLAYED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class CheckpointError(ThermoeError):
    """A run cannot be continued; the message names the file and the remedy."""


def save_model(model: BaseAlgorithm, path: Path, progress: dict[str, Any] | None = None) -> None:
    """Write a model in one step; with `progress`, as a checkpoint that training can continue from.

    Args:
        model: between two rounds.
        path: a zip; any Stable-Baselines3 can read it. A checkpoint holds the replay buffer, too.
        progress: what the run remembers beside the model, as JSON.
    """
    buffer = io.BytesIO()
    model.save(buffer, exclude=_LEFT_OUT)
    if progress is not None:
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(_STATE, json.dumps({**progress, **_numbers(model)}))
            for name, array in _replayed(model).items():
                with archive.open(_part(name), "w", force_zip64=True) as part:
                    np.lib.format.write_array(part, np.ascontiguousarray(array), allow_pickle=False)
    write_file(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """The training state in a checkpoint: counters, random generators and the `progress` it was saved with.

    Raises:
        CheckpointError: the file is absent, cut, damaged, or no checkpoint.
    """
    remedy = "put a whole copy in its place, or start the run again in another folder"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path}: its part {damaged!r} is damaged; {remedy}")
            return json.loads(archive.read(_STATE))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {remedy}") from error
    except DAMAGED as error:
        raise CheckpointError(f"{path} is cut, or not the checkpoint of a run ({error}); {remedy}") from error


def restore(model: BaseAlgorithm, path: Path, state: dict[str, Any]) -> None:
    """Put an untrained model, and the random generators, where the checkpoint was saved.

    Nothing is unpickled: the model is built from its configuration, only tensors and numbers are read.

    Raises:
        CheckpointError: the checkpoint is of other settings, or of another version.
    """
    try:
        _, parameters, variables = load_from_zip_file(path, load_data=False, device="cpu")
        model.set_parameters(parameters, device="cpu")
        with torch.no_grad():
            for name, value in (variables or {}).items():
                getattr(model, name).copy_(value)
        _restore_replayed(model, path, state)
        for name in _COUNTERS:
            if hasattr(model, name):
                setattr(model, name, state[name.lstrip("_")])
        model.action_space.np_random.bit_generator.state = state["action_rng"]
        np.random.set_state(tuple(state["numpy_rng"]))  # noqa: NPY002  (Stable-Baselines3 draws from it)
        torch_rng = bytearray(base64.b64decode(state["torch_rng"]))
        torch.set_rng_state(torch.frombuffer(torch_rng, dtype=torch.uint8))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit this run's config.yaml and scenario.yaml, or it is of a version with other "
            f"observations: start the run again in another folder ({error})"
        ) from error


def _numbers(model: BaseAlgorithm) -> dict[str, Any]:
    """Counters and random generators, as JSON has them."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    counters = {name.lstrip("_"): getattr(model, name) for name in _COUNTERS if hasattr(model, name)}
    return {
        **counters,
        "action_rng": model.action_space.np_random.bit_generator.state,
        "numpy_rng": [name, np.asarray(keys).tolist(), *rest],
        "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def _part(name: str) -> str:
    """Name inside the zip of an array of the replay buffer."""
    return f"replay/{name}.npy"


def _replayed(model: BaseAlgorithm) -> dict[str, np.ndarray]:
    """The filled part of the replay buffer's arrays, oldest or newest first as they lie; {} without one."""
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None:
        return {}
    return {name: getattr(buffer, name)[: buffer.size()] for name in _REPLAYED}


def _restore_replayed(model: BaseAlgorithm, path: Path, state: dict[str, Any]) -> None:
    """Fill the replay buffer, where the model has one.

    Raises:
        ValueError: it is of another size.
        KeyError: the checkpoint holds none.
    """
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None:
        return
    played = state["num_timesteps"] // model.n_envs
    with zipfile.ZipFile(path) as archive:
        for name in _REPLAYED:
            with archive.open(_part(name)) as part:
                kept = np.lib.format.read_array(part, allow_pickle=False)
            array = getattr(buffer, name)
            if kept.shape != (min(played, len(array)), *array.shape[1:]):
                raise ValueError(f"its replay buffer's {name} are of shape {kept.shape}")
            array[: len(kept)] = kept
    buffer.full, buffer.pos = played >= buffer.buffer_size, played % buffer.buffer_size
