"""The request queue, once, for the live service and for the twin.

Requests arrive in slots of `SLOT_S` seconds, evenly spaced inside a slot, so the whole stream of a
class is one cumulative count per slot (`arrivals`, int32 [slots + 1]) and request number r is known
by its number alone. The queue then needs one integer per class: the number of the next request to
serve. A million waiting requests cost as much as one.

All functions are pure, scalar and compiled; times are seconds of the service's clock.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from moe.workload import LATENCY_EDGES_S

SLOT_S = 0.05
"""Width of an arrival slot. Counts are drawn per slot; inside it requests are evenly spaced."""

INTERACTIVE, DEFERRABLE = 0, 1

_LOG_FIRST_EDGE = math.log(LATENCY_EDGES_S[0])
_LOG_EDGE_STEP = math.log(LATENCY_EDGES_S[1] / LATENCY_EDGES_S[0])
_LAST_BIN = len(LATENCY_EDGES_S)

jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@jit
def arrived_by(arrivals, t):
    """Number of requests that have arrived by time `t`."""
    slots = arrivals.shape[0] - 1
    position = t / SLOT_S
    if position <= 0.0:
        return 0
    if position >= slots:
        return int(arrivals[slots])
    slot = int(position)
    in_slot = arrivals[slot + 1] - arrivals[slot]
    return int(arrivals[slot]) + min(math.floor((position - slot) * in_slot + 0.5), in_slot)


@jit
def slot_of(arrivals, request, guess):
    """Slot in which `request` arrives, searched upward from `guess` (a slot not later than it)."""
    slot = guess
    while arrivals[slot + 1] <= request:
        slot += 1
    return slot


@jit
def arrival_time(arrivals, request, slot):
    """Arrival time of `request`, which lies in `slot`."""
    in_slot = arrivals[slot + 1] - arrivals[slot]
    return (slot + (request - arrivals[slot] + 0.5) / in_slot) * SLOT_S


@jit
def oldest_arrival(arrivals, next_request, head_slot, t):
    """Arrival time of the oldest waiting request, or infinity when none waits at `t`."""
    if next_request >= arrived_by(arrivals, t):
        return math.inf
    return arrival_time(arrivals, next_request, slot_of(arrivals, next_request, head_slot))


@jit
def next_launch(arrivals, next_request, head_slot, now, until, batch_size, max_wait_s, serve_deferrable):
    """Earliest time in [now, until] at which a batch is due, or infinity.

    A batch is due when `batch_size` requests wait or the oldest of a served class has waited
    its `max_wait_s`.

    Args:
        arrivals: int32 [2, slots + 1], cumulative arrivals per class.
        next_request: int64 [2], first unserved request per class.
        head_slot: int64 [2], a slot not later than that request's.
        now: time the device is free.
        until: end of the slot that contains `now`.
        batch_size: requests per batch.
        max_wait_s: float [2], longest wait before a partial batch is launched.
        serve_deferrable: whether deferrable requests are served at all.
    """
    classes = 2 if serve_deferrable else 1
    waiting_now, waiting_until, due = 0, 0, math.inf
    for c in range(classes):
        waiting_now += arrived_by(arrivals[c], now) - next_request[c]
        waiting_until += arrived_by(arrivals[c], until) - next_request[c]
        oldest = oldest_arrival(arrivals[c], next_request[c], head_slot[c], until)
        due = min(due, max(now, oldest + max_wait_s[c]))
    if waiting_now >= batch_size:
        return now
    if waiting_until >= batch_size:
        missing = (batch_size - waiting_now) / (waiting_until - waiting_now)
        due = min(due, now + missing * (until - now))
    return due if due <= until else math.inf


@jit
def expire(arrivals, next_request, head_slot, t, expire_after_s):
    """Drop the requests of one class that have waited longer than `expire_after_s` at `t`.

    Returns:
        (next_request, head_slot, number expired)
    """
    limit = arrived_by(arrivals, t - expire_after_s)
    if limit <= next_request:
        return next_request, head_slot, 0
    return limit, slot_of(arrivals, limit - 1, head_slot), limit - next_request


@jit
def late_count(arrivals, first, last, completion, deadline_s):
    """How many of the requests [first, last) miss `deadline_s` when answered at `completion`.

    The late ones are the oldest, so the on-time ones are the last of the range.
    """
    return min(max(arrived_by(arrivals, completion - deadline_s) - first, 0), last - first)


@jit
def latency_bin(latency_s):
    """Index of the latency histogram's bin."""
    if latency_s < LATENCY_EDGES_S[0]:
        return 0
    return min(1 + int((math.log(latency_s) - _LOG_FIRST_EDGE) / _LOG_EDGE_STEP), _LAST_BIN)


@jit
def record_latencies(arrivals, first, last, head_slot, completion, histogram):
    """Add the latencies of requests [first, last), answered at `completion`, to `histogram`.

    Requests of one slot share the bin of their mean latency (a slot is as wide as a bin at 1 s).

    Returns:
        The slot of the last request, the next search's starting point.
    """
    slot, request = head_slot, first
    while request < last:
        slot = slot_of(arrivals, request, slot)
        end = min(last, int(arrivals[slot + 1]))
        middle = 0.5 * (arrival_time(arrivals, request, slot) + arrival_time(arrivals, end - 1, slot))
        histogram[latency_bin(completion - middle)] += end - request
        request = end
    return slot


def latency_quantile(histogram: np.ndarray, q: float) -> float:
    """Quantile of the recorded latencies in seconds, NaN when nothing was answered.

    Args:
        histogram: int64 [bins], as in `WorkStats.latency_histogram`.
        q: quantile in [0, 1].
    """
    total = histogram.sum()
    if total == 0:
        return math.nan
    index = int(
        np.searchsorted(np.cumsum(histogram), max(1.0, q * total))
    )  # the first request is the 0-quantile
    edges = np.concatenate(([LATENCY_EDGES_S[0] * 0.5], LATENCY_EDGES_S, [LATENCY_EDGES_S[-1]]))
    return float(math.sqrt(edges[index] * edges[index + 1]))
