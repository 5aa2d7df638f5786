"""Request streams: how many requests arrive when, and which input shift is in force.

Load is a fraction of the reference capacity (requests/s of the standard service on this machine), so
a scenario means the same on a laptop and on a data-centre card. A stream is drawn once per episode
from its seed: the live service and the twin play the same one.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from moe.queueing import SLOT_S

_SLOTS_PER_S = round(1.0 / SLOT_S)
_LONGEST_TRACE_S = 31 * 86400.0


class TraceError(ValueError):
    """A trace file cannot be used; the message names the file, the line and the reason."""


@dataclass(frozen=True, kw_only=True)
class TrafficConfig:
    """Arrival process of a scenario. Loads are fractions of the reference capacity."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: str = "bursts"
    """`poisson` (constant mean), `bursts` (Markov-modulated), `diurnal` (sine) or `trace` (CSV)."""
    low_load: float = 0.2
    high_load: float = 1.3
    levels: int = 6
    """`bursts`: equally spaced load levels between low and high."""
    dwell_s: float = 15.0
    """`bursts`: mean time at one level (exponential, at least 3 s)."""
    period_s: float = 240.0
    """`diurnal`: length of a day."""
    interactive_share: float = 0.5
    trace: str | None = None
    """`trace`: CSV with TIMESTAMP,ContextTokens,GeneratedTokens; scaled to a mean of (low+high)/2."""
    shifts: tuple[int, ...] = (0,)
    """Input shifts that take turns (indices into the profile's shifts)."""
    shift_dwell_s: float = 40.0
    """Mean time between changes of shift (exponential, at least a quarter of it)."""

    def __post_init__(self) -> None:
        kinds = ("poisson", "bursts", "diurnal", "trace")
        if self.kind not in kinds:
            raise ValueError(f"traffic.kind must be one of {kinds}, got {self.kind!r}")
        if not 0.0 < self.low_load <= self.high_load:
            raise ValueError(
                f"traffic needs 0 < low_load <= high_load, got {self.low_load}, {self.high_load}"
            )
        if not 0.0 <= self.interactive_share <= 1.0:
            raise ValueError(f"traffic.interactive_share must lie in [0, 1], got {self.interactive_share}")
        if self.levels < 2 or min(self.dwell_s, self.period_s, self.shift_dwell_s) <= 0.0:
            raise ValueError("traffic needs levels >= 2 and dwell_s, period_s, shift_dwell_s > 0")
        if (self.kind == "trace") != (self.trace is not None):
            raise ValueError(
                "traffic.trace names a CSV file for kind 'trace' and is absent for any other kind"
            )
        if not self.shifts:
            raise ValueError("traffic.shifts must name at least one input shift (0 is the clean one)")


@dataclass(frozen=True)
class RequestStream:
    """All requests of one episode."""

    arrivals: np.ndarray
    """int32 [2, slots + 1]: cumulative arrivals per class at the start of each slot."""
    shift_id: np.ndarray
    """int64 [seconds]: input shift in force."""


def draw_stream(config: TrafficConfig, seed: int, seconds: int, capacity_rps: float) -> RequestStream:
    """Draw the stream of one episode.

    Args:
        config: the arrival process.
        seed: everything random in the stream follows from it.
        seconds: length of the episode.
        capacity_rps: requests per second that load 1.0 stands for.
    """
    rng = np.random.default_rng([seed, 1])
    load = _draw_load(config, rng, seconds)  # [seconds]
    rate = np.repeat(load, _SLOTS_PER_S) * capacity_rps * SLOT_S  # [slots]
    share = (config.interactive_share, 1.0 - config.interactive_share)
    arrivals = np.zeros((2, len(rate) + 1), np.int32)
    for c in range(2):
        np.cumsum(rng.poisson(rate * share[c]), out=arrivals[c, 1:])
    return RequestStream(arrivals, _draw_shifts(config, rng, seconds))


def _draw_load(config: TrafficConfig, rng: np.random.Generator, seconds: int) -> np.ndarray:
    middle = 0.5 * (config.low_load + config.high_load)
    t = np.arange(seconds)
    if config.kind == "poisson":
        return np.full(seconds, middle)
    if config.kind == "diurnal":
        phase = rng.uniform(0.0, 2.0 * np.pi)
        swing = 0.5 * (config.high_load - config.low_load)
        return middle + swing * np.sin(2.0 * np.pi * t / config.period_s + phase)
    if config.kind == "trace":
        assert config.trace is not None
        per_second = _trace_per_second(config.trace)
        if len(per_second) < seconds:
            raise TraceError(f"{config.trace}: covers {len(per_second)} s, the episode needs {seconds} s")
        start = rng.integers(0, len(per_second) - seconds + 1)
        return middle * per_second[start : start + seconds]
    levels = np.linspace(config.low_load, config.high_load, config.levels)
    level = rng.integers(config.levels)
    load = np.empty(seconds)
    now = 0
    while now < seconds:
        end = now + max(3, round(rng.exponential(config.dwell_s)))
        load[now:end] = levels[level]
        level = (level + rng.integers(1, config.levels)) % config.levels
        now = end
    return load


def _draw_shifts(config: TrafficConfig, rng: np.random.Generator, seconds: int) -> np.ndarray:
    shift = np.empty(seconds, np.int64)
    choice = rng.integers(len(config.shifts))
    now = 0.0
    while now < seconds:
        end = now + max(config.shift_dwell_s / 4.0, rng.exponential(config.shift_dwell_s))
        shift[round(now) : round(end)] = config.shifts[choice]
        if len(config.shifts) > 1:
            choice = (choice + rng.integers(1, len(config.shifts))) % len(config.shifts)
        now = end
    return shift


@lru_cache(maxsize=4)
def _trace_per_second(path: str) -> np.ndarray:
    """Arrivals per second of a request trace, over their mean, float [seconds]."""
    if not Path(path).is_file():
        raise TraceError(f"{path}: no such trace; traffic.trace must name a CSV file")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or "TIMESTAMP" not in reader.fieldnames:
                raise TraceError(f"{path}: no column TIMESTAMP in the header {reader.fieldnames}")
            rows = [
                (reader.line_num, _timestamp_s(path, reader.line_num, row["TIMESTAMP"])) for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if len(rows) < 2:
        raise TraceError(f"{path}: holds {len(rows)} requests, at least 2 are needed")
    t = np.asarray([time_s for _, time_s in rows])
    if np.any(np.diff(t) < 0):
        line = rows[int(np.argmax(np.diff(t) < 0)) + 1][0]
        raise TraceError(f"{path}, line {line}: time runs backward; sort the trace by TIMESTAMP")
    if t[-1] - t[0] > _LONGEST_TRACE_S:
        raise TraceError(
            f"{path}: spans {(t[-1] - t[0]) / 86400:.0f} days, at most 31 are read; check its dates"
        )
    counts = np.bincount((t - t[0]).astype(np.int64))
    return counts / counts.mean()


def _timestamp_s(path: str, line: int, text: str | None) -> float:
    # Of the public traces some name a zone; the others mean UTC, never a local zone with its summer time.
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError as error:
        raise TraceError(f"{path}, line {line}: TIMESTAMP {text!r} is not an ISO date and time") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
