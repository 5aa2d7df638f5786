"""Files that commands keep: read where they are whole and of the right kind, refused by name elsewhere."""

from __future__ import annotations

import errno
import json
import os
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import DataCorruptError

DAMAGED = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What reading a cut, damaged or foreign archive raises, beside `OSError`; of `zipfile`, NumPy and JSON."""


def refuse_unwritable(path: Path) -> None:
    """Make the folder of a file that is written after long work; refuse now what would be refused then.

    Raises:
        OSError: no file can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def read_json(path: Path, remedy: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: of the file.
        remedy: what to do where it is refused.
        keys: what it has to hold, besides other keys.

    Raises:
        DataCorruptError: it is cut, no JSON, no object, or lacks a key; names the file and the remedy.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataCorruptError(f"{path} is no JSON ({error}): {remedy}") from error
    if not isinstance(values, dict) or not set(keys) <= set(values):
        lacking = sorted(set(keys) - set(values)) if isinstance(values, dict) else "an object of keys"
        raise DataCorruptError(f"{path} is not what it should be, it lacks {lacking}: {remedy}")
    return values


def read_array(path: Path, remedy: str) -> np.ndarray:
    """Read an array that `numpy.save` wrote.

    Raises:
        DataCorruptError: it is cut, or something else; names the file and the remedy.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except DAMAGED as error:
        raise DataCorruptError(f"{path} is no whole NumPy array ({error}): {remedy}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: after an interruption it is the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written, for its rights or for want of space; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may write a file
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
