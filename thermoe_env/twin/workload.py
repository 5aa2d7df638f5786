"""A compiled service behind the `Workload` seam: one server, interval by interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moe.compiled import Held
from moe.service.queueing import SLOT_S
from moe.service.traffic import fill_stream, traffic_of
from moe.workload import (
    PER_CLASS_NAMES,
    REQUEST_CLASSES,
    SCALAR_NAMES,
    WORK_DTYPE,
    Knobs,
    WorkStats,
    frozen,
)
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.service import HISTOGRAM_BINS, single_server
from thermoe_env.twin.services import service_of

_NAMES = (*PER_CLASS_NAMES, *SCALAR_NAMES)
_SCALARS_FROM = len(PER_CLASS_NAMES) * len(REQUEST_CLASSES)
"""Place of the first scalar in a record of work; pairs before it."""


class TwinWorkload:
    """`Workload` that costs what the profile says."""

    def __init__(self, problem: Problem, clock: Callable[[], float | np.ndarray]) -> None:
        """Serve on devices whose throttling leaves clock fractions `clock()`, float [D] or one for all."""
        self._problem, self._clock = problem, clock
        self._n_devices = problem.placement.n_devices
        service = service_of(problem)
        self._histograms, self._fixed = service.histograms, service.fixed
        self.state = service.new_state(1)
        """The service's own state, of one server."""
        seconds = problem.scenario.episode_s + 1
        self._traffic = traffic_of(problem.scenario.traffic, seconds, problem.capacity_rps)
        self._arrivals = np.zeros((2, round(seconds / SLOT_S) + 1), np.int32)
        self._shift_id = np.zeros(seconds, np.int64)
        self._slots = round(problem.scenario.interval_s / SLOT_S)
        self._known: dict[Knobs, tuple[np.ndarray, ...]] = {}
        """Records of values and levels; tokens per expert of an answer, [L, E]."""
        self._work = np.zeros(1, WORK_DTYPE)
        self._hold()

    def __getstate__(self) -> dict[str, Any]:
        """All but compiled functions, which are found again, and what is known of knobs."""
        return {**vars(self), "_start": None, "_serve": None, "_held": None, "_known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the place of what was copied, with two views of one memory again."""
        self.__dict__.update(state)
        self._hold()

    def _hold(self) -> None:
        """Let compiled code find what stays where it is."""
        self._work_row = self._work.view(np.float64)
        self._held = Held(
            (self._fixed, self.state, self._arrivals, self._shift_id, self._work, self._work_row)
        )
        self._start, self._serve = single_server(self._held.kind)

    def reset(self, seed: int) -> None:
        """Draw the request stream of `seed` and start with an empty queue."""
        # The live workload plays the same stream.
        fill_stream(self._traffic, np.uint64(seed), self._arrivals, self._shift_id)
        self._slot = 0
        self._start(self._held.address, np.uint64(seed))

    def run(self, knobs: Knobs, duration_s: float, open_classes: int = 2) -> WorkStats:
        """Serve one interval. `duration_s` must be the scenario's interval."""
        if duration_s != self._problem.scenario.interval_s:
            raise ValueError(
                f"a twin runs whole intervals of {self._problem.scenario.interval_s} s, got {duration_s} s"
            )
        values, index, tokens = self._known.get(knobs) or self._learn(knobs)
        clocks = np.minimum(self._clock(), knobs.sm_clock, out=np.empty(self._n_devices))
        histogram = np.zeros((self._histograms, HISTOGRAM_BINS), np.int64)
        slot_energy = np.empty((self._slots, self._n_devices))
        self._serve(
            self._held.address, values, index, self._slot, clocks, open_classes, histogram.ravel(),
            slot_energy,
        )  # fmt: skip
        self._slot += self._slots
        row = self._work_row.tolist()
        pairs = zip(row[:_SCALARS_FROM:2], row[1:_SCALARS_FROM:2], strict=True)
        stats: dict[str, Any] = dict(zip(_NAMES, (*pairs, *row[_SCALARS_FROM:]), strict=True))
        stats["row"] = row
        stats["latency_histogram"] = histogram[0]
        if self._histograms > 1:
            stats["ttft_histogram"], stats["tpot_histogram"] = histogram[1:]
        stats["tokens_per_expert"] = tokens * sum(stats["answered"])
        stats["slot_energy_j"] = slot_energy
        stats["device_clock"] = clocks
        return frozen(WorkStats, stats)

    def close(self) -> None:
        """Nothing to release."""

    def _learn(self, knobs: Knobs) -> tuple[np.ndarray, ...]:
        problem = self._problem
        row = problem.knobs.index(replace(knobs, pace=1.0))  # a limit may hold the pace between two levels
        index, values = problem.knobs.records(row[None])
        values["pace"] = knobs.pace
        at = index["expert_count"][0], index["routing_bias"][0]
        tokens = np.ascontiguousarray(problem.expert_tokens[at])
        self._known[knobs] = values, index, tokens
        return self._known[knobs]
