"""The profiled workload: the real queue and batching of `moe.service.queueing`, served at measured cost.

`serve` is the compiled interval; `ProfiledWorkload` is the same behind the `Workload` seam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe.compiled import copy_row, inlined, jit
from moe.service.adaptation import adapt, answer_quality, start_unadapted
from moe.service.batching import (
    full_launches,
    late_in_backlog,
    late_in_regular_group,
    launches_before_end,
    taken_by,
    trigger_period,
)
from moe.service.budget import earn, pay_steps, share_of
from moe.service.queueing import (
    SLOT_S,
    arrived_in_slot,
    expire,
    next_launch,
    oldest_in_slot,
    record_latencies,
)
from moe.service.traffic import RequestStream, draw_stream
from moe.workload import LATENCY_EDGES_S, STAT_NAMES, Knobs, WorkStats, frozen
from thermoe_env.device.physics import clock_power_factor
from thermoe_env.mdp.interval import as_record
from thermoe_env.problem.problem import NODES_PER_OCTAVE, Problem, Tables

WORK_DTYPE = np.dtype([(name, np.float64) for name in STAT_NAMES])
HISTOGRAM_BINS = len(LATENCY_EDGES_S) + 1

SERVER_DTYPE = np.dtype(
    [(name, np.int64) for name in ("slot", "next_0", "next_1", "head_0", "head_1")]
    + [(name, np.float64) for name in ("free_in_s", "tail_s", "tail_power_w")]
)
"""State of the server: the slot to come; per class the first unserved request, and a slot not later than its;
when the device is free; what the running batch still needs, and its power."""

ALIKE = 0.02
"""Sizes of batches that differ by less than this share are taken as one size."""


_ONE = int(np.float64(1.0).view(np.int64))
_NODE_BITS = 52 - int(math.log2(NODES_PER_OCTAVE))
_IN_NODE, _PER_NODE = 2**_NODE_BITS - 1, 2.0**-_NODE_BITS


class Terms(NamedTuple):
    """Terms of service of class 0 (interactive) and 1 (deferrable), as compiled code reads them."""

    deadline_0: float
    deadline_1: float
    max_wait_0: float
    max_wait_1: float
    expire_after_0: float
    expire_after_1: float
    slots: int
    """Slots per interval."""


@inlined
def batch_cost(cost, n):
    """Cost of a micro-batch of `n` requests (a mean over several need not be whole), at full clock.

    Args:
        cost: float [M, 4], `Tables.cost` under the knobs in force.
        n: requests, at least 1.

    Returns:
        (latency in s, energy in J, and the same of one adaptation step)
    """
    # Exponent and first bits of the fraction of a float are the octave and the node in it.
    bits = np.float64(n).view(np.int64) - _ONE
    i, w = bits >> _NODE_BITS, (bits & _IN_NODE) * _PER_NODE
    return (
        cost[i, 0] + w * (cost[i + 1, 0] - cost[i, 0]),
        cost[i, 1] + w * (cost[i + 1, 1] - cost[i, 1]),
        cost[i, 2] + w * (cost[i + 1, 2] - cost[i, 2]),
        cost[i, 3] + w * (cost[i + 1, 3] - cost[i, 3]),
    )


@jit
def serve(
    tables, terms, levels, index, arrivals, shift, clock, serve_deferrable, weights, purse, server, work,
    histogram, slot_energy,
):  # fmt: skip
    """Serve one interval of the request stream at the profile's cost.

    Args:
        tables: `Tables`.
        terms: `Terms`.
        levels: float [knobs, most levels], `KnobTable.level_table`.
        index: int64 [knobs], level of every knob.
        arrivals: int32 [2, slots + 1], the whole stream.
        shift: index of the input shift in force.
        clock: clock fraction that throttling leaves.
        serve_deferrable: whether deferrable requests are served.
        weights: float64 [S + 1], the adaptation; updated.
        purse: what adaptation may spend (`moe.service.budget`); updated.
        server: record of `SERVER_DTYPE`; updated.
        work: record of `WORK_DTYPE`; filled.
        histogram: int64 [bins], added to; without bins no latencies are recorded.
        slot_energy: float [slots per interval]; filled with J above idle.
    """
    bias, experts = index[0], index[2]
    batch_size, ttt_steps, pace = int(levels[1, index[1]]), int(levels[3, index[3]]), levels[4, index[4]]
    clock = min(clock, levels[5, index[5]])
    stretch, slower = 1.0 / clock, 1.0 / pace
    energy_factor = clock_power_factor(clock) * stretch
    cost = tables.cost[experts, bias]
    arrivals_0, arrivals_1 = arrivals[0], arrivals[1]
    next_0, next_1, head_0, head_1 = server.next_0, server.next_1, server.head_0, server.head_1
    free_in, tail, tail_power = server.free_in_s, server.tail_s, server.tail_power_w
    first_slot = server.slot
    end_slot = first_slot + terms.slots
    served_0, served_1, late_0, late_1, expired_0, expired_1, batches = 0, 0, 0, 0, 0, 0, 0
    budgeted, all_steps, refused = purse.shape[0] > 0, 0, 0
    busy, ttt_busy, correct, good, confidence, entropy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    quality, adapted = (0.0, 0.0, 0.0), True
    for slot in range(first_slot, end_slot):
        next_0, head_0, gone = expire(arrivals_0, next_0, head_0, slot * SLOT_S, terms.expire_after_0)
        expired_0 += gone
        next_1, head_1, gone = expire(arrivals_1, next_1, head_1, slot * SLOT_S, terms.expire_after_1)
        expired_1 += gone
        in_slot_0, in_slot_1 = arrivals_0[slot + 1] - arrivals_0[slot], 0
        if serve_deferrable:
            in_slot_1 = arrivals_1[slot + 1] - arrivals_1[slot]
        if adapted:
            quality = answer_quality(tables, weights, shift, experts, bias)
        inside = min(tail, SLOT_S)
        tail -= inside
        busy += inside
        energy = inside * tail_power
        launched, stepped, now, paid_until = 0, 0, free_in, 0.0
        while now < SLOT_S:
            queued_0, queued_1 = arrivals_0[slot] - next_0, 0
            if serve_deferrable:
                queued_1 = arrivals_1[slot] - next_1
            arrived = arrived_in_slot(in_slot_0, now) + arrived_in_slot(in_slot_1, now)
            start = now
            if queued_0 + queued_1 + arrived < batch_size:  # else no need to know who waits for longest
                due, head_0 = oldest_in_slot(arrivals_0, next_0, head_0, slot)
                due += terms.max_wait_0
                if serve_deferrable:
                    due_1, head_1 = oldest_in_slot(arrivals_1, next_1, head_1, slot)
                    due = min(due, due_1 + terms.max_wait_1)
                start = next_launch(now, batch_size, queued_0 + queued_1, in_slot_0 + in_slot_1, arrived, due)
                if start >= SLOT_S:
                    break
            first_0, first_1 = taken_by(start, batch_size, queued_0, in_slot_0, queued_1, in_slot_1)
            first = first_0 + first_1
            if first == 0:  # rounding: the request that is due arrives a moment later
                now = start + 1e-9
                continue
            latency, joules, ttt_latency, ttt_joules = batch_cost(cost, first)
            steps, alone = ttt_steps, budgeted and ttt_steps > 0  # each batch is then paid for on its own
            if alone:
                steps = pay_steps(
                    purse, start - paid_until, joules * energy_factor, ttt_joules * energy_factor, ttt_steps
                )
                paid_until = start
                refused += ttt_steps - steps
            needs = (latency + steps * ttt_latency) * stretch
            launches, period = 1, needs * slower
            full, crowded = first == batch_size, first_0 == batch_size
            rate_0, rate_1 = in_slot_0 / SLOT_S, in_slot_1 / SLOT_S
            if alone:
                pass
            elif crowded or (full and rate_0 * period <= batch_size):
                waiting, rate = queued_0 + arrived_in_slot(in_slot_0, start), rate_0
                if not crowded:
                    waiting += queued_1 + arrived_in_slot(in_slot_1, start)
                    rate += rate_1
                launches = full_launches(start, period, waiting, rate, batch_size)
            elif not full and in_slot_0 + in_slot_1 > 0:
                # A device that is busy for longer than requests wait launches whenever it is free.
                period = max(
                    period, trigger_period(batch_size, rate_0, rate_1, terms.max_wait_0, terms.max_wait_1)
                )
                expected = (rate_0 + rate_1) * period
                if abs(expected - first) <= ALIKE * first + 1.0 and expected <= batch_size + 0.5:
                    launches = launches_before_end(start, period)
            last = start + (launches - 1) * period
            taken_0, taken_1 = first_0, first_1
            if launches > 1:
                taken_0, taken_1 = taken_by(
                    last, launches * batch_size, queued_0, in_slot_0, queued_1, in_slot_1
                )
                if not full:
                    mean = min((taken_0 + taken_1) / launches, 1.0 * batch_size)
                    latency, joules, ttt_latency, ttt_joules = batch_cost(cost, max(1.0, mean))
                    # The period was set by the first batch: the mean one may not overlap with the next.
                    needs = min((latency + steps * ttt_latency) * stretch, period * pace)
            if budgeted and not alone:
                for number in range(launches):
                    at = start + number * period
                    pay_steps(purse, at - paid_until, joules * energy_factor, 0.0, 0)
                    paid_until = at
            latency, ttt_latency = latency * stretch, steps * ttt_latency * stretch
            joules = (joules + steps * ttt_joules) * energy_factor
            if crowded:
                group_late_0 = late_in_backlog(
                    arrivals_0, slot, next_0, head_0, taken_0, start, period, launches, latency,
                    terms.deadline_0,
                )  # fmt: skip
            else:
                group_late_0 = late_in_regular_group(
                    arrivals_0, slot, next_0, first_0, taken_0, start, period, launches, latency,
                    terms.deadline_0,
                )  # fmt: skip
            if full:
                group_late_1 = late_in_backlog(
                    arrivals_1, slot, next_1, head_1, taken_1, start, period, launches, latency,
                    terms.deadline_1,
                )  # fmt: skip
            else:
                group_late_1 = late_in_regular_group(
                    arrivals_1, slot, next_1, first_1, taken_1, start, period, launches, latency,
                    terms.deadline_1,
                )  # fmt: skip
            if histogram.shape[0] > 0:
                _record_group(
                    arrivals_0, arrivals_1, slot, next_0, next_1, head_0, head_1, queued_0, in_slot_0,
                    queued_1, in_slot_1, batch_size, start, period, launches, latency, histogram,
                )  # fmt: skip
            taken = taken_0 + taken_1
            next_0 += taken_0
            next_1 += taken_1
            served_0 += taken_0
            served_1 += taken_1
            late_0 += group_late_0
            late_1 += group_late_1
            correct += quality[0] * taken
            good += quality[0] * (taken - group_late_0 - group_late_1)
            confidence += quality[1] * taken
            entropy += quality[2] * taken
            launched += launches
            stepped += launches * steps
            ttt_busy += launches * ttt_latency
            # All batches but the last end within the slot.
            inside = min(needs, SLOT_S - last)
            tail, tail_power = needs - inside, joules / needs
            busy += (launches - 1) * needs + inside
            energy += (launches - 1) * joules + inside * tail_power
            now = last + needs * slower
        free_in = max(0.0, now - SLOT_S)
        slot_energy[slot - first_slot] = energy
        batches += launched
        all_steps += stepped
        adapted = stepped > 0
        if adapted:
            adapt(weights, shift, stepped, tables.adapt_rate)
        if budgeted:
            earn(purse, SLOT_S - paid_until, 0.0)
    oldest_0, head_0 = oldest_in_slot(arrivals_0, next_0, head_0, end_slot - 1)
    oldest_1, head_1 = oldest_in_slot(arrivals_1, next_1, head_1, end_slot - 1)
    server.next_0, server.next_1, server.head_0, server.head_1 = next_0, next_1, head_0, head_1
    server.slot, server.free_in_s, server.tail_s, server.tail_power_w = end_slot, free_in, tail, tail_power
    served = served_0 + served_1
    work.arrived_interactive = arrivals_0[end_slot] - arrivals_0[first_slot]
    work.arrived_deferrable = arrivals_1[end_slot] - arrivals_1[first_slot]
    work.answered_interactive, work.answered_deferrable = served_0, served_1
    work.late_interactive, work.late_deferrable = late_0, late_1
    work.expired_interactive, work.expired_deferrable = expired_0, expired_1
    work.waiting_interactive = arrivals_0[end_slot] - next_0
    work.waiting_deferrable = arrivals_1[end_slot] - next_1
    work.oldest_interactive_s = max(0.0, SLOT_S - oldest_0)
    work.oldest_deferrable_s = max(0.0, SLOT_S - oldest_1)
    work.correct, work.good, work.batches = correct, good, batches
    work.batch_fill = served / (max(1, batches) * batch_size)
    work.busy_s, work.ttt_busy_s, work.ttt_steps = busy, ttt_busy, all_steps
    work.ttt_refused, work.budget_share = refused, share_of(purse)
    work.ttt_left_out, work.ttt_rolled_back = 0.0, 0.0
    work.confidence, work.entropy = confidence / max(1, served), entropy / max(1, served)
    work.load_imbalance = tables.load_imbalance[experts, bias] if served > 0 else 0.0
    work.sm_clock = clock
    work.shift_id = shift


@jit
def _record_group(
    arrivals_0, arrivals_1, slot, next_0, next_1, head_0, head_1, queued_0, in_slot_0, queued_1, in_slot_1,
    batch_size, start, period, launches, latency, histogram,
):  # fmt: skip
    """Add the latencies of a group's requests to `histogram`, batch by batch."""
    done_0, done_1 = 0, 0
    for number in range(launches):
        t = start + number * period
        upto_0, upto_1 = taken_by(t, (number + 1) * batch_size, queued_0, in_slot_0, queued_1, in_slot_1)
        answered_at = slot * SLOT_S + t + latency
        record_latencies(arrivals_0, next_0 + done_0, next_0 + upto_0, head_0, answered_at, histogram)
        record_latencies(arrivals_1, next_1 + done_1, next_1 + upto_1, head_1, answered_at, histogram)
        done_0, done_1 = max(done_0, upto_0), max(done_1, upto_1)


@jit
def start_service(weights, purse, fresh_purse, server):
    """Set one server to an idle device with an empty queue and an unadapted model, at time 0."""
    start_unadapted(weights)
    copy_row(purse, fresh_purse)
    server.slot = server.next_0 = server.next_1 = server.head_0 = server.head_1 = 0
    server.free_in_s = server.tail_s = server.tail_power_w = 0.0


def terms_of(problem: Problem) -> np.ndarray:
    """`Terms` of service of a scenario, as an array of one record."""
    service = problem.scenario.service
    slots = round(problem.scenario.interval_s / SLOT_S)
    return as_record(Terms(*service.deadline_s, *service.max_wait_s, *service.expire_after_s, slots))


@jit
def _serve_one(
    cost, answer_pure, answer_mixed, adapt_rate, load_imbalance, terms, levels, index, arrivals, shift_id,
    clock, serve_deferrable, weights, purse, server, work, histogram, slot_energy,
):  # fmt: skip
    """`serve` for arrays of one record and the parts of `Tables`: they cross into compiled code cheaper."""
    tables = Tables(cost, answer_pure, answer_mixed, adapt_rate, load_imbalance)
    shift = shift_id[int(server[0].slot * SLOT_S)]
    serve(
        tables, terms[0], levels, index, arrivals, shift, clock, serve_deferrable, weights, purse,
        server[0], work[0], histogram, slot_energy,
    )  # fmt: skip


@jit
def _start_one(weights, purse, fresh_purse, server):
    start_service(weights, purse, fresh_purse, server[0])


class ProfiledWorkload:
    """`Workload` that costs what the profile says; used by the twin."""

    def __init__(self, problem: Problem, clock: Callable[[], float]) -> None:
        """Serve on a device whose throttling leaves the clock fraction `clock()`."""
        self._problem = problem
        self._clock = clock
        self._tables: Tables = problem.tables
        self._terms = terms_of(problem)
        self._slots = int(self._terms[0]["slots"])
        self._known: dict[Knobs, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        """Level indices, int64 [knobs]; tokens per expert of an answer, [L, E]; `device_share`, [D]."""
        self._weights = np.zeros(len(problem.profile.shifts) + 1)
        self._purse = problem.purse.copy()
        self._server = np.zeros(1, SERVER_DTYPE)
        self._work = np.zeros(1, WORK_DTYPE)
        self._work_row = self._work.view(np.float64)

    def reset(self, seed: int) -> None:
        """Draw the request stream of `seed` and start with an empty queue."""
        scenario = self._problem.scenario
        # The live workload plays the same stream.
        self._stream: RequestStream = draw_stream(
            scenario.traffic, seed, scenario.episode_s + 1, self._problem.capacity_rps
        )
        _start_one(self._weights, self._purse, self._problem.purse, self._server)

    def run(self, knobs: Knobs, duration_s: float, serve_deferrable: bool = True) -> WorkStats:
        """Serve one interval. `duration_s` must be the scenario's interval."""
        problem = self._problem
        if duration_s != problem.scenario.interval_s:
            raise ValueError(f"the profiled workload runs whole intervals of {problem.scenario.interval_s} s")
        known = self._known.get(knobs)
        if known is None:
            index = problem.knobs.index(knobs)
            k, b = index[2], index[0]
            tokens = np.ascontiguousarray(problem.expert_tokens[k, b])
            known = self._known[knobs] = index, tokens, problem.device_share[k, b]
        index, tokens, device_share = known
        histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        slot_energy = np.empty(self._slots)
        _serve_one(
            *self._tables, self._terms, problem.knobs.level_table, index, self._stream.arrivals,
            self._stream.shift_id, self._clock(), serve_deferrable, self._weights, self._purse, self._server,
            self._work, histogram, slot_energy,
        )  # fmt: skip
        values: dict[str, Any] = dict(zip(STAT_NAMES, self._work_row.tolist(), strict=True))
        answered = values["answered_interactive"] + values["answered_deferrable"]
        values["latency_histogram"] = histogram
        values["tokens_per_expert"] = tokens * answered
        values["slot_energy_j"] = slot_energy
        values["device_share"] = device_share
        return frozen(WorkStats, values)

    def close(self) -> None:
        """Nothing to release."""
