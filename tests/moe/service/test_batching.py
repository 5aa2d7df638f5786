"""Batches alike against a list of requests, one by one."""

import numpy as np

from moe.service.batching import late_in_regular_group
from moe.service.queueing import SLOT_S


def test_the_late_of_a_group_are_those_of_its_batches_on_average():
    """Every launch takes all that waits. Rounding may err by some, but leans to neither side."""
    rng, errors, late = np.random.default_rng(0), [], 0
    for _ in range(400):
        in_slot, launches = int(rng.integers(20, 60)), int(rng.integers(2, 6))
        period = SLOT_S / launches * rng.uniform(0.8, 1.0)
        start = rng.uniform(0.2, 1.0) * (SLOT_S - (launches - 1) * period)
        arrived = (np.arange(in_slot) + 0.5) / in_slot * SLOT_S
        launched = start + period * np.arange(launches)
        taken = int(np.sum(arrived <= launched[-1]))
        answered = launched[np.searchsorted(launched, arrived[:taken])]
        latency, deadline = rng.uniform(0.01, 0.05), rng.uniform(0.04, 0.08)
        exact = int(np.sum(answered + latency - arrived[:taken] > deadline))
        found = late_in_regular_group(
            np.array([[0, in_slot]], np.int32), 0, 0, 0, int(np.sum(arrived <= start)), taken, start, period,
            launches, latency, deadline,
        )  # fmt: skip
        errors.append(found - exact)
        late += exact
    assert late > 1000 and np.abs(errors).max() <= 3
    assert abs(np.mean(errors)) < 0.1
