"""The language models' weights: `small` is shipped, `base` is trained once per machine by `python -m moe.lm`.

A file holds the model, its matrices in bfloat16, and the *reference*: for each token of the shipped documents
whether the model as trained (its own top_k, routing bias 0) has it right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.device.torch_device import serving_dtype
from moe.lm.config import SIZES, LmConfig, Size
from moe.lm.model import LanguageModel, turn_table
from moe.lm.text import SHIPPED_FOLDER, documents, documents_sha256, tokenizer_sha256
from moe.training.checkpoint import (
    WeightsError,
    cache_folder,
    check_config,
    file_sha256,
    load_tensors,
    read_record,
    save_tensors,
)

_REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class LmRecord:
    """Where weights come from and how good they are."""

    config: dict[str, Any]
    """Fields of `LmConfig`."""
    recipe: dict[str, Any]
    """Fields of `Recipe`; `training` says what came of it."""
    seed: int
    training: dict[str, Any]
    """Steps, tokens, seconds, losses: what `moe.lm.fit.train` records."""
    text: dict[str, Any]
    """Of the training: what `moe.lm.corpus.Corpus.record` holds."""
    tokenizer_sha256: str
    documents_sha256: str
    date: str
    """UTC, ISO 8601."""
    machine: str
    """Device that trained it."""
    torch: str
    quality: dict[str, Any]
    """On the shipped documents: what `moe.lm.quality.measure_quality` returns."""
    compared: dict[str, Any]
    """The same of models trained beside it by the same recipe: `dense`, of the same active width, and
    `top_k=2`; none where that was not asked for."""


def weights_path(size: Size, folder: Path | None = None) -> Path:
    """Where the weights of a size are or would be.

    Args:
        size: `small` or `base`.
        folder: None means the package for `small`, and `$THERMALMOE_CACHE` or `~/.cache/thermalmoe` for
            `base`, whose name follows its shape, the tokenizer and the documents.
    """
    if size == "small":
        return (folder or SHIPPED_FOLDER) / "small.safetensors"
    return (folder or cache_folder()) / f"generate-base-{_key(SIZES[size][0])}.safetensors"


def load_model(size: Size, device: torch.device | str, folder: Path | None = None) -> LanguageModel:
    """A trained model in serving types: matrices bfloat16 on CUDA, float32 on a CPU. Never trains.

    Args:
        size: `small` or `base`.
        device: Where the model goes.
        folder: of the weights, see `weights_path`.

    Raises:
        WeightsError: There are no such weights, or they are damaged, or of another model, tokenizer or
            documents.
    """
    device = torch.device(device)
    path, config = _checked(size, folder)
    with torch.device("meta"):
        model = LanguageModel(config, serving_dtype(device))
    tensors = _tensors(path, size, model)
    del tensors[_REFERENCE]
    model.load_state_dict(tensors, assign=True)
    model.turn = turn_table(config.context, config.head_dim)
    return model.serve().to(device)


def training_record(size: Size, folder: Path | None = None) -> LmRecord:
    """Where a model's weights come from and how good they are.

    Raises:
        WeightsError: There are no such weights, or they are damaged.
    """
    return read_record(weights_path(size, folder), LmRecord, _remedy(size))


def reference(size: Size, folder: Path | None = None) -> np.ndarray:
    """Whether each token but the first of the documents is right under the standard service, bool, [N, 1024].

    It is of the machine and the types of the training; elsewhere other roundings turn single tokens.

    Raises:
        WeightsError: as `load_model`.
    """
    path, config = _checked(size, folder)
    with torch.device("meta"):
        model = LanguageModel(config, torch.float32)
    packed = _tensors(path, size, model)[_REFERENCE]
    return np.unpackbits(packed.numpy(), axis=1).astype(bool)


def identity(size: Size, folder: Path | None = None) -> dict[str, Any]:
    """What makes a model the one it is, as `moe.profiles.Profile.model` holds it.

    Returns:
        Its config; the hash of the documents it serves; the key of both and the tokenizer; and the hash of
        its weights, None where there are none yet.
    """
    config, path = SIZES[size][0], weights_path(size, folder)
    return {
        "key": _key(config),
        "config": asdict(config),
        "data_sha256": documents_sha256(),
        "weights_sha256": file_sha256(path) if path.exists() else None,
    }


def stored_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """A model's tensors as they are stored: matrices in bfloat16, routers and norms in float32."""
    return {
        name: tensor.bfloat16() if tensor.ndim > 1 and not name.endswith("router") else tensor.float()
        for name, tensor in model.state_dict().items()
    }


def save_model(tensors: Mapping[str, Tensor], right: np.ndarray, record: LmRecord, path: Path) -> None:
    """Write weights with their record beside them.

    Args:
        tensors: what `stored_tensors` returns.
        right: the reference, bool.  # [N, 1024]
        record: of the training.
        path: of the weights.
    """
    packed = torch.from_numpy(np.packbits(right, axis=1))
    save_tensors({**tensors, _REFERENCE: packed}, record, path)


def _checked(size: Size, folder: Path | None) -> tuple[Path, LmConfig]:
    """Path and shape of weights that belong to this shape, tokenizer and documents."""
    path, config = weights_path(size, folder), SIZES[size][0]
    record = training_record(size, folder)
    check_config(path, record.config, asdict(config), _remedy(size))
    here = {"tokenizer": tokenizer_sha256(), "documents": documents_sha256()}
    for name, digest in here.items():
        found = getattr(record, f"{name}_sha256")
        if found != digest:
            raise WeightsError(
                f"{path} was trained with another {name} ({found[:12]}) than the shipped one "
                f"({digest[:12]}). {_remedy(size)}"
            )
    return path, config


def _tensors(path: Path, size: Size, model: LanguageModel) -> dict[str, Tensor]:
    n, length = documents().tokens.shape
    expected = {**model.state_dict(), _REFERENCE: torch.empty(n, (length - 1) // 8, device="meta")}
    return load_tensors(path, expected, _remedy(size))


def _remedy(size: Size) -> str:
    if size == "base":
        return "Train it: `python -m moe.lm --size base`"
    return "Remedy: install the package again, or restore both files."


def _key(config: LmConfig) -> str:
    settings = [asdict(config), tokenizer_sha256(), documents_sha256()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
