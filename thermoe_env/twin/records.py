"""What a batch of twin environments is made of: tuples of arrays that its compiled loop reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from thermoe_env.mdp.account import Account
from thermoe_env.twin.service import Serving
from thermoe_env.twin.telemetry import Heating


class BatchState(NamedTuple):
    """What environments [n] are between two intervals. Rows of arrays that a twin may be forked from."""

    seeds: np.ndarray
    """uint64 [n]."""
    episodes: np.ndarray
    """uint64 [n]: number of the episode of the seed."""
    arrivals: np.ndarray
    """int32 [n, 2, slots + 1], as in `moe.service.traffic.RequestStream`."""
    shift: np.ndarray
    """int64 [n, seconds]: input shift in force."""
    announced: np.ndarray
    """float64 [n, 3, steps + notice + 1], see `Account`."""
    drift_c: np.ndarray
    """float64 [n, seconds, D]: offsets of the inlets."""
    devices: np.ndarray
    """Records of `DEVICE_DTYPE` [n, D]."""
    track: np.ndarray
    """Records of `TRACK_DTYPE` [n]."""


class Interval(NamedTuple):
    """The interval just played in environments [n] and what it came to."""

    levels: np.ndarray
    """Records of `INDEX_DTYPE` [n]."""
    knobs: np.ndarray
    """Records of `VALUE_DTYPE` [n]: those in force."""
    work: np.ndarray
    """Records of `WORK_DTYPE` [n]."""
    gpu: np.ndarray
    """Records of `GPU_DTYPE` [n]."""
    raw: np.ndarray
    """Records of `RAW_DTYPE` [n]."""
    histogram: np.ndarray
    """int64 [n, bins]."""
    slot_energy: np.ndarray
    """float64 [n, slots, D]: J above idle."""
    clocks: np.ndarray
    """float64 [n, D]: clock fractions at which the devices ran."""
    terms: np.ndarray
    """float64 [n, terms of the reward]."""
    cost: np.ndarray
    """float64 [n, costs]."""
    first_gpu: np.ndarray
    """Where an episode's beginning is written, apart from the interval that ended the one before."""
    first_raw: np.ndarray


class Code(NamedTuple):
    """Addresses of the functions that play one environment."""

    start: int
    cool: int
    begin: int
    serve: int
    heat: int
    settle: int


class Batch(NamedTuple):
    """All that environments [n] are, for the compiled loop over them."""

    code: Code
    serving: Serving
    heating: Heating
    account: Account
    seeds: np.ndarray
    """uint64 [n], and the number of the episode likewise."""
    episodes: np.ndarray
    level_table: np.ndarray
    """float64 [knobs, most levels]."""
    steps: int
    """Intervals after which an episode is truncated."""
    autoreset: int
    """Whether the next episode begins where one ended."""


class BatchStep(NamedTuple):
    """What one step of all environments returned. The arrays are the caller's, `final_observation` aside."""

    observation: np.ndarray
    """float32 [n, fields]; of a finished environment: the first of its next episode."""
    reward: np.ndarray
    """float64 [n]."""
    terminated: np.ndarray
    """bool [n]: a device shut itself down."""
    truncated: np.ndarray
    """bool [n]: the episode's time is over."""
    final_observation: np.ndarray
    """float32 [n, fields], the core's own: in a finished environment's row, the last one of its episode;
    the other rows mean nothing."""


class Call(NamedTuple):
    """What one call is told and fills."""

    todo: np.ndarray
    """int64 [n]: what to do with an environment."""
    taken: np.ndarray
    """int64 [1]: environments that a thread has taken, from the first on."""
    out: BatchStep
