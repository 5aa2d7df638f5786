"""What a batch of twin environments is made of: tuples of arrays that its compiled loop reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Fixed(NamedTuple):
    """What no episode changes, as compiled code reads it: arrays, those of one record among them."""

    rules: np.ndarray
    prices: np.ndarray
    quality_floor: np.ndarray  # [S]
    level_table: np.ndarray  # [knobs, most levels]
    low: np.ndarray  # [fields], see `Ranges`
    scale: np.ndarray
    default_index: np.ndarray  # int64 [knobs]
    budget: np.ndarray
    spread: np.ndarray
    nominal: np.ndarray
    """Records of `DEVICE_DTYPE` [D]."""
    steps: int
    """Intervals after which an episode is truncated."""
    inlet_offset_c: np.ndarray  # [seconds]


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
    budget_w: np.ndarray
    """float64 [n, steps + notice + 1]."""
    drift_c: np.ndarray
    """float64 [n, seconds, D]: offsets of the inlets."""
    devices: np.ndarray
    """Records of `DEVICE_DTYPE` [n, D]."""
    track: np.ndarray
    """Records of `TRACK_DTYPE` [n]."""


class Interval(NamedTuple):
    """The interval just played and what it came to: records, and their memory as rows where loops need it."""

    levels: np.ndarray
    """Records of `INDEX_DTYPE` [n]."""
    index_rows: np.ndarray
    knobs: np.ndarray
    """Records of `VALUE_DTYPE` [n]: those in force."""
    knob_rows: np.ndarray
    work: np.ndarray
    work_rows: np.ndarray
    gpu: np.ndarray
    raw: np.ndarray
    raw_rows: np.ndarray
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
    first_raw_rows: np.ndarray
    track_rows: np.ndarray
    """The memory of `BatchState.track`."""


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
