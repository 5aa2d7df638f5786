"""The request queue, once, for the live service and for the twin.

Requests arrive in slots of `SLOT_S` seconds, evenly spaced inside a slot, so the whole stream of a
class is one cumulative count per slot (`arrivals`, int32 [classes, slots + 1]) and request number r is known
by its number alone. The queue then needs one integer per class: the number of the next request to
serve. A million waiting requests cost as much as one.

All functions are pure, scalar and compiled; times are seconds of the service's clock, or seconds into
a slot where they say so. `moe.service.batching` launches many batches of a slot at once.
"""

from __future__ import annotations

import math

import numpy as np

from moe.compiled import inlined, jit, small
from moe.workload import LATENCY_EDGES_S

SLOT_S = 0.25
"""Width of an arrival slot. Counts are drawn per slot; inside it requests are evenly spaced."""

INTERACTIVE, DEFERRABLE = 0, 1

_LAST_BIN = len(LATENCY_EDGES_S)
_NODES_PER_OCTAVE = 32
"""So many that no two bins begin within a node."""
_NODE_BITS = 52 - int(math.log2(_NODES_PER_OCTAVE))
_FIRST_OCTAVE, _END_OCTAVE = -10, 8
"""Powers of 2, in seconds, around all edges."""
_FIRST_BITS = int(np.float64(2.0**_FIRST_OCTAVE).view(np.int64))


_BIN_BEGINS = np.concatenate([[-math.inf], LATENCY_EDGES_S, [math.inf]])
"""The first latency of every bin, and of none behind the last."""


def _bin_of_nodes() -> np.ndarray:
    """The bin in which each node begins: looked up, a bin costs a third of what its logarithm does."""
    octave, node = np.divmod(np.arange((_END_OCTAVE - _FIRST_OCTAVE) * _NODES_PER_OCTAVE), _NODES_PER_OCTAVE)
    begins = 2.0 ** (octave + _FIRST_OCTAVE) * (1.0 + node / _NODES_PER_OCTAVE)
    return np.searchsorted(_BIN_BEGINS, begins, side="right") - 1


_BIN_OF_NODE = _bin_of_nodes()


@small
def arrived_in_slot(in_slot, t):
    """How many of a slot's `in_slot` requests have arrived `t` seconds into it (0 <= t)."""
    return min(int(t / SLOT_S * in_slot + 0.5), in_slot)


@jit
def arrived_by(arrivals, c, t):
    """Number of requests of class `c` that have arrived by time `t`."""
    slots = arrivals.shape[1] - 1
    position = t / SLOT_S
    if position <= 0.0:
        return 0
    if position >= slots:
        return int(arrivals[c, slots])
    slot = int(position)
    return int(arrivals[c, slot]) + arrived_in_slot(
        arrivals[c, slot + 1] - arrivals[c, slot], t - slot * SLOT_S
    )


@jit
def slot_of(arrivals, c, request, guess):
    """Slot in which `request` arrives, searched upward from `guess` (a slot not later than it)."""
    slot = guess
    while arrivals[c, slot + 1] <= request:
        slot += 1
    return slot


@jit
def arrival_time(arrivals, c, request, slot):
    """Arrival time of `request`, which lies in `slot`."""
    in_slot = arrivals[c, slot + 1] - arrivals[c, slot]
    return (slot + (request - arrivals[c, slot] + 0.5) / in_slot) * SLOT_S


@jit
def oldest_arrival(arrivals, c, next_request, head_slot, t):
    """Arrival time of the oldest waiting request, or infinity when none waits at `t`."""
    if next_request >= arrived_by(arrivals, c, t):
        return math.inf
    return arrival_time(arrivals, c, next_request, slot_of(arrivals, c, next_request, head_slot))


@small
def oldest_in_slot(arrivals, c, next_request, head_slot, slot):
    """When the oldest unserved request of a class arrives, if it does so before the slot ends.

    Args:
        arrivals: int32 [classes, slots + 1], cumulative arrivals.
        c: class.
        next_request: the first unserved one.
        head_slot: a slot not later than its.
        slot: the slot.

    Returns:
        (seconds into the slot: below 0 for one of an earlier slot, infinity for one of a later; its slot, or
        `slot` if it comes later)
    """
    if next_request >= arrivals[c, slot + 1]:
        return math.inf, slot
    if next_request >= arrivals[c, slot]:
        head_slot = slot
    else:
        head_slot = slot_of(arrivals, c, next_request, head_slot)
    in_slot = arrivals[c, head_slot + 1] - arrivals[c, head_slot]
    position = head_slot - slot + (next_request - arrivals[c, head_slot] + 0.5) / in_slot
    return position * SLOT_S, head_slot


@inlined
def next_launch(now, batch_size, queued, in_slot, arrived, due):
    """Earliest time from `now` on at which a batch is due, in seconds into a slot; infinity for a later slot.

    A batch is due when `batch_size` requests wait or the oldest of a class has waited long enough.

    Args:
        now: when the device is free.
        batch_size: requests per batch.
        queued: requests waiting at the slot's beginning, less those of the slot that were served.
        in_slot: requests that arrive in the slot.
        arrived: how many of them by `now`.
        due: end of the oldest request's wait.
    """
    if queued + arrived >= batch_size:
        return now
    if queued + in_slot >= batch_size:
        due = min(due, (batch_size - queued) / in_slot * SLOT_S)
    due = max(due, now)
    return due if due < SLOT_S else math.inf


@inlined
def expire(arrivals, c, next_request, head_slot, t, expire_after_s):
    """Drop the requests of one class that have waited longer than `expire_after_s` at `t`.

    Returns:
        (next_request, head_slot, number expired)
    """
    since = t - expire_after_s
    if head_slot * SLOT_S >= since:
        return next_request, head_slot, 0
    # Whoever is left arrives after that.
    head_slot = min(int(since / SLOT_S), arrivals.shape[1] - 2)
    if arrivals[c, head_slot + 1] <= next_request:
        return next_request, head_slot, 0
    left = max(arrived_by(arrivals, c, since), next_request)
    return left, head_slot, left - next_request


@jit
def late_count(arrivals, c, first, last, completion, deadline_s):
    """How many of the requests [first, last) miss `deadline_s` when answered at `completion`.

    The late ones are the oldest, so the on-time ones are the last of the range.
    """
    return min(max(arrived_by(arrivals, c, completion - deadline_s) - first, 0), last - first)


@jit
def latency_bin(latency_s):
    """Index of the latency histogram's bin."""
    if latency_s < LATENCY_EDGES_S[0]:
        return 0
    if latency_s >= _BIN_BEGINS[_LAST_BIN]:
        return _LAST_BIN
    b = _BIN_OF_NODE[(np.float64(latency_s).view(np.int64) - _FIRST_BITS) >> _NODE_BITS]
    return b + 1 if latency_s >= _BIN_BEGINS[b + 1] else b


@jit
def record_latencies(arrivals, c, first, last, head_slot, completion, histogram):
    """Add the latencies of requests [first, last), answered at `completion`, to `histogram`.

    Args:
        arrivals: int32 [classes, slots + 1], cumulative arrivals.
        c: class.
        first: first request.
        last: the one after the last.
        head_slot: a slot not later than that of `first`.
        completion: when they were answered.
        histogram: int64 [bins]; added to.
    """
    slot, request = head_slot, first
    while request < last:
        slot = slot_of(arrivals, c, request, slot)
        end = min(last, int(arrivals[c, slot + 1]))
        longest = completion - arrival_time(arrivals, c, request, slot)
        rate = (arrivals[c, slot + 1] - arrivals[c, slot]) / SLOT_S
        at, counted, requests = latency_bin(longest), 0, end - request
        while at > 0 and counted < requests:  # one bin after the other, from the longest latency down
            upto = min(1 + int((longest - LATENCY_EDGES_S[at - 1]) * rate), requests)
            histogram[at] += upto - counted
            counted = upto
            at -= 1
        histogram[at] += requests - counted
        request = end


def latency_quantile(histogram: np.ndarray, q: float) -> float:
    """Quantile of the recorded latencies in seconds, NaN when nothing was answered.

    Within a bin they are taken to lie evenly on its logarithmic scale.

    Args:
        histogram: int64 [bins], as in `WorkStats.latency_histogram`.
        q: quantile in [0, 1].
    """
    counts = np.cumsum(histogram)
    if counts[-1] == 0:
        return math.nan
    wanted = max(1.0, q * counts[-1])  # the first request is the 0-quantile
    index = int(np.searchsorted(counts, wanted))
    within = 1.0 - (counts[index] - wanted + 0.5) / histogram[index]
    edges = np.concatenate(([LATENCY_EDGES_S[0] * 0.5], LATENCY_EDGES_S, [LATENCY_EDGES_S[-1]]))
    return float(edges[index] * (edges[index + 1] / edges[index]) ** min(1.0, max(0.0, within)))
