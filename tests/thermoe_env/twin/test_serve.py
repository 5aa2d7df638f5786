"""The profiled service, which advances batches alike at once, against one that launches every batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.profiles import Profile
from moe.service.adaptation import adapt, answer_quality, start_unadapted
from moe.service.queueing import SLOT_S, latency_quantile
from moe.workload import LATENCY_EDGES_S, Knobs
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.workload import TwinWorkload

SECONDS = 8


@dataclass
class Sums:
    """What a service did; counts per class [2]."""

    answered: np.ndarray = field(default_factory=lambda: np.zeros(2))
    late: np.ndarray = field(default_factory=lambda: np.zeros(2))
    expired: np.ndarray = field(default_factory=lambda: np.zeros(2))
    good: float = 0.0
    confidence: float = 0.0
    batches: int = 0
    busy_s: float = 0.0
    energy_j: float = 0.0
    latencies: list[np.ndarray] = field(default_factory=list)


def batch_cost(p: Profile, knobs: Knobs, n: int) -> tuple[float, float, float]:
    """(latency, time of the adaptation, energy of both), interpolated from the profile itself."""
    assert p.energy_j is not None and p.ttt_latency_s is not None and p.ttt_energy_j is not None

    def along_batch(column: np.ndarray) -> float:
        return float(np.interp(n, p.batch_size, column))

    k = list(p.expert_count).index(knobs.expert_count)
    latency, energy = (
        along_batch(np.array([np.interp(knobs.routing_bias, p.cost_bias, row) for row in table[:, k]]))
        for table in (p.latency_s, p.energy_j)
    )
    steps = knobs.ttt_steps
    return (
        latency,
        steps * along_batch(p.ttt_latency_s[:, k]),
        energy + steps * along_batch(p.ttt_energy_j[:, k]),
    )


class BatchByBatch:
    """The service written plainly: a list of arrivals per class, one batch after another."""

    def __init__(self, problem: Problem, arrivals: np.ndarray, shift: int) -> None:
        self.problem, self.shift = problem, shift
        self.times = [
            np.concatenate(
                [(s + (np.arange(n) + 0.5) / n) * SLOT_S for s, n in enumerate(np.diff(row)) if n] or [[]]
            )
            for row in arrivals
        ]
        self.next, self.free_at = [0, 0], 0.0
        self.weights = np.zeros(len(problem.profile.shifts) + 1)
        start_unadapted(self.weights)
        self.ends: list[tuple[float, float, float]] = []

    def waiting(self, c: int, t: float) -> int:
        return int(np.searchsorted(self.times[c], t + 1e-12, side="right")) - self.next[c]

    def due(self, now: float, slot_end: float, knobs: Knobs, classes: int) -> float:
        service = self.problem.scenario.service
        if sum(self.waiting(c, now) for c in range(classes)) >= knobs.batch_size:
            return now
        due = math.inf
        for c in range(classes):
            if self.waiting(c, slot_end) > 0:
                due = min(due, self.times[c][self.next[c]] + service.max_wait_s[c])
        coming = np.sort(
            np.concatenate([self.times[c][self.next[c] :][: knobs.batch_size] for c in range(classes)])
        )
        if len(coming) >= knobs.batch_size:
            due = min(due, coming[knobs.batch_size - 1])
        return max(now, due)

    def run(self, knobs: Knobs, second: int, classes: int) -> Sums:
        sums, p, service = Sums(), self.problem.profile, self.problem.scenario.service
        k = list(p.expert_count).index(knobs.expert_count)
        b = self.problem.knobs.levels["routing_bias"].index(knobs.routing_bias)
        for slot in range(round(second / SLOT_S), round((second + 1) / SLOT_S)):
            start, end = slot * SLOT_S, (slot + 1) * SLOT_S
            for c in range(2):
                gone = max(0, self.waiting(c, start - service.expire_after_s[c]))
                self.next[c] += gone
                sums.expired[c] += gone
            accuracy, confidence, _ = answer_quality(self.problem.tables, self.weights, self.shift, k, b)
            now, launched = max(start, self.free_at), 0
            while now < end and classes:
                t = self.due(now, end, knobs, classes)
                if t >= end:
                    break
                room, taken = knobs.batch_size, [0, 0]
                for c in range(classes):
                    taken[c] = min(self.waiting(c, t), room)
                    room -= taken[c]
                latency, ttt, energy = batch_cost(p, knobs, sum(taken))
                for c in range(2):
                    waits = t + latency - self.times[c][self.next[c] : self.next[c] + taken[c]]
                    late = int(np.sum(waits > service.deadline_s[c]))
                    sums.answered[c] += taken[c]
                    sums.late[c] += late
                    sums.good += accuracy * (taken[c] - late)
                    sums.latencies.append(waits)
                    self.next[c] += taken[c]
                sums.confidence += confidence * sum(taken)
                sums.batches += 1
                launched += 1
                self.ends.append((t, t + latency + ttt, energy / (latency + ttt)))
                self.free_at = now = t + (latency + ttt) / knobs.pace
            for _ in range(launched * knobs.ttt_steps):
                assert p.adapt_rate is not None
                adapt(self.weights, self.shift, 1, p.adapt_rate)
        for begin, stop, power in self.ends:
            inside = max(0.0, min(stop, second + 1) - max(begin, second))
            sums.busy_s += inside
            sums.energy_j += inside * power
        return sums


def play(
    problem: Problem, seed: int, knobs: list[Knobs], classes: list[int]
) -> tuple[Sums, Sums, np.ndarray]:
    """(twin, batch by batch, the twin's histogram) over one second of each setting."""
    workload = TwinWorkload(problem, lambda: 1.0)
    workload.reset(seed)
    workload._here.shift[:] = workload._here.shift[0, 0]
    plain = BatchByBatch(problem, workload._here.arrivals[0], int(workload._here.shift[0, 0]))
    twin, reference, histogram = Sums(), Sums(), np.zeros(len(LATENCY_EDGES_S) + 1, np.int64)
    for second, (setting, n) in enumerate(zip(knobs, classes, strict=True)):
        stats, sums = workload.run(setting, 1.0, n), plain.run(setting, second, n)
        histogram += stats.latency_histogram
        for name in ("answered", "late", "expired"):
            getattr(twin, name)[:] += getattr(stats, name)
            getattr(reference, name)[:] += getattr(sums, name)
        twin.good, reference.good = twin.good + stats.good, reference.good + sums.good
        answers = sum(stats.answered)
        twin.confidence += stats.confidence * answers
        reference.confidence += sums.confidence
        twin.batches, reference.batches = twin.batches + int(stats.batches), reference.batches + sums.batches
        twin.busy_s, reference.busy_s = twin.busy_s + stats.busy_s, reference.busy_s + sums.busy_s
        assert stats.slot_energy_j is not None
        twin.energy_j += stats.slot_energy_j.sum()
        reference.energy_j += sums.energy_j
        reference.latencies += sums.latencies
    return twin, reference, histogram


settings_of_a_second = st.tuples(
    *(st.integers(0, 2) for _ in range(4)), st.sampled_from([0.6, 1.0]), st.sampled_from([0, 1, 1, 2, 2, 2])
)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    load=st.floats(0.02, 2.5),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seconds=st.lists(settings_of_a_second, min_size=SECONDS, max_size=SECONDS),
    steady=st.booleans(),
)
def test_equals_a_service_that_launches_every_batch(
    problem: Problem, seed, load, share, seconds, steady
) -> None:
    """Over rates from idle to a growing backlog, and knobs that change every second or never."""
    traffic = {"kind": "poisson", "low_load": load, "high_load": load, "interactive_share": share}
    scenario = load_scenario(problem.scenario, traffic=traffic, episode_s=12)
    levels = problem.knobs.levels
    knobs = [
        Knobs(
            routing_bias=levels["routing_bias"][2 * bias],
            batch_size=int(levels["batch_size"][2 * batch]),
            expert_count=int(levels["expert_count"][experts]),
            ttt_steps=ttt,
            pace=pace,
        )
        for bias, batch, experts, ttt, pace, _ in (seconds[:1] * SECONDS if steady else seconds)
    ]
    classes = [2 if share == 0.0 else n for *_, n in seconds]
    twin, plain, histogram = play(Problem.of(scenario), seed, knobs, classes)
    total = plain.answered.sum() + 1.0
    # A batch may fall on either side of an interval's end: one where the knobs stay, some where they change.
    edges = 1 if steady else 3
    batch = edges * max(k.batch_size for k in knobs)
    costs = [batch_cost(problem.profile, k, k.batch_size) for k in knobs]
    one_energy_j, one_busy_s = max(energy for *_, energy in costs), max(run + ttt for run, ttt, _ in costs)
    assert twin.energy_j == pytest.approx(plain.energy_j, rel=0.01, abs=edges * one_energy_j)
    assert twin.busy_s == pytest.approx(plain.busy_s, rel=0.005, abs=edges * one_busy_s)
    assert np.abs(twin.answered - plain.answered).sum() <= batch + 0.002 * total
    assert np.abs(twin.expired - plain.expired).sum() <= batch + 0.002 * total
    assert np.abs(twin.late - plain.late).sum() <= batch + 0.005 * total
    assert twin.good == pytest.approx(plain.good, abs=batch + 0.005 * total)
    assert twin.confidence == pytest.approx(plain.confidence, abs=batch + 0.002 * total)
    assert histogram.sum() == twin.answered.sum()
    if total > 1000.0:
        latencies = np.concatenate(plain.latencies)
        for q in (0.5, 0.95):
            # A bin is 5% wide, and its middle stands for it.
            assert latency_quantile(histogram, q) == pytest.approx(np.quantile(latencies, q), rel=0.12)
