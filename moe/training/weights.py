"""Getting a trained model: tiny ones are shipped, base ones are trained on first use and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from moe.data.datasets import data_digest
from moe.device.torch_device import serving_dtype
from moe.hf.runner import SIZE as HF_SIZE
from moe.hf.runner import name_of
from moe.model.config import ModelConfig, model_config
from moe.model.transformer import MoEModel
from moe.profiles import Profile, ProfileError
from moe.training.checkpoint import (
    CACHE_VARIABLE,
    SHIPPED_FOLDER,
    TrainingRecord,
    WeightsError,
    cache_folder,
    file_sha256,
    load_checkpoint,
    read_record,
    save_checkpoint,
)
from moe.training.fit import train
from moe.training.recipes import RECIPES

__all__ = [
    "CACHE_VARIABLE", "WeightsError", "check_profile", "identity", "load_model", "training_record",
    "weights_path",
]  # fmt: skip

_log = logging.getLogger(__name__)


def load_model(task: str, size: str, device: torch.device | str, cache_dir: Path | None = None) -> MoEModel:
    """Return a trained model in eval mode with frozen weights: bfloat16 matrices on CUDA, float32 on a CPU.

    A ``base`` model that is not in the cache is trained first, which takes minutes on a data-centre GPU.

    Args:
        task: ``"vision"`` or ``"language"``.
        size: ``"tiny"`` or ``"base"``.
        device: Where the model goes, and where it is trained.
        cache_dir: Folder of trained models; None means ``$THERMALMOE_CACHE`` or ``~/.cache/thermalmoe``.

    Raises:
        WeightsError: The weights are damaged or of another model.
        ValueError: The task or size is unknown.
    """
    device = torch.device(device)
    config = model_config(task, size)
    path = weights_path(task, size, cache_dir)
    if size == "base" and not path.with_suffix(".json").exists():
        _log.warning("no trained %s-base model at %s: training one now on %s", task, path, device)
        save_checkpoint(*train(config, RECIPES[config.task, "base"], device), path)
    model, _ = load_checkpoint(path, config)
    return model.requires_grad_(False).eval().cast_weights(serving_dtype(device)).to(device)


def training_record(task: str, size: str, cache_dir: Path | None = None) -> TrainingRecord:
    """Return where a model's weights come from and their quality by top-k.

    Raises:
        WeightsError: There are no such weights, or they are damaged.
    """
    return read_record(weights_path(task, size, cache_dir))


def weights_path(task: str, size: str, cache_dir: Path | None = None) -> Path:
    """Return where a model's weights are or would be; a base model's name follows its config and data."""
    config = model_config(task, size)
    if size == "tiny":
        return SHIPPED_FOLDER / f"{task}-tiny.safetensors"
    return (cache_dir or cache_folder()) / f"{task}-{size}-{_key(config)}.safetensors"


def identity(task: str, size: str, cache_dir: Path | None = None) -> dict[str, Any]:
    """What makes a model the one it is, as `moe.profiles.Profile.model` holds it.

    Returns:
        Its config; the hash of its data; the key of both; and the hash of its weights, None where a base
        model is not trained yet.
    """
    config, path = model_config(task, size), weights_path(task, size, cache_dir)
    return {
        "key": _key(config),
        "config": config.to_dict(),
        "data_sha256": data_digest(config.task),
        "weights_sha256": file_sha256(path) if path.exists() else None,
    }


def check_profile(profile: Profile, cache_dir: Path | None = None) -> None:
    """Refuse a profile of another model or of other data than are used here.

    The weights of a tiny model are shipped and must be those that were measured. A base model is trained on
    every machine anew: it is the same one when config and data are, and other weights are logged.

    Raises:
        ProfileError: The profile was measured with another model, other data or other shipped weights.
    """
    if profile.size == HF_SIZE:
        raise ProfileError(
            f"the profile of {profile.device} was measured with {name_of(profile)}, which is none of the "
            "product's own models: name the checkpoint too (--model FOLDER), or another profile"
        )
    here = identity(profile.task, profile.size, cache_dir)
    measured = profile.model
    name = f"{profile.task}-{profile.size}"
    for field in ("config", "data_sha256", "weights_sha256"):
        if here[field] == measured[field]:
            continue
        if field == "config":
            differing = sorted(k for k in here[field] if here[field][k] != measured[field].get(k))
            found = {k: (measured[field].get(k), here[field][k]) for k in differing}
            what = f"a model whose config differs in {found} (measured, here)"
        else:
            what = f"{field} {_short(measured[field])}, here it is {_short(here[field])}"
        if field == "weights_sha256" and profile.size == "base":
            _log.warning(
                "the profile of %s was measured with another training of %s (%s): its quality may differ "
                "by what training leaves to chance",
                profile.device, name, what,
            )  # fmt: skip
            continue
        raise ProfileError(
            f"the profile of {name} on {profile.device} was measured with {what}; measure it again with "
            f"`python -m moe.profiling --task {profile.task} --size {profile.size} --device ... --out ...`"
        )


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none yet"


def _key(config: ModelConfig) -> str:
    identity = json.dumps([config.to_dict(), data_digest(config.task)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]
