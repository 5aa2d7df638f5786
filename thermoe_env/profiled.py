"""The profiled workload: the real queue and batching of `moe.queueing`, served at measured cost.

`serve` is the compiled interval; `ProfiledWorkload` is the same behind the `Workload` seam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe.adaptation import adapt, answer_quality, start_unadapted
from moe.queueing import (
    DEFERRABLE,
    INTERACTIVE,
    SLOT_S,
    arrived_by,
    expire,
    jit,
    late_count,
    next_launch,
    oldest_arrival,
    record_latencies,
)
from moe.traffic import RequestStream, draw_stream
from moe.workload import LATENCY_EDGES_S, STAT_NAMES, Knobs, WorkStats
from thermoe_env.knobs import KNOB_NAMES
from thermoe_env.physics import clock_power_factor
from thermoe_env.problem import Problem, Tables

WORK_DTYPE = np.dtype([(name, np.float64) for name in STAT_NAMES])
HISTOGRAM_BINS = len(LATENCY_EDGES_S) + 1

SERVER_DTYPE = np.dtype(
    [(name, np.float64) for name in ("time_s", "free_at_s", "carry_until_s", "carry_power_w")]
)
"""State of the server: its clock, when the device is free, the running batch's tail."""


class Terms(NamedTuple):
    """Terms of service per class, as compiled code reads them."""

    deadline_s: np.ndarray  # [2]
    max_wait_s: np.ndarray  # [2]
    expire_after_s: np.ndarray  # [2]
    slots: int
    """Slots per interval."""


class KnobLevels(NamedTuple):
    """One row of knobs: values where physics needs them, level indices where tables do."""

    bias_index: int
    batch_size: int
    expert_index: int
    ttt_steps: int
    pace: float
    sm_clock: float


@jit
def _table_row(batch_size, n):
    """Lower neighbour of n in the batch axis and the weight of the upper one."""
    last = batch_size.shape[0] - 1
    if n <= batch_size[0] or last == 0:
        return 0, 0.0
    if n >= batch_size[last]:
        return last - 1, 1.0
    i = 0
    while batch_size[i + 1] < n:
        i += 1
    return i, (n - batch_size[i]) / (batch_size[i + 1] - batch_size[i])


@jit
def _batch_cost(tables, n, knobs, clock):
    """(latency, adaptation latency, energy of both) of a micro-batch of n requests, in s, s and J.

    Below the smallest measured batch the smallest one's cost stands: latency has a floor there.
    """
    i, w = _table_row(tables.batch_size, n)
    j = min(i + 1, tables.batch_size.shape[0] - 1)
    k, b = knobs.expert_index, knobs.bias_index
    latency = ((1.0 - w) * tables.latency_s[i, k, b] + w * tables.latency_s[j, k, b]) / clock
    energy = (1.0 - w) * tables.energy_j[i, k, b] + w * tables.energy_j[j, k, b]
    ttt_latency = (
        knobs.ttt_steps * ((1.0 - w) * tables.ttt_latency_s[i, k] + w * tables.ttt_latency_s[j, k]) / clock
    )
    ttt_energy = knobs.ttt_steps * ((1.0 - w) * tables.ttt_energy_j[i, k] + w * tables.ttt_energy_j[j, k])
    return latency, ttt_latency, (energy + ttt_energy) * clock_power_factor(clock) / clock


@jit
def _deposit(slot_energy, origin_s, start_s, end_s, power_w):
    """Spread constant power over the interval's slots; returns the seconds that fell inside it."""
    slots = slot_energy.shape[0]
    inside = 0.0
    first = max(0, int((start_s - origin_s) / SLOT_S))
    for s in range(first, slots):
        low = max(start_s, origin_s + s * SLOT_S)
        high = min(end_s, origin_s + (s + 1) * SLOT_S)
        if high <= low:
            if low >= end_s:
                break
            continue
        slot_energy[s] += power_w * (high - low)
        inside += high - low
    return inside


@jit
def _take(arrivals, next_request, head_slot, t, room, completion, deadline_s, histogram):
    """Serve up to `room` waiting requests of one class; returns (taken, late among them)."""
    first = next_request
    last = min(arrived_by(arrivals, t), first + room)
    if last <= first:
        return 0, 0, head_slot
    late = late_count(arrivals, first, last, completion, deadline_s)
    return last - first, late, record_latencies(arrivals, first, last, head_slot, completion, histogram)


@jit
def serve(
    tables, terms, arrivals, shift, next_request, head_slot, server, weights, knobs, clock, serve_deferrable,
    work, histogram, slot_energy,
):  # fmt: skip
    """Serve one interval of the request stream at the profile's cost.

    Args:
        tables: `Tables`.
        terms: `Terms`.
        arrivals: int32 [2, slots + 1], the whole stream.
        shift: index of the input shift in force.
        next_request: int64 [2], first unserved request per class; updated.
        head_slot: int64 [2], a slot not later than that request's; updated.
        server: record of `SERVER_DTYPE`; updated.
        weights: float [Q], state of the adaptation; updated.
        knobs: `KnobLevels`.
        clock: clock fraction that throttling leaves.
        serve_deferrable: whether deferrable requests are served.
        work: record of `WORK_DTYPE`, zeroed by the caller; filled.
        histogram: int64 [bins]; added to.
        slot_energy: float [slots per interval], zeroed by the caller; filled with J above idle.
    """
    origin = server.time_s
    end = origin + terms.slots * SLOT_S
    clock = min(clock, knobs.sm_clock)
    work.busy_s += _deposit(slot_energy, origin, origin, server.carry_until_s, server.carry_power_w)
    served, confidence, entropy = 0, 0.0, 0.0
    for s in range(terms.slots):
        slot_start = origin + s * SLOT_S
        slot_end = slot_start + SLOT_S
        for c in range(2):
            next_request[c], head_slot[c], expired = expire(
                arrivals[c], next_request[c], head_slot[c], slot_start, terms.expire_after_s[c]
            )
            if c == INTERACTIVE:
                work.expired_interactive += expired
            else:
                work.expired_deferrable += expired
        now = max(slot_start, server.free_at_s)
        while now < slot_end:
            t = next_launch(
                arrivals,
                next_request,
                head_slot,
                now,
                slot_end,
                knobs.batch_size,
                terms.max_wait_s,
                serve_deferrable,
            )
            if t >= slot_end:
                break
            waiting = arrived_by(arrivals[0], t) - next_request[0]
            if serve_deferrable:
                waiting += arrived_by(arrivals[1], t) - next_request[1]
            n = min(waiting, knobs.batch_size)
            latency, ttt_latency, energy = _batch_cost(tables, n, knobs, clock)
            completion = t + latency
            quality, sure, unsure = answer_quality(
                tables, weights, shift, knobs.expert_index, knobs.bias_index
            )
            room = knobs.batch_size
            for c in range(2):
                if c == DEFERRABLE and not serve_deferrable:
                    continue
                taken, late, head_slot[c] = _take(
                    arrivals[c],
                    next_request[c],
                    head_slot[c],
                    t,
                    room,
                    completion,
                    terms.deadline_s[c],
                    histogram,
                )
                next_request[c] += taken
                room -= taken
                work.good += quality * (taken - late)
                if c == INTERACTIVE:
                    work.answered_interactive += taken
                    work.late_interactive += late
                else:
                    work.answered_deferrable += taken
                    work.late_deferrable += late
            served += n
            work.correct += quality * n
            confidence += n * sure
            entropy += n * unsure
            done = completion + ttt_latency
            work.busy_s += _deposit(slot_energy, origin, t, done, energy / (done - t))
            work.ttt_busy_s += ttt_latency
            work.ttt_steps += knobs.ttt_steps
            work.batches += 1.0
            adapt(weights, shift, knobs.ttt_steps, tables.adapt_rate[shift])
            server.carry_until_s = done
            server.carry_power_w = energy / (done - t)
            server.free_at_s = t + (done - t) / knobs.pace
            now = server.free_at_s
    if served > 0:
        work.batch_fill = served / (work.batches * knobs.batch_size)
        work.confidence = confidence / served
        work.entropy = entropy / served
        work.load_imbalance = tables.load_imbalance[knobs.expert_index, knobs.bias_index]
    server.time_s = end
    first = round(origin / SLOT_S)
    work.arrived_interactive = arrivals[0, first + terms.slots] - arrivals[0, first]
    work.arrived_deferrable = arrivals[1, first + terms.slots] - arrivals[1, first]
    work.waiting_interactive = arrived_by(arrivals[0], end) - next_request[0]
    work.waiting_deferrable = arrived_by(arrivals[1], end) - next_request[1]
    work.oldest_interactive_s = max(
        0.0, end - oldest_arrival(arrivals[0], next_request[0], head_slot[0], end)
    )
    work.oldest_deferrable_s = max(0.0, end - oldest_arrival(arrivals[1], next_request[1], head_slot[1], end))
    work.shift_id = shift


def terms_of(problem: Problem) -> Terms:
    """Terms of service of a scenario."""
    service = problem.scenario.service
    slots = round(problem.scenario.interval_s / SLOT_S)
    return Terms(
        np.array(service.deadline_s), np.array(service.max_wait_s), np.array(service.expire_after_s), slots
    )


def knob_levels_row(problem: Problem, index: np.ndarray) -> KnobLevels:
    """`KnobLevels` of one row of level indices (in `KNOB_NAMES` order)."""
    at = dict(zip(KNOB_NAMES, index, strict=True))
    level = {name: problem.knobs.levels[name][at[name]] for name in KNOB_NAMES}
    return KnobLevels(
        int(at["routing_bias"]), int(level["batch_size"]), int(at["expert_count"]), int(level["ttt_steps"]),
        level["pace"], level["sm_clock"],
    )  # fmt: skip


def draw_episode_stream(problem: Problem, seed: int) -> RequestStream:
    """The request stream of the episode `seed` (the live workload plays the same one)."""
    scenario = problem.scenario
    return draw_stream(scenario.traffic, seed, math.ceil(scenario.episode_s) + 1, problem.capacity_rps)


def start_server(server: np.ndarray, weights: np.ndarray) -> None:
    """Set one server record to an idle device, not adapted, at time 0."""
    server["time_s"] = server["free_at_s"] = server["carry_until_s"] = server["carry_power_w"] = 0.0
    start_unadapted(weights)


class ProfiledWorkload:
    """`Workload` that costs what the profile says; used by the twin."""

    def __init__(self, problem: Problem, clock: Callable[[], float]) -> None:
        """Serve on a device whose throttling leaves the clock fraction `clock()`."""
        self._problem = problem
        self._clock = clock
        self._tables: Tables = problem.tables
        self._terms = terms_of(problem)
        self._server = np.zeros(1, SERVER_DTYPE)
        self._weights = np.zeros(len(problem.profile.shifts) + 1)

    def reset(self, seed: int) -> None:
        """Draw the request stream of `seed` and start with an empty queue."""
        self._stream = draw_episode_stream(self._problem, seed)
        self._next = np.zeros(2, np.int64)
        self._head = np.zeros(2, np.int64)
        start_server(self._server[0], self._weights)

    def run(self, knobs: Knobs, duration_s: float, serve_deferrable: bool = True) -> WorkStats:
        """Serve one interval. `duration_s` must be the scenario's interval."""
        if duration_s != self._problem.scenario.interval_s:
            raise ValueError(
                f"the profiled workload runs whole intervals of {self._problem.scenario.interval_s} s"
            )
        levels = self._problem.knobs.levels
        index = np.array([levels[name].index(float(getattr(knobs, name))) for name in KNOB_NAMES])
        work = np.zeros(1, WORK_DTYPE)
        histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        slot_energy = np.zeros(self._terms.slots)
        shift = int(self._stream.shift_id[int(self._server[0]["time_s"] + 1e-9)])
        serve(
            self._tables, self._terms, self._stream.arrivals, shift, self._next, self._head, self._server[0],
            self._weights, knob_levels_row(self._problem, index), self._clock(), serve_deferrable, work[0],
            histogram, slot_energy,
        )  # fmt: skip
        p, k = self._problem.profile, int(index[KNOB_NAMES.index("expert_count")])
        share = np.apply_along_axis(
            lambda row: np.interp(knobs.routing_bias, p.routing_bias, row), 0, p.expert_share[k]
        )
        answered = float(work[0]["answered_interactive"] + work[0]["answered_deferrable"])
        return WorkStats(
            **{name: float(work[0][name]) for name in STAT_NAMES},
            latency_histogram=histogram,
            tokens_per_expert=share * answered * knobs.expert_count,
            slot_energy_j=slot_energy,
        )

    def close(self) -> None:
        """Nothing to release."""
