"""Recordings on disk: one compressed file for many of them, rewritten in one step."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from agents.files import write_file
from agents.play.rollout import Recording
from moe.workload import WORK_DTYPE, WorkStats

_HEADER = "header"
_LATER = ("ttt_refused", "ttt_left_out", "ttt_rolled_back", "budget_share")
"""Fields of the work that recordings of earlier versions lack: nothing refused, adaptation was unlimited."""


def save_recordings(path: Path, recordings: Sequence[Recording], about: dict[str, Any]) -> None:
    """Write recordings into one NumPy archive that needs no pickle.

    Args:
        path: the file; after an interruption it is the old one or the new one.
        recordings: whole ones.
        about: what else to keep with them, plain JSON.

    Raises:
        ValueError: a recording that an error cut short.
    """
    arrays: dict[str, Any] = {}
    plain: list[dict[str, Any]] = []
    for i, recording in enumerate(recordings):
        if recording.error is not None:
            raise ValueError(
                f"{recording.policy}, seed {recording.seeds[-1]} was cut short by {recording.error!r}; "
                "only whole recordings are kept"
            )
        values = {f.name: getattr(recording, f.name) for f in fields(Recording) if f.name != "error"}
        arrays |= {f"{i}/{name}": v for name, v in values.items() if isinstance(v, np.ndarray)}
        plain.append({name: v for name, v in values.items() if not isinstance(v, np.ndarray)})
    arrays[_HEADER] = np.array(json.dumps({"about": about, "recordings": plain}))
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_file(path, file.getvalue())


def load_recordings(path: Path) -> tuple[list[Recording], dict[str, Any]]:
    """Read what `save_recordings` wrote.

    Returns:
        (recordings, what was kept with them)

    Raises:
        ValueError: the file is missing, damaged, or of another version; names it.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(str(archive[_HEADER]))
            recordings = []
            for i, plain in enumerate(header["recordings"]):
                prefix = f"{i}/"
                own = [name for name in archive.files if name.startswith(prefix)]
                arrays = {name[len(prefix) :]: archive[name] for name in own}
                arrays["work"] = _of_today(arrays["work"])
                recordings.append(Recording(**plain, **arrays))
            return recordings, header["about"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no recordings that this version reads ({error!r})") from error


def _of_today(work: np.ndarray) -> np.ndarray:
    """Recorded work with the fields that have been added since, at their defaults.

    Raises:
        ValueError: another field is missing.
    """
    names = work.dtype.names or ()
    full, defaults = np.zeros(work.shape, WORK_DTYPE), WorkStats()
    for name in WORK_DTYPE.names or ():
        full[name] = getattr(defaults, name) if name in _LATER and name not in names else work[name]
    return full
