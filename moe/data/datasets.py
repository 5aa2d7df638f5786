"""The two data sets: Fashion-MNIST for vision, and the running Python's standard library for language.

Nothing is downloaded. Vision reads the complete Fashion-MNIST where its files are installed and a shipped
subset elsewhere. Language reads the text every Python brings along: its reference and docstrings are
``prose``, its source without docstrings and comments is ``code``, and the step from one to the other is a
distribution shift. Both depend on the machine (complete set or subset, Python release), so results should
record `describe`.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moe.data.text import language_bytes
from moe.errors import DataCorruptError, DataMissingError

Task = Literal["vision", "language"]
Domain = Literal["prose", "code"]
Split = Literal["train", "validation", "test"]
"""``validation`` is the end of ``train``, as long as ``test``, to choose settings of test-time training by.
The shipped models were trained on all of ``train``: they know its images and prose, but no code at all."""

VISION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_BYTES = 28 * 28
SUBSET_SIZE: dict[Split, int] = {"train": 10_000, "test": 5_000}  # images, the same number of every class

FULL_FOLDER_VARIABLE = "THERMALMOE_DATA"
SYSTEM_FULL_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SUBSET_FOLDER = Path(__file__).parent / "files" / "fashion_mnist"
SHA256 = {  # of the unpacked bytes: MNIST itself comes in files of the same names and sizes
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train.xz": "73194a0c06a93deab58b95e00e618cc5c80fb5c9a84df26bbc429eeb3507846a",
    "test.xz": "0a62ba09413158889c7f1e8ba43492db67098c41be02e570099f54959cc26a6f",
}
_FULL_FILES: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def load_vision(split: Split, full: bool | None = None) -> tuple[Tensor, Tensor]:
    """Load Fashion-MNIST (Xiao et al., 2017).

    The complete set (60,000 train, 10,000 test images) is looked for in the folder the environment variable
    ``THERMALMOE_DATA`` names, else where Debian's package ``dataset-fashion-mnist`` puts it. The shipped
    subset (10,000 and 5,000) holds official train images in ``train`` and official test images in ``test``.

    Args:
        split: One of `Split`.
        full: True for the complete set, False for the shipped subset, None for the complete set where found.

    Returns:
        Images, uint8 ``[N, 28, 28]``, and class indices into `VISION_CLASSES`, int64 ``[N]``.

    Raises:
        ValueError: The split is unknown.
        DataMissingError: The complete set was asked for and is not here.
        DataCorruptError: A file does not hold what it should.
    """
    _check("split", split, Split)
    folder = full_vision_folder() if full is None or full else None
    if full and folder is None:
        raise DataMissingError(
            f"no complete Fashion-MNIST in {SYSTEM_FULL_FOLDER}: `apt-get install dataset-fashion-mnist`, or "
            f"set {FULL_FOLDER_VARIABLE} to a folder with its four *-ubyte.gz files, or use the shipped "
            "subset (full=False)"
        )
    stored: Split = "train" if split == "validation" else split
    images, labels = _read_subset(stored) if folder is None else _read_full(folder, stored)
    if split == "validation":
        length = len(load_vision("test", full)[0])
        images, labels = images[-length:], labels[-length:]
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))  # [N, 28, 28], [N]


def load_language(domain: Domain, split: Split) -> Tensor:
    """Load text of the running Python's standard library, as bytes in UTF-8.

    ``prose`` is the language reference (``pydoc_data.topics``) and every docstring; ``code`` is the source
    without docstrings and comments. A file is wholly in one split, its prose and its code in the same one.

    Args:
        domain: ``"prose"`` or ``"code"``.
        split: One of `Split`; ``test`` is at most 256 KiB.

    Returns:
        Byte values, uint8 ``[n]``, in an order that depends on the files' names only.

    Raises:
        ValueError: The domain or split is unknown.
        DataMissingError: This Python comes without its source.
    """
    _check("domain", domain, Domain)
    _check("split", split, Split)
    texts = language_bytes()
    if split == "validation":
        text = texts[domain, "train"][-len(texts[domain, "test"]) :]
    else:
        text = texts[domain, split]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)  # [n]


def data_digest(task: Task, full: bool | None = None) -> str:
    """Return the SHA-256 (hex) of all bytes that loading ``task`` would use.

    Raises:
        ValueError: The task is unknown.
        DataMissingError: As `load_vision` and `load_language`.
        DataCorruptError: As `load_vision`.
    """
    return hashlib.sha256(b"".join(_parts(task, full).values())).hexdigest()


def describe(task: Task, full: bool | None = None) -> dict[str, Any]:
    """Return what identifies the data of ``task``: its source, the sizes in bytes and the digest."""
    parts = _parts(task, full)
    if task == "language":
        source = "standard library of the running Python"
    else:
        is_subset = len(parts["test"]) == SUBSET_SIZE["test"] * (IMAGE_BYTES + 1)
        source = f"Fashion-MNIST, {'shipped subset' if is_subset else 'complete'}"
    return {
        "task": task,
        "source": source,
        "python": platform.python_version(),
        "bytes": {name: len(part) for name, part in parts.items()},
        "sha256": data_digest(task, full),
    }


def full_vision_folder() -> Path | None:
    """Return the folder with the complete Fashion-MNIST, or None where there is none.

    Raises:
        DataMissingError: ``THERMALMOE_DATA`` is set to a folder without it.
    """
    named = os.environ.get(FULL_FOLDER_VARIABLE)
    folder = Path(named) if named else SYSTEM_FULL_FOLDER
    missing = [file for pair in _FULL_FILES.values() for file in pair if not (folder / file).is_file()]
    if not missing:
        return folder
    if named:
        raise DataMissingError(f"{FULL_FOLDER_VARIABLE}={named} lacks {missing}; put them there or unset it")
    return None


def _check(name: str, value: object, known: Any) -> None:
    if value not in get_args(known):
        raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")


def _parts(task: Task, full: bool | None) -> dict[str, bytes]:
    _check("task", task, Task)
    if task == "language":
        return {f"{domain}/{split}": part for (domain, split), part in language_bytes().items()}
    loaded = {split: load_vision(split, full) for split in SUBSET_SIZE}
    return {
        split: x.numpy().tobytes() + y.to(torch.uint8).numpy().tobytes() for split, (x, y) in loaded.items()
    }


def _unpack(path: Path) -> np.ndarray:
    """Return the bytes of a compressed file, uint8 ``[n]``, after a check of their SHA-256."""
    try:
        packed = path.read_bytes()
        raw = gzip.decompress(packed) if path.suffix == ".gz" else lzma.decompress(packed)
    except FileNotFoundError as error:
        raise DataMissingError(f"{path}: part of this package is missing; install it again") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataCorruptError(
            f"{path}: not a whole {path.suffix} file ({error}); install it again"
        ) from error
    if hashlib.sha256(raw).hexdigest() != SHA256[path.name]:
        raise DataCorruptError(
            f"{path}: not Fashion-MNIST (its SHA-256 unpacked is not {SHA256[path.name]}); install it again"
        )
    return np.frombuffer(raw, np.uint8)


@lru_cache
def _read_full(folder: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Read two IDX files: 4 bytes of type and rank, 4 for each size, then the values."""
    images, labels = (_unpack(folder / file) for file in _FULL_FILES[split])
    return images[16:].reshape(-1, 28, 28), labels[8:]


@lru_cache
def _read_subset(split: Split) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.split(_unpack(SUBSET_FOLDER / f"{split}.xz"), [SUBSET_SIZE[split] * IMAGE_BYTES])
    return images.reshape(-1, 28, 28), labels
