"""One pass per request, compiled: the real queue and batching of `moe.service`, served at measured cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe.compiled import copy_row, inlined, inner, small
from moe.memory import as_record, prefetch
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
from thermoe_env.device.physics import clock_power_factor
from thermoe_env.problem.problem import NODES_PER_OCTAVE, Problem
from thermoe_env.twin.service import Service, implement, slowest

KNOBS_READ = ("routing_bias", "batch_size", "expert_count", "ttt_steps", "pace", "sm_clock")
"""Those that move something here."""

SERVER_DTYPE = np.dtype(
    [
        ("next", np.int64, (2,)),  # per class, the first unserved request
        ("head", np.int64, (2,)),  # and a slot not later than its
        ("free_in_s", np.float64),  # when the device is free
        ("tail_s", np.float64),  # what the running batch still needs
        ("tail_power_w", np.float64),  # and its power
    ]
)
"""The queue and the running batch between two intervals."""

ADAPTED = 1e-12
"""Weight of all other states of the model below which adaptation to a shift is over."""

ALIKE = 0.02
"""Sizes of batches that differ by less than this share are taken as one size."""

_ONE = int(np.float64(1.0).view(np.int64))
_NODE_BITS = 52 - int(math.log2(NODES_PER_OCTAVE))
_IN_NODE, _PER_NODE = 2**_NODE_BITS - 1, 2.0**-_NODE_BITS


class Terms(NamedTuple):
    """Terms of service per class, as compiled code reads them."""

    deadline_s: np.ndarray  # [2]
    max_wait_s: np.ndarray  # [2]
    expire_after_s: np.ndarray  # [2]
    slots: int
    """Slots per interval."""


class Score(NamedTuple):
    """What does not change: the fields of `thermoe_env.problem.problem.Tables`, and two more."""

    cost: np.ndarray
    answer_pure: np.ndarray
    answer_mixed: np.ndarray
    adapt_rate: float
    load_imbalance: np.ndarray
    terms: np.ndarray
    """`Terms`, an array of one record."""
    device_share: np.ndarray
    """[K, B, D] share of the work's energy that each device takes; its time is that of one device."""
    fresh_purse: np.ndarray
    """What adaptation may spend at an episode's start, see `moe.service.budget`."""


class ScoreState(NamedTuple):
    """What is carried from interval to interval. S shifts."""

    server: np.ndarray
    """Records of `SERVER_DTYPE` [n]."""
    weights: np.ndarray
    """float64 [n, S + 1]: the adaptation."""
    purse: np.ndarray
    """float64 [n, ...]: what it may spend."""


class Cost(NamedTuple):
    """Of a micro-batch, and of one adaptation step after it."""

    latency_s: float
    energy_j: float
    ttt_latency_s: float
    ttt_energy_j: float


class Group(NamedTuple):
    """Batches alike that are launched one after the other, see `moe.service.batching`."""

    start: float
    period: float
    launches: int
    full: bool
    crowded: bool
    """Full of interactive requests."""


def score_service(problem: Problem) -> Service:
    """The service of a problem."""
    shifts, purse = len(problem.profile.shifts), problem.purse

    def new_state(n: int) -> ScoreState:
        return ScoreState(np.zeros(n, SERVER_DTYPE), np.zeros((n, shifts + 1)), np.zeros((n, len(purse))))

    fixed = Score(*problem.tables, terms_of(problem), problem.device_share, purse)
    return Service(fixed, KNOBS_READ, new_state)


def terms_of(problem: Problem) -> np.ndarray:
    """`Terms` of service of a scenario, as an array of one record."""
    service = problem.scenario.service
    slots = round(problem.scenario.interval_s / SLOT_S)
    deadline_s, max_wait_s = np.array(service.deadline_s), np.array(service.max_wait_s)
    return as_record(Terms(deadline_s, max_wait_s, np.array(service.expire_after_s), slots))


@small
def batch_cost(cost, n):
    """Cost of a micro-batch of `n` requests (a mean over several need not be whole), at full clock.

    Args:
        cost: float [M, 4], `Tables.cost` under the knobs in force.
        n: requests, at least 1.
    """
    # Exponent and first bits of the fraction of a float are the octave and the node in it.
    bits = np.float64(n).view(np.int64) - _ONE
    i, w = bits >> _NODE_BITS, (bits & _IN_NODE) * _PER_NODE
    return Cost(
        cost[i, 0] + w * (cost[i + 1, 0] - cost[i, 0]),
        cost[i, 1] + w * (cost[i + 1, 1] - cost[i, 1]),
        cost[i, 2] + w * (cost[i + 1, 2] - cost[i, 2]),
        cost[i, 3] + w * (cost[i + 1, 3] - cost[i, 3]),
    )


@inlined
def drop_expired(terms, arrivals, slot, server, work):
    """Take out of the queue who has waited too long when a slot begins."""
    for c in range(2):
        server.next[c], server.head[c], gone = expire(
            arrivals, c, server.next[c], server.head[c], slot * SLOT_S, terms.expire_after_s[c]
        )
        work.expired[c] += gone


@inlined
def launch_time(terms, arrivals, slot, server, queued, in_slot, now, batch_size, open_classes):
    """When the next batch is launched, in seconds into the slot; infinity for a later slot."""
    arrived = arrived_in_slot(in_slot[0], now) + arrived_in_slot(in_slot[1], now)
    if queued[0] + queued[1] + arrived >= batch_size:  # no need to know who waits for longest
        return now
    due = math.inf
    for c in range(open_classes):
        oldest, server.head[c] = oldest_in_slot(arrivals, c, server.next[c], server.head[c], slot)
        due = min(due, oldest + terms.max_wait_s[c])
    return next_launch(now, batch_size, queued[0] + queued[1], in_slot[0] + in_slot[1], arrived, due)


@inlined
def group_from(terms, start, first, queued, in_slot, period, batch_size, one_by_one):
    """The group of batches alike that a first batch begins.

    Args:
        terms: `Terms`.
        start: when it is launched.
        first: per class, requests that it takes.
        queued: per class, waiting at the slot's beginning, less those of the slot served before.
        in_slot: per class, requests that arrive in the slot.
        period: its device time and the pause that the pace asks for after it.
        batch_size: most requests of a batch.
        one_by_one: whether the group must be this batch alone.
    """
    n = first[0] + first[1]
    full, crowded = n == batch_size, first[0] == batch_size
    launches = 1
    rate = (in_slot[0] / SLOT_S, in_slot[1] / SLOT_S)
    if one_by_one:
        pass
    elif crowded or (full and rate[0] * period <= batch_size):
        waiting, fed = queued[0] + arrived_in_slot(in_slot[0], start), rate[0]
        if not crowded:
            waiting += queued[1] + arrived_in_slot(in_slot[1], start)
            fed += rate[1]
        launches = full_launches(start, period, waiting, fed, batch_size)
    elif not full and in_slot[0] + in_slot[1] > 0:
        # A device that is busy for longer than requests wait launches whenever it is free.
        period = max(period, trigger_period(batch_size, rate, terms.max_wait_s))
        expected = (rate[0] + rate[1]) * period
        if abs(expected - n) <= ALIKE * n + 1.0 and expected <= batch_size + 0.5:
            launches = launches_before_end(start, period)
    return Group(start, period, launches, full, crowded)


@inlined
def late_of(c, backlog, terms, arrivals, slot, server, first, taken, group, latency):
    """How many requests of class `c` a group answers late; `backlog` says that its launches share one."""
    if backlog:
        return late_in_backlog(
            arrivals, c, slot, server.next[c], server.head[c], taken[c], group.start, group.period,
            group.launches, latency, terms.deadline_s[c],
        )  # fmt: skip
    return late_in_regular_group(
        arrivals, c, slot, server.next[c], first[c], taken[c], group.start, group.period, group.launches,
        latency, terms.deadline_s[c],
    )  # fmt: skip


def serve(
    fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, promised_s, state, i, work,
    histogram, slot_energy,
):  # fmt: skip
    """Serve one interval, see `thermoe_env.twin.service.serve`."""
    terms, server, weights, purse = fixed.terms[0], state.server[i], state.weights[i], state.purse[i]
    prefetch((arrivals[1],), server.head[1])  # far back where a queue is long, and needed at the end
    cost = fixed.cost[index.expert_count, index.routing_bias]
    batch_size, ttt_steps, pace = int(knobs.batch_size), int(knobs.ttt_steps), knobs.pace
    clock, share = slowest(clocks), fixed.device_share[index.expert_count, index.routing_bias]
    stretch, slower = 1.0 / clock, 1.0 / pace
    energy_factor = clock_power_factor(clock) * stretch
    budgeted = purse.shape[0] > 0
    full_batch = batch_cost(cost, 1.0 * batch_size)
    quality, adapted = (0.0, 0.0, 0.0), True
    # Sums over the interval: in registers, where the work's record would be read and written each time.
    correct, good, confidence, entropy = 0.0, 0.0, 0.0, 0.0
    batches, busy_s, ttt_busy_s, ttt_steps_taken = 0, 0.0, 0.0, 0
    for slot in range(first_slot, first_slot + terms.slots):
        drop_expired(terms, arrivals, slot, server, work)
        if adapted:
            quality = answer_quality(fixed, weights, shift, index.expert_count, index.routing_bias)
        in_slot = (arrivals[0, slot + 1] - arrivals[0, slot], 0)
        queued = (arrivals[0, slot] - server.next[0], 0)
        if open_classes > 1:
            in_slot = (in_slot[0], arrivals[1, slot + 1] - arrivals[1, slot])
            queued = (queued[0], arrivals[1, slot] - server.next[1])
        inside = min(server.tail_s, SLOT_S)
        server.tail_s -= inside
        busy_s += inside
        energy = inside * server.tail_power_w
        served, late_served, stepped = 0, 0, 0
        now, paid_until = server.free_in_s, 0.0
        while open_classes > 0 and now < SLOT_S:
            start = launch_time(terms, arrivals, slot, server, queued, in_slot, now, batch_size, open_classes)
            if start >= SLOT_S:
                break
            first = taken_by(start, batch_size, queued, in_slot)
            n = first[0] + first[1]
            if n == 0:  # rounding: the request that is due arrives a moment later
                now = start + 1e-9
                continue
            unit = full_batch
            if n < batch_size:
                unit = batch_cost(cost, 1.0 * n)
            steps, alone = ttt_steps, budgeted and ttt_steps > 0  # each batch is then paid for on its own
            if alone:
                steps = pay_steps(
                    purse, start - paid_until, unit.energy_j * energy_factor,
                    unit.ttt_energy_j * energy_factor, ttt_steps,
                )  # fmt: skip
                paid_until = start
                work.ttt_refused += ttt_steps - steps
            needs = (unit.latency_s + steps * unit.ttt_latency_s) * stretch
            group = group_from(terms, start, first, queued, in_slot, needs * slower, batch_size, alone)
            launches, period = group.launches, group.period
            last = start + (launches - 1) * period
            taken = first
            if launches > 1:
                taken = taken_by(last, launches * batch_size, queued, in_slot)
                if not group.full:
                    mean = min((taken[0] + taken[1]) / launches, 1.0 * batch_size)
                    unit = batch_cost(cost, max(1.0, mean))
                    # The period was set by the first batch: the mean one may not overlap with the next.
                    needs = min((unit.latency_s + steps * unit.ttt_latency_s) * stretch, period * pace)
            if budgeted and not alone:
                for number in range(launches):
                    at = start + number * period
                    earn(purse, at - paid_until, 0.0)
                    earn(purse, 0.0, unit.energy_j * energy_factor)
                    paid_until = at
            latency = unit.latency_s * stretch
            joules = (unit.energy_j + steps * unit.ttt_energy_j) * energy_factor
            if histogram.shape[0] > 0:
                _record_group(arrivals, slot, server, queued, in_slot, batch_size, group, latency, histogram)
            for c in range(2):
                backlog = group.full if c > 0 else group.crowded
                late = late_of(c, backlog, terms, arrivals, slot, server, first, taken, group, latency)
                server.next[c] += taken[c]
                work.answered[c] += taken[c]
                work.late[c] += late
                served += taken[c]
                late_served += late
            queued = (queued[0] - taken[0], queued[1] - taken[1])
            batches += launches
            stepped += launches * steps
            ttt_busy_s += launches * (steps * unit.ttt_latency_s * stretch)
            # All batches but the last end within the slot.
            inside = min(needs, SLOT_S - last)
            server.tail_s, server.tail_power_w = needs - inside, joules / needs
            busy_s += (launches - 1) * needs + inside
            energy += (launches - 1) * joules + inside * server.tail_power_w
            now = last + needs * slower
        server.free_in_s = max(0.0, now - SLOT_S)
        for d in range(share.shape[0]):
            slot_energy[slot - first_slot, d] = energy * share[d]
        correct += quality[0] * served
        good += quality[0] * (served - late_served)
        confidence += quality[1] * served
        entropy += quality[2] * served
        ttt_steps_taken += stepped
        # A model that has adapted to the shift in force stays as it is.
        adapted = stepped > 0 and weights[shift + 1] < 1.0 - ADAPTED
        if adapted:
            adapt(weights, shift, stepped, fixed.adapt_rate)
        if budgeted:
            earn(purse, SLOT_S - paid_until, 0.0)
    work.correct, work.good, work.confidence, work.entropy = correct, good, confidence, entropy
    work.batches, work.busy_s, work.ttt_busy_s = batches, busy_s, ttt_busy_s
    work.ttt_steps = ttt_steps_taken
    _sum_up(fixed, knobs, index, arrivals, first_slot, server, purse, work)
    work.sm_clock, work.shift_id = clock, shift


@inlined
def _sum_up(fixed, knobs, index, arrivals, first_slot, server, purse, work):
    """Fill what is told of an interval at its end: the queue, and means over answers and batches."""
    end_slot = first_slot + fixed.terms[0].slots
    for c in range(2):
        oldest, server.head[c] = oldest_in_slot(arrivals, c, server.next[c], server.head[c], end_slot - 1)
        work.oldest_s[c] = max(0.0, SLOT_S - oldest)
        work.arrived[c] = arrivals[c, end_slot] - arrivals[c, first_slot]
        work.waiting[c] = arrivals[c, end_slot] - server.next[c]
    answered = work.answered[0] + work.answered[1]
    work.batch_fill = answered / (max(1.0, work.batches) * int(knobs.batch_size))
    work.budget_share = share_of(purse)
    work.confidence /= max(1.0, answered)
    work.entropy /= max(1.0, answered)
    if answered > 0:
        work.load_imbalance = fixed.load_imbalance[index.expert_count, index.routing_bias]


@inner
def _record_group(arrivals, slot, server, queued, in_slot, batch_size, group, latency, histogram):
    """Add the latencies of a group's requests to `histogram`, batch by batch."""
    done = (0, 0)
    for number in range(group.launches):
        t = group.start + number * group.period
        upto = taken_by(t, (number + 1) * batch_size, queued, in_slot)
        answered_at = slot * SLOT_S + t + latency
        for c in range(2):
            first = server.next[c]
            record_latencies(
                arrivals, c, first + done[c], first + upto[c], server.head[c], answered_at, histogram
            )
        done = (max(done[0], upto[0]), max(done[1], upto[1]))


def start(fixed, seed, state, i):
    """Begin with an idle device, an empty queue and an unadapted model."""
    start_unadapted(state.weights[i])
    copy_row(state.purse[i], fixed.fresh_purse)
    server = state.server[i]
    for c in range(2):
        server.next[c] = server.head[c] = 0
    server.free_in_s = server.tail_s = server.tail_power_w = 0.0


implement(Score, start, serve)
