"""Checkpoints: a Stable-Baselines3 zip that also holds what is needed to continue its training."""

from __future__ import annotations

import base64
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO

from agents.runs import write_file

_STATE = "training_state.json"
# Rewritten at every update's start, and pickled if they were kept.
_LEFT_OUT = ["_last_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"]


class CheckpointError(RuntimeError):
    """A run cannot be continued; the message names the file and the remedy."""


def save_model(model: PPO, path: Path, progress: dict[str, Any] | None = None) -> None:
    """Write a model in one step; with `progress`, as a checkpoint that training can continue from.

    Args:
        model: between two updates.
        path: a zip; any Stable-Baselines3 can read it.
        progress: what the run remembers beside the model, as JSON.
    """
    buffer = io.BytesIO()
    model.save(buffer, exclude=_LEFT_OUT)
    if progress is not None:
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(_STATE, json.dumps({**progress, **_counters(model)}))
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
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is cut, or not the checkpoint of a run ({error}); {remedy}") from error


def restore(model: PPO, path: Path, state: dict[str, Any]) -> None:
    """Put an untrained model, and the process's random generators, where the checkpoint was saved.

    Nothing is unpickled: the model is built from its configuration, only tensors and numbers are read.
    """
    try:
        model.set_parameters(str(path), device="cpu")
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit this run's config.yaml and scenario.yaml, or it is of a version with other "
            f"observations: start the run again in another folder ({error})"
        ) from error
    model.num_timesteps, model._n_updates = state["num_timesteps"], state["n_updates"]
    np.random.set_state(tuple(state["numpy_rng"]))  # noqa: NPY002  (Stable-Baselines3 draws from it)
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch_rng"])), dtype=torch.uint8))


def _counters(model: PPO) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "numpy_rng": [name, np.asarray(keys).tolist(), *rest],
        "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
