"""Getting a trained model: tiny ones are shipped, base ones are trained on first use and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch

from moe.checkpoint import TrainingRecord, WeightsError, load_checkpoint, read_record, save_checkpoint
from moe.config import ModelConfig, model_config
from moe.data import data_digest
from moe.model import MoEModel
from moe.train import RECIPES, serving_dtype, train

__all__ = ["CACHE_VARIABLE", "WeightsError", "load_model", "training_record", "weights_path"]

CACHE_VARIABLE = "THERMALMOE_CACHE"
SHIPPED_FOLDER = Path(__file__).parent / "weights"

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
    if cache_dir is None:
        cache_dir = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "thermalmoe")
    return cache_dir / f"{task}-{size}-{_key(config)}.safetensors"


def _key(config: ModelConfig) -> str:
    identity = json.dumps([config.to_dict(), data_digest(config.task)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]
