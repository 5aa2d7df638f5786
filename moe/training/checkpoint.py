"""A trained model on disk: ``NAME.safetensors`` and, beside it, ``NAME.json`` saying what it is.

The JSON is written last and carries the hash of the weights, so a pair is either complete or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe.errors import ThermoeError
from moe.model.config import ModelConfig
from moe.model.transformer import MoEModel, width_cost

SHIPPED_FOLDER = Path(__file__).parent / "shipped"


class WeightsError(ThermoeError):
    """Weights are missing, damaged, or of another model."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Where weights come from and how good they are."""

    config: dict[str, Any]
    """``ModelConfig.to_dict()`` of the model."""
    seed: int
    steps: int
    date: str
    """UTC, ISO 8601."""
    machine: str
    """Device that trained it."""
    torch: str
    data_sha256: str
    quality: dict[str, dict[str, float]]
    """Test quality by top-k, then by measure."""
    energy: dict[str, Any] | None = None
    """Energy in the loss: its final ``lambda``, the ``budget`` or null, the ``expert_cost`` of each expert
    and the ``cost_source``; null where the training left energy out."""


def save_checkpoint(model: MoEModel, record: TrainingRecord, weights_path: Path) -> None:
    """Write ``weights_path`` and the JSON beside it; an interruption leaves the old files or the new."""
    weights_path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with _replacing(weights_path) as part:
        save_file(tensors, part)
        digest = _sha256(part)
    with _replacing(_json_path(weights_path)) as part:
        part.write_text(
            json.dumps({**asdict(record), "weights_sha256": digest}, indent=2) + "\n", encoding="utf-8"
        )


def load_checkpoint(weights_path: Path, config: ModelConfig | None = None) -> tuple[MoEModel, TrainingRecord]:
    """Read a model to the CPU, in the types it was stored in.

    Args:
        weights_path: Its weights; the JSON lies beside them.
        config: The shape it must have; None takes the shape on record.

    Raises:
        WeightsError: A file is missing or damaged, or holds another model.
    """
    record = read_record(weights_path)
    if config is None:
        config = _recorded_config(weights_path, record)
    if record.config != config.to_dict():
        found, wanted = record.config, config.to_dict()
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise WeightsError(f"{_json_path(weights_path)} is of another model: {differing} differ. {_REMEDY}")
    try:
        tensors = load_file(weights_path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{weights_path} cannot be read: {error}. {_REMEDY}") from error
    with torch.device("meta"):
        model = MoEModel(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise WeightsError(f"{weights_path} lacks tensor {name!r}. {_REMEDY}")
        if name not in expected:
            raise WeightsError(f"{weights_path} holds tensor {name!r}, which the model has not. {_REMEDY}")
        if tensors[name].shape != expected[name].shape:
            shapes = f"shape {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            raise WeightsError(f"{weights_path}: tensor {name!r} has {shapes}. {_REMEDY}")
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"{weights_path}: tensor {name!r} is not finite. {_REMEDY}")
    model.load_state_dict(tensors, assign=True)
    model.expert_cost = width_cost(config)  # not stored: it follows from the config
    return model, record


def read_record(weights_path: Path) -> TrainingRecord:
    """Read the JSON of a checkpoint and verify that it belongs to the weights.

    Raises:
        WeightsError: A file is missing or damaged, or the two do not belong together.
    """
    path = _json_path(weights_path)
    for needed in (weights_path, path):
        if not needed.is_file():
            raise WeightsError(f"{needed} does not exist. {_REMEDY}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}. {_REMEDY}") from error
    known = {field.name for field in fields(TrainingRecord)} | {"weights_sha256"}
    if not isinstance(values, dict) or set(values) != known:
        raise WeightsError(f"{path} must be an object with exactly the fields {sorted(known)}. {_REMEDY}")
    if values.pop("weights_sha256") != _sha256(weights_path):
        raise WeightsError(f"{weights_path} is not the file that {path.name} describes. {_REMEDY}")
    return TrainingRecord(**values)


def _recorded_config(weights_path: Path, record: TrainingRecord) -> ModelConfig:
    try:
        return ModelConfig.from_dict(record.config)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{_json_path(weights_path)}: {error}. {_REMEDY}") from error


_REMEDY = "Remedy: train again with `python -m moe.training`, or restore both files."


def _json_path(weights_path: Path) -> Path:
    return weights_path.with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that becomes ``path`` if the block succeeds."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
