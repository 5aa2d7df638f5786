"""Recordings on disk: one compressed file for many of them, rewritten in one step."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from agents.files import write_file
from agents.play.rollout import Recording, empty_rows
from moe.files import DAMAGED
from moe.workload import WORK_DTYPE, WorkStats
from thermoe_env.twin.heat import GPU_DTYPE

_HEADER = "header"
_SIGNED = ("observation", "ranges", "reward", "terms")
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
        ValueError: the file is missing, damaged, of another version, or holds an array of another shape or
            type, or a number that cannot be; names the file and the field.
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
                arrays.setdefault("ranges", np.zeros((2, 0)))  # of an earlier version
                recordings.append(Recording(**plain, **arrays))
                _check(recordings[-1])
            return recordings, header["about"]
    except (OSError, *DAMAGED) as error:
        raise ValueError(f"{path} holds no recordings that this version reads ({error!r})") from error


def _check(recording: Recording) -> None:
    """Refuse what no play records.

    Raises:
        ValueError: names the policy and the field.
    """
    about = f"{recording.policy!r}: "
    steps, n = recording.reward.shape
    whole = np.zeros(n, np.int64)
    wanted = empty_rows(steps, n, recording.tokens_per_expert.shape[2:])
    ranges = np.zeros((2, recording.observation.shape[-1] if recording.ranges.size else 0))
    wanted |= {"ranges": ranges, "seeds": whole, "length": whole, "shut_down": np.zeros(n, bool)}
    for name, like in wanted.items():
        array = getattr(recording, name)
        if name == "observation":  # earlier versions observed other fields, which decoding refuses
            like = np.zeros((steps, n, *array.shape[2:]), like.dtype)
        if name == "gpu":  # and read fewer quantities
            there = [part for part in array.dtype.names or () if part in GPU_DTYPE.fields]
            like = np.zeros((steps, n), [(part, GPU_DTYPE[part]) for part in there])
        if array.dtype != like.dtype or array.shape != like.shape:
            raise ValueError(
                f"{about}{name} is {array.dtype} {array.shape}, it should be {like.dtype} {like.shape}"
            )
        for part in array.dtype.names or (None,):
            values = array if part is None else array[part]
            if not np.all(np.isfinite(values)):
                raise ValueError(f"{about}{part or name} holds a value that is not a number")
            if name not in _SIGNED and np.any(values < 0):
                raise ValueError(f"{about}{part or name} holds a negative value")
    if np.any(recording.length > steps):
        raise ValueError(
            f"{about}length {recording.length.max()} is more than the {steps} intervals there are"
        )
    if not (isinstance(recording.interval_s, float) and 0.0 < recording.interval_s < np.inf):
        raise ValueError(f"{about}interval_s must be a time in s, got {recording.interval_s!r}")
    for name in ("policy", "world", "device"):
        if not isinstance(getattr(recording, name), str):
            raise ValueError(f"{about}{name} must be text, got {getattr(recording, name)!r}")


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
