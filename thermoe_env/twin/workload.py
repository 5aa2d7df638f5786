"""A compiled service behind the `Workload` seam: one server, interval by interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from moe.memory import Held, address_of
from moe.service.queueing import SLOT_S
from moe.service.traffic import traffic_of
from moe.workload import (
    PER_CLASS_NAMES,
    REQUEST_CLASSES,
    SCALAR_NAMES,
    WORK_DTYPE,
    Knobs,
    WorkStats,
    frozen,
)
from thermoe_env.problem.knobs import INDEX_DTYPE, VALUE_DTYPE
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.service import HISTOGRAM_BINS, Asked, Serving, serve_alone, serving_rows
from thermoe_env.twin.services import service_of

_NAMES = (*PER_CLASS_NAMES, *SCALAR_NAMES)
_SCALARS_FROM = len(PER_CLASS_NAMES) * len(REQUEST_CLASSES)
"""Place of the first scalar in a record of work; pairs before it."""


_MOST_KNOWN = 4096
"""Knobs that are remembered: a limit that acts may make any number of them."""


class _Known(NamedTuple):
    """What is known of knobs."""

    knobs: Knobs
    asked: Held
    """Of an `Asked`."""
    tokens_per_answer: np.ndarray
    """Of each expert, [L, E]."""


class TwinWorkload:
    """`Workload` that costs what the profile says."""

    def __init__(self, problem: Problem, clock: Callable[[], float | np.ndarray]) -> None:
        """Serve on devices whose throttling leaves clock fractions `clock()`, float [D] or one for all."""
        self._problem, self._clock = problem, clock
        service, seconds = service_of(problem), problem.scenario.episode_s + 1
        n_devices = problem.placement.n_devices
        self._slots = round(problem.scenario.interval_s / SLOT_S)
        self._histograms = service.histograms
        generate = problem.scenario.generate
        self._promised_s = 0.0 if generate is None else generate.tpot_s[0]
        self.state = service.new_state(1)
        """The service's own state, of one server."""
        self._here = Serving(
            service.fixed, self.state, traffic_of(problem.scenario.traffic, seconds, problem.capacity_rps),
            np.zeros((1, 2, round(seconds / SLOT_S) + 1), np.int32), np.zeros((1, seconds), np.int64),
            np.zeros(1, INDEX_DTYPE), np.zeros(1, VALUE_DTYPE), np.zeros((1, n_devices)),
            np.zeros(1, WORK_DTYPE), np.zeros((1, service.histograms * HISTOGRAM_BINS), np.int64),
            np.zeros((1, self._slots, n_devices)),
        )  # fmt: skip
        self._hold()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; `_hold` makes the rest."""
        names = ("_problem", "_clock", "_slots", "_histograms", "_promised_s", "state", "_here", "_slot")
        return {name: value for name, value in vars(self).items() if name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the place of what was copied."""
        self.__dict__.update(state)
        self._hold()

    def _hold(self) -> None:
        """Let compiled code find what stays where it is."""
        here = self._here
        self._held = Held(here)
        self._work_row, self._clocks, self._slot_energy = (
            here.work.view(np.float64), here.clocks[0], here.slot_energy[0],
        )  # fmt: skip
        self._histogram = here.histogram.reshape(self._histograms, HISTOGRAM_BINS)
        self._known: dict[int, _Known] = {}
        """By the identity of knobs, which are kept with it: actions of discrete modes are few."""
        asked = self._learn(self._problem.knobs.knobs(np.array(self._problem.knobs.default_index))).asked
        self._start, serve_row = serving_rows(self._held.kind)
        self._serve = serve_alone(self._held.kind, asked.kind)
        self._serve_row = address_of(serve_row, self._held.address, 0, 0, 0, 0.0)

    def reset(self, seed: int) -> None:
        """Draw the request stream of `seed` and start with an empty queue."""
        # The live workload plays the same stream.
        self._slot = 0
        self._start(self._held.address, np.uint64(seed), 0)

    def run(
        self, knobs: Knobs, duration_s: float, open_classes: int = 2, promised_tpot_s: float | None = None
    ) -> WorkStats:
        """Serve one interval. `duration_s` must be the scenario's interval."""
        if duration_s != self._problem.scenario.interval_s:
            raise ValueError(
                f"a twin runs whole intervals of {self._problem.scenario.interval_s} s, got {duration_s} s"
            )
        known = self._known.get(id(knobs)) or self._learn(knobs)
        self._clocks[:] = self._clock()
        promised_s = self._promised_s if promised_tpot_s is None else promised_tpot_s
        self._serve(
            self._serve_row, self._held.address, known.asked.address, self._slot, open_classes, promised_s
        )
        self._slot += self._slots
        row, histogram = self._work_row.copy(), self._histogram.copy()
        values = row.tolist()
        pairs = zip(values[:_SCALARS_FROM:2], values[1:_SCALARS_FROM:2], strict=True)
        counted: dict[str, Any] = dict(zip(_NAMES, (*pairs, *values[_SCALARS_FROM:]), strict=True))
        several = self._histograms > 1
        arrays = {
            "latency_histogram": histogram[0],
            "ttft_histogram": histogram[1] if several else None,
            "tpot_histogram": histogram[2] if several else None,
            "tokens_per_expert": known.tokens_per_answer * sum(counted["answered"]),
            "slot_energy_j": self._slot_energy.copy(),
            "device_clock": self._clocks.copy(),
        }
        return frozen(WorkStats, {**counted, **arrays, "row": row, "counted": counted})

    def close(self) -> None:
        """Nothing to release."""

    def _learn(self, knobs: Knobs) -> _Known:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        problem = self._problem
        row = problem.knobs.index(replace(knobs, pace=1.0))  # a limit may hold the pace between two levels
        index, values = problem.knobs.records(row[None])
        values["pace"] = knobs.pace
        at = index["expert_count"][0], index["routing_bias"][0]
        tokens = np.ascontiguousarray(problem.expert_tokens[at])
        known = self._known[id(knobs)] = _Known(knobs, Held(Asked(index, values)), tokens)
        return known
