"""The profile: what one model costs and answers on one machine, as measured (`python -m moe.profile`).

A profile is a JSON file. Every cell in it was measured; a cell that could not be measured is absent,
and the file is refused. Energies are per micro-batch and above the idle power of the device.
Index letters: N batch sizes, K expert counts, R routing biases, S input shifts, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class ProfileError(ValueError):
    """A profile file cannot be used; the message names the file, the field and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured tables of one (model, machine). Adaptation tables are None for a task without it."""

    task: str
    size: str
    device: str
    """Name of the device as its driver gives it."""
    provenance: dict[str, Any]
    """Where, when, with what versions and seed it was measured, and with what spread."""
    model_sha256: str
    batch_size: np.ndarray
    """[N] measured batch sizes, ascending."""
    expert_count: np.ndarray
    """[K] experts per token, ascending."""
    routing_bias: np.ndarray
    """[R] ascending from 0."""
    shifts: tuple[str, ...]
    """[S] names of the input shifts; the first is "clean"."""
    latency_s: np.ndarray
    """[N, K, R] time of a micro-batch at full clock."""
    energy_j: np.ndarray | None
    """[N, K, R] energy of a micro-batch above idle; None where no meter exists."""
    idle_power_w: float | None
    ttt_latency_s: np.ndarray | None
    """[N, K] time of one adaptation step after a micro-batch."""
    ttt_energy_j: np.ndarray | None
    """[N, K] energy of one adaptation step above idle."""
    accuracy: np.ndarray
    """[S, K, R, 2] share of right answers before and after adaptation to the shift."""
    confidence: np.ndarray
    """[S, K, R, 2] mean probability of the answer given."""
    entropy: np.ndarray
    """[S, K, R, 2] mean entropy of the answer over its maximum."""
    adapt_rate: np.ndarray
    """[S] share of the remaining gain that one adaptation step brings."""
    carry_over: float
    """Share of the adaptation's gain that survives a change of shift (negative: it harms)."""
    expert_share: np.ndarray
    """[K, R, L, E] share of a layer's routed tokens that each expert takes."""

    def latency_at(self, batch_size: float, expert_count: int, routing_bias: float = 0.0) -> float:
        """Latency of a micro-batch in seconds, interpolated as the twin does."""
        return self._at(self.latency_s, batch_size, expert_count, routing_bias)

    def active_power_w(self, batch_size: float, expert_count: int, routing_bias: float = 0.0) -> float:
        """Mean power above idle while micro-batches of this kind run back to back."""
        if self.energy_j is None:
            raise ProfileError(
                f"the profile of {self.device} holds no energies; measure one on a card with NVML"
            )
        energy = self._at(self.energy_j, batch_size, expert_count, routing_bias)
        return energy / self.latency_at(batch_size, expert_count, routing_bias)

    def _at(self, table: np.ndarray, batch_size: float, expert_count: int, routing_bias: float) -> float:
        k = level_index("expert_count", expert_count, self.expert_count)
        column = [np.interp(routing_bias, self.routing_bias, row) for row in table[:, k, :]]  # [N]
        return float(np.exp(np.interp(np.log(batch_size), np.log(self.batch_size), np.log(column))))


def level_index(knob: str, value: float, levels: np.ndarray) -> int:
    """Position of `value` among the measured `levels` of a knob; an unmeasured one is refused."""
    hits = np.flatnonzero(np.asarray(levels) == value)
    if not len(hits):
        raise ProfileError(f"{knob}={value} was not measured; the profile holds {list(np.asarray(levels))}")
    return int(hits[0])


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile; anything doubtful raises `ProfileError` naming file and field."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ProfileError(f"{path}: no such profile; measure one with `python -m moe.profile`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not a JSON document ({error}); measure it again") from error
    known = {f.name for f in dataclasses.fields(Profile)}
    if not isinstance(raw, dict) or set(raw) != known:
        odd = sorted(set(raw) ^ known) if isinstance(raw, dict) else "no mapping"
        raise ProfileError(
            f"{path}: missing or unknown fields {odd}; a profile holds exactly {sorted(known)}"
        )
    arrays = {f.name for f in dataclasses.fields(Profile) if "ndarray" in str(f.type)}
    values: dict[str, Any] = {
        name: _as_array(path, name, raw[name]) if name in arrays else raw[name] for name in known
    }
    if not isinstance(raw["shifts"], list) or not raw["shifts"]:
        raise ProfileError(f"{path}: shifts must list the names of the input shifts, got {raw['shifts']!r}")
    values["shifts"] = tuple(raw["shifts"])
    profile = Profile(**values)
    _check(path, profile)
    return profile


def save_profile(profile: Profile, path: str | Path) -> None:
    """Check and write a profile in one step: the file is whole or absent."""
    path = Path(path)
    _check(path, profile)
    document = {f.name: _as_json(getattr(profile, f.name)) for f in dataclasses.fields(Profile)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(document, indent=1))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _as_array(path: Path, name: str, value: Any) -> np.ndarray | None:
    if value is None:
        return None
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ProfileError(
            f"{path}: {name} is ragged, or has a cell missing or not a number ({error})"
        ) from error


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return json.loads(json.dumps(value.tolist()), parse_float=lambda text: float(f"{float(text):.6g}"))
    return value


def _check(path: Path, p: Profile) -> None:
    for name in ("batch_size", "expert_count", "routing_bias", "expert_share"):
        table = getattr(p, name)
        if table is None or table.size == 0 or table.ndim != (4 if name == "expert_share" else 1):
            raise ProfileError(
                f"{path}: {name} is absent, empty or of the wrong rank; measure the profile again"
            )
    n, k, r, s = len(p.batch_size), len(p.expert_count), len(p.routing_bias), len(p.shifts)
    shapes = {
        "latency_s": (n, k, r),
        "energy_j": (n, k, r),
        "ttt_latency_s": (n, k),
        "ttt_energy_j": (n, k),
        "accuracy": (s, k, r, 2),
        "confidence": (s, k, r, 2),
        "entropy": (s, k, r, 2),
        "adapt_rate": (s,),
        "expert_share": (k, r, *p.expert_share.shape[2:]),
    }
    for name, shape in shapes.items():
        table = getattr(p, name)
        if table is None:
            if name in ("energy_j", "ttt_latency_s", "ttt_energy_j"):
                continue
            raise ProfileError(f"{path}: {name} is absent; measure it with `python -m moe.profile`")
        if table.shape != shape:
            raise ProfileError(
                f"{path}: {name} has shape {table.shape}, the axes say {shape}: a cell is missing"
            )
        if not np.all(np.isfinite(table)) or np.any(table < 0.0):
            where = np.argwhere(~np.isfinite(table) | (table < 0.0))[0].tolist()
            raise ProfileError(f"{path}: {name}{where} is negative or not a number; measure that cell again")
    for name in ("latency_s", "energy_j", "ttt_latency_s", "ttt_energy_j"):
        table = getattr(p, name)
        if table is not None and np.any(table <= 0.0):
            raise ProfileError(f"{path}: {name} holds a zero; nothing runs in no time at no cost")
    for name in ("batch_size", "expert_count", "routing_bias"):
        if np.any(np.diff(getattr(p, name)) <= 0):
            raise ProfileError(f"{path}: {name} must ascend, got {getattr(p, name).tolist()}")
        if name != "routing_bias" and getattr(p, name)[0] < 1:
            raise ProfileError(f"{path}: {name} must start at 1 or above, got {getattr(p, name)[0]}")
    for name in ("accuracy", "confidence", "entropy", "adapt_rate", "expert_share"):
        if np.any(getattr(p, name) > 1.0 + 1e-6):
            raise ProfileError(f"{path}: {name} holds a value above 1")
    if p.routing_bias[0] != 0.0 or p.shifts[0] != "clean":
        raise ProfileError(f'{path}: routing_bias must start at 0 and shifts with "clean"')
    if (p.energy_j is None) != (p.idle_power_w is None):
        raise ProfileError(f"{path}: energy_j and idle_power_w are measured together or not at all")
    if (p.ttt_energy_j is None) != (p.ttt_latency_s is None or p.energy_j is None):
        raise ProfileError(
            f"{path}: ttt_energy_j is measured where ttt_latency_s and energy_j are, and only there"
        )
    if p.idle_power_w is not None and not _within(p.idle_power_w, 1e-3, 1e5):
        raise ProfileError(f"{path}: idle_power_w must be above 0, got {p.idle_power_w}")
    if not _within(p.carry_over, -10.0, 1.0):
        raise ProfileError(
            f"{path}: carry_over must lie in [-10, 1], got {p.carry_over}; measure the profile again"
        )
    if not np.allclose(p.expert_share.sum(axis=-1), 1.0, atol=1e-3):
        raise ProfileError(f"{path}: expert_share does not sum to 1 over the experts of a layer")


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and low <= value <= high
