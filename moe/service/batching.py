"""Batches alike: the launches of a slot that repeat themselves, advanced at once.

Inside a slot arrivals are evenly spaced, so a service under fixed knobs soon launches the same batch
over and over: whenever one is full, whenever the oldest request has waited its time, or whenever the device
is free. Such a group is its `start`, its `period` and the number of its `launches`, counted from 1. Each
batch takes what waits, interactive requests first. Times are seconds into the slot.
"""

from __future__ import annotations

import math

from moe.compiled import inlined, inner, small
from moe.service.queueing import SLOT_S, arrived_by, arrived_in_slot, late_count

NEVER_S = 1e9
"""Longer than any slot, and finite."""


@small
def launches_before_end(start, period):
    """Number of launches of a group that fall into the slot."""
    return max(1, math.ceil((SLOT_S - start) / period))


@inlined
def full_launches(start, period, waiting, rate, batch_size):
    """Number of full batches, one each `period`, from a queue of `waiting` fed at `rate`."""
    launches = launches_before_end(start, period)
    drain = batch_size - rate * period  # by which a launch shortens the queue
    if drain * (launches - 1) <= waiting - batch_size:
        return launches
    return 1 + int((waiting - batch_size) / drain)


@inlined
def trigger_period(batch_size, rate, max_wait):
    """Time between launches of an idle device that empties the queue each time; `NEVER_S` if irregular.

    A batch fills in `batch_size / sum of rates`. A class alone launches when its first request after a launch
    has waited, that is after 1 + floor(rate * max_wait) of its arrivals. The earliest of the three
    repeats if neither of the others can come before it.

    Args:
        batch_size: requests per batch.
        rate: per class, arrivals per second.
        max_wait: per class, how long its oldest request waits for others.
    """
    filled = batch_size / (rate[0] + rate[1])
    if filled <= min(max_wait[0], max_wait[1]):
        return filled
    for c in range(2):
        if rate[c] > 0.0:
            waited = (1.0 + math.floor(rate[c] * max_wait[c])) / rate[c]
            if waited <= filled and (waited <= max_wait[1 - c] or rate[1 - c] == 0.0):
                return waited
    return NEVER_S


@small
def taken_by(t, room, queued, in_slot):
    """Requests per class that a group takes up to its launch at `t`.

    Args:
        t: time of the launch.
        room: most requests that the launches so far may take.
        queued: per class, requests waiting at the slot's beginning, less those of the slot served before.
        in_slot: per class, requests that arrive in the slot.
    """
    interactive = min(queued[0] + arrived_in_slot(in_slot[0], t), room)
    return interactive, min(queued[1] + arrived_in_slot(in_slot[1], t), room - interactive)


@inlined
def late_in_regular_group(
    arrivals, c, slot, next_request, at_first, taken, start, period, launches, latency, deadline_s
):
    """How many requests of one class a group answers late where every launch takes all that waits.

    Args:
        arrivals: int32 [classes, slots + 1], cumulative arrivals.
        c: class.
        slot: the group's slot.
        next_request: first request of the class in the group.
        at_first: requests of the class that launch 1 takes.
        taken: requests of the class in the group.
        start: time of launch 1.
        period: time between launches.
        launches: their number.
        latency: time from a launch to its answers.
        deadline_s: of the class.
    """
    late = 0
    if start + latency > deadline_s or next_request < arrivals[c, slot]:
        completion = slot * SLOT_S + start + latency
        late = late_count(arrivals, c, next_request, next_request + at_first, completion, deadline_s)
    # A later launch takes what came since the one before it.
    over_s = min(period + latency - deadline_s, period)
    if launches == 1 or over_s <= 0.0:
        return late
    each = (arrivals[c, slot + 1] - arrivals[c, slot]) * over_s / SLOT_S
    return late + min(int((launches - 1) * each + 0.5), taken - at_first)


@inlined
def late_in_backlog(
    arrivals, c, slot, next_request, head_slot, taken, start, period, launches, latency, deadline_s
):
    """How many requests of one class a group answers late where launches take the same share of a backlog.

    Args: as in `late_in_regular_group`, and `head_slot`, a slot not later than that of the first request.
    """
    overdue = slot * SLOT_S + start + latency - deadline_s  # who arrived by then is late in launch 1
    if overdue + (launches - 1) * period <= head_slot * SLOT_S:  # as always where deadlines are long
        return 0
    return _late_in_backlog(arrivals, c, next_request, taken, overdue, period, launches)


@inner
def _late_in_backlog(arrivals, c, next_request, taken, overdue, period, launches):
    """The same, told until when requests of launch 1 have arrived that are `overdue`."""
    if arrived_by(arrivals, c, overdue) >= next_request + taken:
        return taken
    if arrived_by(arrivals, c, overdue + (launches - 1) * period) <= next_request:
        return 0
    late, done, each, rest, over = 0, 0, taken // launches, taken % launches, 0
    for number in range(launches):
        # taken * (number + 1) // launches: a division for each takes most of the time.
        upto, over = done + each, over + rest
        if over >= launches:
            upto, over = upto + 1, over - launches
        late += min(
            max(arrived_by(arrivals, c, overdue + number * period) - next_request - done, 0), upto - done
        )
        done = upto
    return late
