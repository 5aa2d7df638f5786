"""The compiled queue against a list of requests, one by one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.service.queueing import (
    SLOT_S,
    arrival_time,
    arrived_by,
    expire,
    late_count,
    latency_quantile,
    next_launch,
    oldest_arrival,
    oldest_in_slot,
    record_latencies,
    slot_of,
)
from moe.workload import LATENCY_EDGES_S

counts = st.lists(st.integers(0, 7), min_size=1, max_size=12)
times = st.floats(-0.5, 4.0)


def cumulative(per_slot: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(per_slot))).astype(np.int32)


def arrival_list(per_slot: list[int]) -> list[float]:
    """Arrival time of every request: evenly spaced inside its slot."""
    return [(slot + (j + 0.5) / n) * SLOT_S for slot, n in enumerate(per_slot) for j in range(n)]


def clear_of(t: float, moments: list[float]) -> bool:
    """Whether rounding cannot decide on which side of `t` a moment lies."""
    return all(abs(t - moment) > 1e-9 for moment in moments)


@given(counts, times)
def test_arrived_by_counts_the_requests_before_t(per_slot, t):
    arrivals = arrival_list(per_slot)
    if clear_of(t, arrivals):
        assert arrived_by(cumulative(per_slot)[None], 0, t) == sum(a <= t for a in arrivals)


@given(counts)
def test_arrival_time_of_every_request(per_slot):
    cumulated, slot = cumulative(per_slot), 0
    for request, expected in enumerate(arrival_list(per_slot)):
        slot = slot_of(cumulated[None], 0, request, slot)
        assert arrival_time(cumulated[None], 0, request, slot) == pytest.approx(expected)


@given(counts, times, st.integers(0, 10))
def test_oldest_arrival_is_that_of_the_first_unserved_request(per_slot, t, served):
    arrivals = arrival_list(per_slot)
    served = min(served, len(arrivals))
    if clear_of(t, arrivals):
        waiting = [a for a in arrivals[served:] if a <= t]
        expected = min(waiting, default=math.inf)
        assert oldest_arrival(cumulative(per_slot)[None], 0, served, 0, t) == pytest.approx(expected)


@given(counts, times, st.floats(0.01, 0.3), st.integers(0, 10))
def test_expire_drops_exactly_the_requests_that_waited_too_long(per_slot, t, limit_s, served):
    arrivals = arrival_list(per_slot)
    served = min(served, sum(a <= t for a in arrivals))
    if clear_of(t - limit_s, arrivals):
        next_request, head, expired = expire(cumulative(per_slot)[None], 0, served, 0, t, limit_s)
        assert expired == sum(t - a > limit_s for a in arrivals[served:])
        assert next_request == served + expired
        if next_request < len(arrivals):
            assert head * SLOT_S <= arrivals[next_request]


@given(counts, st.floats(0.0, 1.5), st.floats(0.01, 0.5), st.data())
def test_late_requests_are_the_first_of_the_batch(per_slot, extra_s, deadline_s, data):
    arrivals = arrival_list(per_slot)
    first = data.draw(st.integers(0, len(arrivals)))
    last = data.draw(st.integers(first, len(arrivals)))
    completion = (arrivals[last - 1] if last else 0.0) + extra_s
    if clear_of(completion - deadline_s, arrivals):
        late = [completion - a > deadline_s for a in arrivals[first:last]]
        assert late_count(cumulative(per_slot)[None], 0, first, last, completion, deadline_s) == sum(late)
        assert late == sorted(late, reverse=True)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.floats(0.0, 3.0), st.data())
def test_latencies_are_recorded_within_their_bins(per_slot, extra_s, data):
    """However wide a slot: each latency is in its bin, up to rounding at the edges."""
    arrivals = arrival_list(per_slot)
    first = data.draw(st.integers(0, len(arrivals)))
    last = data.draw(st.integers(first, len(arrivals)))
    completion = (arrivals[last - 1] if last else 0.0) + extra_s
    histogram = np.zeros(len(LATENCY_EDGES_S) + 1, np.int64)
    record_latencies(cumulative(per_slot)[None], 0, first, last, 0, completion, histogram)
    assert histogram.sum() == last - first
    latencies = np.array([completion - a for a in arrivals[first:last]])
    for shift in (-1e-9, 1e-9):  # on which side of an edge a latency lies, rounding may decide
        latencies = latencies + shift
        expected = np.bincount(np.searchsorted(LATENCY_EDGES_S, latencies, side="right"), minlength=242)
        if shift < 0.0:
            low = np.cumsum(histogram) <= np.cumsum(expected)
        else:
            assert np.all(low) and np.all(np.cumsum(histogram) >= np.cumsum(expected))
        latencies = latencies - shift


def launch_after(cumulated, served, slot, now, batch_size, max_wait, both):
    """`next_launch` as the services call it: its time since the stream began."""
    start, due, classes = slot * SLOT_S, math.inf, 2 if both else 1
    for c in range(classes):
        due = min(due, oldest_in_slot(cumulated, c, served[c], 0, slot)[0] + max_wait[c])
    queued = sum(int(cumulated[c, slot]) - served[c] for c in range(classes))
    in_slot = sum(int(cumulated[c, slot + 1] - cumulated[c, slot]) for c in range(classes))
    arrived = sum(arrived_by(cumulated, c, now) - int(cumulated[c, slot]) for c in range(classes))
    return start + next_launch(now - start, batch_size, queued, in_slot, arrived, due)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=10),
    st.integers(1, 12),
    st.floats(0.0, 1.0),
    st.tuples(st.floats(0.01, 0.8), st.floats(0.01, 1.6)),
    st.booleans(),
    st.data(),
)
def test_next_launch_is_when_a_batch_is_full_or_a_wait_is_over(
    slots, batch_size, phase, max_wait, both, data
):
    lists = [arrival_list([n[c] for n in slots]) for c in range(2)]
    cumulated = np.stack([cumulative([n[c] for n in slots]) for c in range(2)])
    slot = data.draw(st.integers(0, len(slots) - 1))
    now, until = (slot + phase * 0.999) * SLOT_S, (slot + 1) * SLOT_S
    served = [data.draw(st.integers(0, int(arrived_by(cumulated, c, now)))) for c in range(2)]
    queues = [lists[c][served[c] :] for c in range(2 if both else 1)]

    due = launch_after(cumulated, served, slot, now, batch_size, max_wait, both)

    in_time = sorted(a for queue in queues for a in queue if a <= until)
    waits = [queue[0] + max_wait[c] for c, queue in enumerate(queues) if queue and queue[0] <= until]
    # The moment a batch fills is interpolated inside a slot: the true one bounds it from both sides.
    filled = in_time[batch_size - 1] if len(in_time) >= batch_size else math.inf
    earliest = max(now, min([*waits, filled if filled <= now else now]))
    latest = max(now, min([*waits, until if filled < math.inf else math.inf]))
    if due == math.inf:
        assert latest > until - 1e-9
    else:
        assert now - 1e-9 <= due <= until
        assert earliest - 1e-9 <= due <= latest + 1e-9
        if filled <= now - 1e-9:
            assert due == pytest.approx(now)


def test_a_batch_of_one_class_fills_when_its_last_request_comes():
    cumulated = np.stack([cumulative([0, 10]), cumulative([0, 0])])
    due = launch_after(cumulated, [0, 0], 1, SLOT_S, 5, (9.0, 9.0), True)
    assert due == pytest.approx(1.5 * SLOT_S)  # evenly spaced: half of the slot brings half of its requests


@given(counts, st.integers(0, 11), st.integers(0, 60))
def test_oldest_in_slot_is_the_first_unserved_request_up_to_the_slot_s_end(per_slot, slot, served):
    arrivals = arrival_list(per_slot)
    slot = min(slot, len(per_slot) - 1)
    served = min(served, len(arrivals))
    oldest, head = oldest_in_slot(cumulative(per_slot)[None], 0, served, 0, slot)
    waiting = [a for a in arrivals[served:] if a <= (slot + 1) * SLOT_S]
    assert oldest + slot * SLOT_S == pytest.approx(min(waiting, default=math.inf))
    assert head <= slot
    if waiting:
        assert head == int(waiting[0] / SLOT_S)


@given(
    st.lists(st.floats(2e-3, 200.0), min_size=1, max_size=50),
    st.sampled_from([0.0, 0.1, 0.5, 0.95, 0.99, 1.0]),
)
def test_quantile_lies_within_a_bin_of_the_sorted_list(latencies, q):
    histogram = np.zeros(len(LATENCY_EDGES_S) + 1, np.int64)
    np.add.at(histogram, np.searchsorted(LATENCY_EDGES_S, latencies, side="right"), 1)
    expected = np.quantile(latencies, q, method="inverted_cdf")
    assert latency_quantile(histogram, q) == pytest.approx(expected, rel=0.06)


def test_quantile_of_nothing_is_not_a_number():
    assert math.isnan(latency_quantile(np.zeros(len(LATENCY_EDGES_S) + 1, np.int64), 0.5))
