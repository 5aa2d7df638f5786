"""A trained model on disk: ``NAME.safetensors`` and, beside it, ``NAME.json`` saying what it is.

The JSON is written last and carries the hash of the weights, so a pair is either complete or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.errors import ThermoeError
from moe.model.config import ModelConfig
from moe.model.transformer import MoEModel, width_cost

SHIPPED_FOLDER = Path(__file__).parent / "shipped"
CACHE_VARIABLE = "THERMALMOE_CACHE"
REMEDY = "Remedy: train again with `python -m moe.training`, or restore both files."

R = TypeVar("R")


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
    save_tensors(model.state_dict(), record, weights_path)


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
    check_config(weights_path, record.config, config.to_dict())
    with torch.device("meta"):
        model = MoEModel(config)
    model.load_state_dict(load_tensors(weights_path, model.state_dict()), assign=True)
    model.expert_cost = width_cost(config)  # not stored: it follows from the config
    return model, record


def save_tensors(tensors: Mapping[str, Tensor], record: Any, weights_path: Path) -> None:
    """Write tensors, and beside them a record (a dataclass of plain values) with their hash."""
    weights_path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(weights_path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        digest = file_sha256(part)
    with _replacing(_json_path(weights_path)) as part:
        part.write_text(
            json.dumps({**asdict(record), "weights_sha256": digest}, indent=2) + "\n", encoding="utf-8"
        )


def load_tensors(
    weights_path: Path, expected: Mapping[str, Tensor], remedy: str = REMEDY
) -> dict[str, Tensor]:
    """Read tensors to the CPU.

    Args:
        weights_path: What `save_tensors` wrote.
        expected: Tensors of the shapes it must hold, on any device.
        remedy: Last sentence of errors.

    Raises:
        WeightsError: It cannot be read, holds other tensors, or one that is not finite.
    """
    try:
        tensors = load_file(weights_path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{weights_path} cannot be read: {error}. {remedy}") from error
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise WeightsError(f"{weights_path} lacks tensor {name!r}. {remedy}")
        if name not in expected:
            raise WeightsError(f"{weights_path} holds tensor {name!r}, which the model has not. {remedy}")
        if tensors[name].shape != expected[name].shape:
            shapes = f"shape {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            raise WeightsError(f"{weights_path}: tensor {name!r} has {shapes}. {remedy}")
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"{weights_path}: tensor {name!r} is not finite. {remedy}")
    return tensors


def read_record(weights_path: Path, kind: type[R] = TrainingRecord, remedy: str = REMEDY) -> R:
    """Read the JSON of a checkpoint and verify that it belongs to the weights.

    Args:
        weights_path: The weights.
        kind: Dataclass of the record.
        remedy: Last sentence of errors.

    Raises:
        WeightsError: A file is missing or damaged, or the two do not belong together.
    """
    path = _json_path(weights_path)
    for needed in (weights_path, path):
        if not needed.is_file():
            raise WeightsError(f"{needed} does not exist. {remedy}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}. {remedy}") from error
    known = {field.name for field in fields(kind)} | {"weights_sha256"}  # pyright: ignore[reportArgumentType]
    if not isinstance(values, dict) or set(values) != known:
        raise WeightsError(f"{path} must be an object with exactly the fields {sorted(known)}. {remedy}")
    if values.pop("weights_sha256") != file_sha256(weights_path):
        raise WeightsError(f"{weights_path} is not the file that {path.name} describes. {remedy}")
    return kind(**values)


def check_config(
    weights_path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str = REMEDY
) -> None:
    """Refuse weights of another shape than the one wanted.

    Raises:
        WeightsError: It names the fields that differ.
    """
    if found != wanted:
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise WeightsError(f"{_json_path(weights_path)} is of another model: {differing} differ. {remedy}")


def cache_folder() -> Path:
    """Where what is trained on this machine is kept: ``$THERMALMOE_CACHE`` or ``~/.cache/thermalmoe``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "thermalmoe")


def file_sha256(path: Path) -> str:
    """Digest of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded_config(weights_path: Path, record: TrainingRecord) -> ModelConfig:
    try:
        return ModelConfig.from_dict(record.config)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{_json_path(weights_path)}: {error}. {REMEDY}") from error


def _json_path(weights_path: Path) -> Path:
    return weights_path.with_suffix(".json")


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
