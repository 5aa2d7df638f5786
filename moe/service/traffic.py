"""Request streams: how many requests arrive when, and which input shift is in force.

Load is a fraction of the reference capacity (requests/s of the standard service on this machine), so
a scenario means the same on a laptop and on a data-centre card. A stream is drawn once per episode
from its seed, by one compiled function: the live service, the twin and its batches play the same one.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from moe.compiled import inner, jit
from moe.randomness import derive, exponential, integer, poisson, uniform
from moe.ranges import STRICT, Dwell, Number, Seconds, Share, Whole
from moe.service.queueing import SLOT_S
from moe.service.request_trace import TraceError, read_request_trace

Kind = Literal["poisson", "bursts", "diurnal", "trace"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BURSTS, _DIURNAL, _TRACE = (KINDS.index(kind) for kind in ("bursts", "diurnal", "trace"))
_SLOTS_PER_S = round(1.0 / SLOT_S)

Shift = Annotated[Whole, Field(ge=0, le=1000)]
Load = Annotated[Number, Field(gt=0.0, le=1e4)]

MOST_REQUESTS = 2_000_000_000
"""Of an episode: they are counted by int32, with room left for chance."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrafficConfig:
    """Arrival process of a scenario. Loads are fractions of the reference capacity."""

    kind: Kind = "bursts"
    """`poisson` (constant mean), `bursts` (Markov-modulated), `diurnal` (sine) or `trace` (a file)."""
    low_load: Load = 0.2
    high_load: Load = 1.3
    levels: Annotated[Whole, Field(ge=2, le=1000)] = 6
    """`bursts`: equally spaced load levels between low and high."""
    dwell_s: Dwell = 15.0
    """`bursts`: mean time at one level (exponential, at least 3 s)."""
    period_s: Seconds = 240.0
    """`diurnal`: length of a day."""
    interactive_share: Share = 0.5
    trace: str | None = None
    """`trace`: a file in a format that `moe.service.request_trace` reads: that of the Azure LLM inference
    traces, of BurstGPT or of Mooncake. Requests per second are those of the trace, scaled so that the load of
    the whole trace has mean (low_load + high_load) / 2; an episode begins at a random second. Stamps coarser
    than a second, as to the minute, give the mean load of their step. A trace of less than one request per
    second (or per step) is refused: scaled up, single requests would be spikes. Token counts are for
    services of tokens (`moe.service.generate.lengths`)."""
    shifts: Annotated[tuple[Shift, ...], Field(min_length=1, max_length=1000)] = (0,)
    """Input shifts that take turns (indices into the profile's shifts)."""
    shift_dwell_s: Dwell = 40.0
    """Mean time between changes of shift (exponential, at least a quarter of it)."""

    def __post_init__(self) -> None:
        if self.low_load > self.high_load:
            raise ValueError(f"traffic needs low_load <= high_load, got {self.low_load}, {self.high_load}")
        if (self.kind == "trace") != (self.trace is not None):
            raise ValueError("traffic.trace names a file for kind 'trace' and is absent for any other kind")


@dataclasses.dataclass(frozen=True)
class RequestStream:
    """All requests of one episode."""

    arrivals: np.ndarray
    """int32 [2, slots + 1]: cumulative arrivals per class at the start of each slot."""
    shift_id: np.ndarray
    """int64 [seconds]: input shift in force."""


class Traffic(NamedTuple):
    """The arrival process of a scenario, as compiled code reads it."""

    kind: int
    """Position in `KINDS`."""
    low_rps: float
    high_rps: float
    levels: int
    dwell_s: float
    period_s: float
    interactive_share: float
    shifts: np.ndarray  # int64 [shifts]
    shift_dwell_s: float
    trace_rps: np.ndarray  # [seconds of the trace], empty for any other kind


def traffic_of(config: TrafficConfig, seconds: int, capacity_rps: float) -> Traffic:
    """`Traffic` of a configuration, for episodes of `seconds`.

    Raises:
        TraceError: the trace cannot be used, or is shorter than an episode.
        ValueError: an episode could have more requests than are counted.
    """
    trace_rps, peak_rps = np.zeros(0), config.high_load * capacity_rps
    if config.trace is not None:
        path = Path(config.trace)
        rate = _relative_rate(config.trace, path.stat().st_mtime_ns if path.exists() else 0)
        if len(rate) < seconds:
            raise TraceError(
                f"{config.trace}: covers {len(rate)} s, the episode needs {seconds} s: "
                "shorten the episode (episode_s), or give a longer trace"
            )
        trace_rps = 0.5 * (config.low_load + config.high_load) * capacity_rps * rate
        served = np.concatenate(([0.0], np.cumsum(trace_rps)))
        peak_rps = float((served[seconds:] - served[:-seconds]).max()) / seconds
    if not peak_rps * seconds <= MOST_REQUESTS:
        raise ValueError(
            f"traffic.high_load={config.high_load:g} means up to {peak_rps:.3g} requests per second, in "
            f"{seconds} s over {MOST_REQUESTS:.0e}, more than can be counted: lower the loads "
            "or shorten the episode (episode_s)"
        )
    return Traffic(
        KINDS.index(config.kind), config.low_load * capacity_rps, config.high_load * capacity_rps,
        config.levels, config.dwell_s, config.period_s, config.interactive_share,
        np.array(config.shifts, np.int64), config.shift_dwell_s, trace_rps,
    )  # fmt: skip


def draw_stream(config: TrafficConfig, seed: int, seconds: int, capacity_rps: float) -> RequestStream:
    """Draw the stream of one episode.

    Args:
        config: the arrival process.
        seed: everything random in the stream follows from it; in [0, 2**64).
        seconds: length of the episode.
        capacity_rps: requests per second that load 1.0 stands for.
    """
    arrivals = np.zeros((2, seconds * _SLOTS_PER_S + 1), np.int32)
    shift_id = np.zeros(seconds, np.int64)
    fill_stream(traffic_of(config, seconds, capacity_rps), np.uint64(seed), arrivals, shift_id)
    return RequestStream(arrivals, shift_id)


@jit
def fill_stream(traffic, seed, arrivals, shift_id):
    """Draw the stream of one episode into `arrivals` and `shift_id` (see `RequestStream`).

    Args:
        traffic: `Traffic`.
        seed: uint64.
        arrivals: int32 [2, slots + 1].
        shift_id: int64 [seconds].
    """
    counts, course, shifts = _keys(seed)
    seconds = shift_id.shape[0]
    middle, swing = 0.5 * (traffic.low_rps + traffic.high_rps), 0.5 * (traffic.high_rps - traffic.low_rps)
    phase, begin, level, level_end, changes = 0.0, 0, 0, 0, 0
    if traffic.kind == _DIURNAL:
        phase = uniform(course, 0, 0.0, 2.0 * math.pi)
    elif traffic.kind == _TRACE:
        begin = integer(course, 0, traffic.trace_rps.shape[0] - seconds + 1)
    elif traffic.kind == _BURSTS:
        level = integer(course, 0, traffic.levels)
        level_end = _level_s(course, 1, traffic.dwell_s)
    arrivals[0, 0], arrivals[1, 0] = 0, 0
    for second in range(seconds):
        rate = middle
        if traffic.kind == _DIURNAL:
            rate += swing * math.sin(2.0 * math.pi * second / traffic.period_s + phase)
        elif traffic.kind == _TRACE:
            rate = traffic.trace_rps[begin + second]
        elif traffic.kind == _BURSTS:
            if second == level_end:
                changes += 1
                level = (level + 1 + integer(course, 2 * changes, traffic.levels - 1)) % traffic.levels
                level_end += _level_s(course, 2 * changes + 1, traffic.dwell_s)
            rate += swing * (2.0 * level / (traffic.levels - 1) - 1.0)
        for c in range(2):
            share = traffic.interactive_share if c == 0 else 1.0 - traffic.interactive_share
            mean = rate * share * SLOT_S
            root, count = math.sqrt(mean), arrivals[c, second * _SLOTS_PER_S]
            for slot in range(second * _SLOTS_PER_S, (second + 1) * _SLOTS_PER_S):
                count += poisson(counts, 2 * slot + c, mean, root)
                arrivals[c, slot + 1] = count
    _fill_shifts(traffic, shifts, shift_id)


@inner
def _keys(seed):
    """Streams of an episode's counts, course of the load, and shifts."""
    key = derive(seed, np.uint64(1))
    return derive(key, np.uint64(0)), derive(key, np.uint64(1)), derive(key, np.uint64(2))


@inner
def _level_s(key, i, dwell_s):
    """How long a level of load lasts, in whole seconds."""
    return max(3, int(exponential(key, i, dwell_s) + 0.5))


@inner
def _fill_shifts(traffic, key, shift_id):
    """Draw the input shift of every second."""
    shifts, dwell_s = traffic.shifts.shape[0], traffic.shift_dwell_s
    choice, changes = integer(key, 0, shifts), 0
    end = max(0.25 * dwell_s, exponential(key, 1, dwell_s))
    for second in range(shift_id.shape[0]):
        while second + 0.5 >= end:
            changes += 1
            if shifts > 1:
                choice = (choice + 1 + integer(key, 2 * changes, shifts - 1)) % shifts
            end += max(0.25 * dwell_s, exponential(key, 2 * changes + 1, dwell_s))
        shift_id[second] = traffic.shifts[choice]


@lru_cache(maxsize=4)
def _relative_rate(path: str, changed_ns: int) -> np.ndarray:
    """Arrivals per second of a request trace over their mean; kept until the file changes."""
    return read_request_trace(path).relative_rate()
