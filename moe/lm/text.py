"""What all sizes share: the shipped tokenizer, and the documents that are served and scored everywhere.

`moe/lm/shipped/make.py` makes both; the README beside it names the sources.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe.errors import DataCorruptError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHIPPED_FOLDER = Path(__file__).parent / "shipped"
DOMAINS = ("prose", "python", "c", "logs", "tables")
END, END_ID = "<|end|>", 0
"""Closes every text in training."""
DOCUMENT_TOKENS = 1025
"""The context of the models and one token behind it, to predict."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Text that no model of ours was trained on.

    Attributes:
        tokens: Read-only, uint16.  # [N, 1025]
        domain: Index in `DOMAINS`, uint8.  # [N]
    """

    tokens: np.ndarray
    domain: np.ndarray


@cache
def documents(folder: Path = SHIPPED_FOLDER) -> Documents:
    """The held-out documents.

    Raises:
        DataCorruptError: They are missing, damaged, or tokens of another tokenizer than the one beside them.
    """
    path = folder / "documents.npz"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            tokens, domain, made_with = file["tokens"], file["domain"], str(file["tokenizer_sha256"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataCorruptError(f"{path} cannot be read: {error}. {_REMEDY}") from error
    right_types = tokens.dtype == np.uint16 and domain.dtype == np.uint8
    right_shapes = domain.ndim == 1 and tokens.shape == (len(domain), DOCUMENT_TOKENS) and len(domain) > 0
    if not (right_types and right_shapes and domain.max() < len(DOMAINS)):
        raise DataCorruptError(
            f"{path} must hold uint16 tokens [N, {DOCUMENT_TOKENS}] and uint8 domains [N] below "
            f"{len(DOMAINS)}, got {tokens.dtype} {tokens.shape} and {domain.dtype} {domain.shape}. {_REMEDY}"
        )
    if made_with != tokenizer_sha256(folder):
        raise DataCorruptError(
            f"{path} holds tokens of another tokenizer ({made_with[:12]}) than {folder / 'tokenizer.json'} "
            f"({tokenizer_sha256(folder)[:12]}), the tokenizer of another model. {_REMEDY}"
        )
    tokens.setflags(write=False)
    domain.setflags(write=False)
    return Documents(tokens, domain)


@cache
def tokenizer(folder: Path = SHIPPED_FOLDER) -> Tokenizer:
    """The byte-level BPE of all models.

    Raises:
        ImportError: The package `tokenizers` is not installed.
        DataCorruptError: The file is missing or damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text becomes tokens by the package tokenizers: pip install tokenizers") from error
    text = _read(folder / "tokenizer.json").decode(errors="replace")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the package raises no narrower class
        raise DataCorruptError(f"{folder / 'tokenizer.json'} is damaged: {error}. {_REMEDY}") from error


@cache
def bytes_per_token(folder: Path = SHIPPED_FOLDER) -> np.ndarray:
    """How many bytes of text each token stands for, none for the end token, int64.  # [V].

    Raises:
        DataCorruptError: The tokenizer's file is missing or damaged.
    """
    path = folder / "tokenizer.json"
    try:
        vocabulary: dict[str, int] = json.loads(_read(path))["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataCorruptError(f"{path} is damaged: {error}. {_REMEDY}") from error
    sizes = np.zeros(len(vocabulary), np.int64)
    for token, number in vocabulary.items():
        sizes[number] = 0 if number == END_ID else len(token)  # byte-level: a character stands for a byte
    sizes.setflags(write=False)
    return sizes


@cache
def tokenizer_sha256(folder: Path = SHIPPED_FOLDER) -> str:
    """Digest of the tokenizer's file; what was encoded or trained with another one does not fit."""
    return hashlib.sha256(_read(folder / "tokenizer.json")).hexdigest()


@cache
def documents_sha256(folder: Path = SHIPPED_FOLDER) -> str:
    """Digest of the documents' tokens and domains; what was scored on others cannot be compared."""
    held_out = documents(folder)
    return hashlib.sha256(held_out.tokens.tobytes() + held_out.domain.tobytes()).hexdigest()


_REMEDY = "Remedy: install the package again, or restore both files."


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataCorruptError(f"{path} cannot be read: {error}. {_REMEDY}") from error
