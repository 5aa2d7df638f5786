"""The live service on a made-up model and a made-up clock, checked request by request."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import ModelConfig
from moe.model.transformer import MoEModel, initialise
from moe.service.queueing import SLOT_S
from moe.service.score.live import LiveWorkload
from moe.service.score.runner import NonFiniteAnswersError, Runner
from moe.service.traffic import TrafficConfig
from moe.workload import KnobRefusedError, Knobs
from tests.conftest import no_host_wait
from tests.moe.service.made_up import (
    CAPACITY_RPS,
    EPSILON_S,
    EXPERTS,
    LAYERS,
    POOL,
    Clock,
    PipelinedRunner,
    ReplayingRunner,
    Samples,
    Service,
    latency_s,
    make,
)


def arrivals_of(workload) -> list[np.ndarray]:
    """Arrival time of every request of each class, spaced evenly in its slot."""
    per_slot = np.diff(workload._stream.arrivals, axis=1)
    return [
        np.concatenate(
            [(s + (np.arange(n) + 0.5) / n) * SLOT_S for s, n in enumerate(row) if n] or [np.zeros(0)]
        )
        for row in per_slot
    ]


def assert_conserved(stats, waiting_before) -> tuple[float, float]:
    arrived, answered, late, expired, waiting = map(
        np.array, (stats.arrived, stats.answered, stats.late, stats.expired, stats.waiting)
    )
    assert np.array_equal(arrived, answered + expired + waiting - waiting_before)
    assert (waiting >= 0).all() and (late <= answered).all()
    assert stats.latency_histogram.sum() == sum(stats.answered)
    assert 0 <= stats.good <= stats.correct <= sum(stats.answered)
    return stats.waiting


traffics = st.builds(
    TrafficConfig,
    kind=st.sampled_from(["poisson", "bursts", "diurnal"]),
    low_load=st.floats(0.05, 0.8),
    high_load=st.floats(0.8, 3.0),
    dwell_s=st.just(3.0),
    period_s=st.just(8.0),
    interactive_share=st.floats(0.0, 1.0),
    shifts=st.just((0, 2)),
    shift_dwell_s=st.just(4.0),
)
knob_settings = st.builds(
    Knobs,
    batch_size=st.integers(1, 40),
    expert_count=st.integers(1, EXPERTS),
    pace=st.sampled_from([0.3, 0.6, 1.0]),
)
schedules = st.lists(st.tuples(knob_settings, st.integers(0, 2)), min_size=3, max_size=6)


@pytest.mark.parametrize("runner", [None, PipelinedRunner])
@settings(max_examples=15)
@given(traffic=traffics, schedule=schedules, seed=st.integers(0, 99))
def test_requests_in_are_answered_expired_or_waiting(runner, traffic, schedule, seed):
    workload, _, launches = make(traffic, runner=runner)
    workload.reset(seed)
    waiting, totals = (0.0, 0.0), []
    for knobs, open_classes in schedule:
        stats = workload.run(knobs, 1.0, open_classes)
        waiting = assert_conserved(stats, waiting)
        totals.append(stats)
    for c in range(2):
        launched = [launch.ranges[c] for launch in launches]
        assert all(b[0] >= a[1] for a, b in itertools.pairwise(launched))  # in order, none twice
        in_batches = sum(last - first for first, last in launched)
        in_flight = sum(f.ranges[c][1] - f.ranges[c][0] for f in workload._in_flight)
        assert sum(s.answered[c] for s in totals) == in_batches - in_flight


@pytest.mark.parametrize("runner", [None, PipelinedRunner])
@settings(max_examples=15)
@given(traffic=traffics, schedule=schedules, seed=st.integers(0, 99))
def test_accounts_agree_with_every_single_request(runner, traffic, schedule, seed):
    service = Service()
    workload, _, launches = make(traffic, service, runner)
    workload.reset(seed)
    stats = [workload.run(knobs, 1.0, open_classes) for knobs, open_classes in schedule]
    arrival = arrivals_of(workload)
    for launch in launches:
        for c, (first, last) in enumerate(launch.ranges):
            assert last == first or arrival[c][last - 1] <= launch.at_s + EPSILON_S
    finished = launches[: len(launches) - len(workload._in_flight)]
    good, late = np.zeros(2, int), np.zeros((2, 2), int)  # fewest and most: rounding may decide at a deadline
    for launch in finished:
        completion = launch.batch.answered_at - workload._resumed
        right, position = launch.batch.result().correct, 0
        for c, (first, last) in enumerate(launch.ranges):
            latency = completion - arrival[c][first:last]
            for bound, epsilon in enumerate((EPSILON_S, -EPSILON_S)):
                late[c, bound] += np.sum(latency >= service.deadline_s[c] + epsilon)
                good[bound] += np.sum(
                    right[position : position + last - first] & (latency < service.deadline_s[c] - epsilon)
                )
            position += last - first
    assert good[0] <= sum(s.good for s in stats) <= good[1]
    counted = np.sum([s.late for s in stats], axis=0)
    assert (late[:, 0] <= counted).all() and (counted <= late[:, 1]).all()
    assert sum(s.correct for s in stats) == sum(launch.batch.result().correct.sum() for launch in finished)
    assert sum(s.batches for s in stats) == len(finished)


@settings(max_examples=15)
@given(traffic=traffics, knobs=knob_settings, seed=st.integers(0, 99))
def test_a_batch_is_full_or_its_oldest_request_has_waited(traffic, knobs, seed):
    service = Service(expire_after_s=(100.0, 100.0))
    workload, _, launches = make(traffic, service)
    workload.reset(seed)
    for _ in range(3):
        workload.run(knobs, 1.0)
    arrival = arrivals_of(workload)
    for launch in launches:
        (first, last), (first_d, last_d) = launch.ranges
        n = last - first + last_d - first_d
        ages = [
            (launch.at_s - arrival[c][a]) / service.max_wait_s[c]
            for c, (a, b) in enumerate(launch.ranges)
            if b > a
        ]
        assert n == knobs.batch_size or max(ages) >= 1.0 - 1e-6
        if last_d > first_d and n == knobs.batch_size:  # deferrable ones got only the room that was left
            assert last == len(arrival[0]) or arrival[0][last] >= launch.at_s - EPSILON_S


def test_the_same_seed_asks_the_same_samples_under_the_shift_in_force():
    traffic = TrafficConfig(kind="poisson", low_load=0.5, high_load=0.5, shifts=(0, 2), shift_dwell_s=2.0)
    runs = []
    for seed in (5, 5, 8):
        workload, _, launches = make(traffic)
        workload.reset(seed)
        stats = [workload.run(Knobs(batch_size=16, expert_count=1), 1.0) for _ in range(8)]
        shifts = {launch.shift for launch in launches}
        runs.append((workload.runner.model.seen, [s.shift_id for s in stats]))
        assert shifts == {0, 2}
        assert [s.shift_id for s in stats] == workload._stream.shift_id[:8].tolist()
        assert all(launch.shift == workload._stream.shift_id[int(launch.at_s)] for launch in launches)
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, last = 0, POOL // 2  # one pass through the pool meets every sample once
    workload.runner.model.seen.clear()
    workload.runner.launch([(first, last), (0, POOL - last)], 0, Knobs(expert_count=1))
    assert sorted(workload.runner.model.seen[0]) == list(range(POOL))


def test_a_device_of_its_own_never_starves_at_full_load():
    traffic = TrafficConfig(kind="poisson", low_load=3.0, high_load=3.0)
    workload, _, launches = make(traffic, Service(expire_after_s=(1e3, 1e3)), PipelinedRunner)
    workload.reset(0)
    stats = [workload.run(Knobs(batch_size=32, expert_count=1), 1.0) for _ in range(6)]
    assert sum(s.busy_s for s in stats[1:]) > 0.99 * 5.0
    assert all(s.batch_fill == 1.0 for s in stats[1:])
    # Yet a batch is chosen late: never while more than one other is under way.
    free_at = [launch.batch.freed_at - workload._resumed for launch in launches]
    assert all(launch.at_s >= free_at[i - 1] - 0.05 for i, launch in enumerate(launches) if i > 3)


def test_a_replay_is_launched_a_moment_ahead_only():
    traffic = TrafficConfig(kind="poisson", low_load=3.0, high_load=3.0)
    workload, _, launches = make(traffic, Service(expire_after_s=(1e3, 1e3)), ReplayingRunner)
    workload.reset(0)
    stats = [workload.run(Knobs(batch_size=32, expert_count=1), 1.0) for _ in range(6)]
    assert sum(s.busy_s for s in stats[1:]) > 0.99 * 5.0
    free_at = [launch.batch.freed_at - workload._resumed for launch in launches]
    ahead_s = [free_at[i - 1] - launch.at_s for i, launch in enumerate(launches) if i > 3]
    assert len(ahead_s) > 100 and 0.0 < np.median(ahead_s) and max(ahead_s) < 2e-3


def test_pace_caps_the_busy_share():
    traffic = TrafficConfig(kind="poisson", low_load=3.0, high_load=3.0)
    for runner in (None, PipelinedRunner):
        workload, _, _ = make(traffic, runner=runner)
        workload.reset(0)
        busy = sum(
            workload.run(Knobs(batch_size=16, expert_count=2, pace=0.4), 1.0).busy_s for _ in range(10)
        )
        assert 0.35 < busy / 10.0 < 0.41


def test_the_clock_stands_still_between_calls_and_intervals_do_not_drift():
    workload, clock, _ = make(TrafficConfig(kind="poisson", low_load=2.0, high_load=2.0))
    workload.reset(0)
    arrived = 0.0
    for i in range(10):
        stats = workload.run(Knobs(batch_size=40, expert_count=4), 1.0)
        arrived += sum(stats.arrived)
        clock.sleep(5.0)
        per_slot = workload._stream.arrivals.sum(axis=0)
        through = round((i + 1) / SLOT_S)
        assert per_slot[through] <= arrived <= per_slot[through + math.ceil(latency_s(40, 4) / SLOT_S) + 1]


def test_only_interactive_requests_are_served_on_demand():
    workload, _, launches = make()
    workload.reset(0)
    stats = workload.run(Knobs(batch_size=8, expert_count=1), 1.0, open_classes=1)
    assert stats.answered[1] == 0 and stats.answered[0] > 0
    assert all(launch.ranges[1] == (0, 0) for launch in launches)


@pytest.mark.parametrize("runner", [None, PipelinedRunner])
def test_a_drained_service_begins_nothing_and_ends_what_runs(runner):
    workload, _, launches = make(TrafficConfig(kind="poisson", low_load=3.0, high_load=3.0), runner=runner)
    workload.reset(0)
    knobs = Knobs(batch_size=32, expert_count=1)
    waiting = assert_conserved(workload.run(knobs, 1.0), (0.0, 0.0))
    before, running = len(launches), sum(flight.size for flight in workload._in_flight)
    drained = [workload.run(knobs, 1.0, open_classes=0) for _ in range(3)]
    assert len(launches) == before and sum(sum(s.answered) for s in drained) == running
    assert sum(drained[-1].expired) > 0.0 and drained[-1].busy_s == 0.0
    for stats in (*drained, workload.run(knobs, 1.0)):
        waiting = assert_conserved(stats, waiting)
    assert len(launches) > before


def test_what_an_interval_reports():
    workload, _, _ = make()
    workload.reset(0)
    stats = workload.run(Knobs(batch_size=20, expert_count=2), 1.0)
    answered = sum(stats.answered)
    assert stats.tokens_per_expert.tolist() == [[answered, answered, 0, 0]] * LAYERS
    assert stats.load_imbalance == pytest.approx(1.0)  # half of the experts take it all
    p = math.exp(2.0) / (math.exp(2.0) + 1.0)
    assert stats.confidence == pytest.approx(p)
    assert stats.entropy == pytest.approx(-(p * math.log2(p) + (1 - p) * math.log2(1 - p)))
    assert stats.ttt_busy_s < 1e-4 and stats.ttt_steps == 0


def test_answers_that_are_not_numbers_stop_the_service():
    workload, _, _ = make()
    workload.reset(0)
    workload.runner.model.answer = torch.tensor([math.nan, 0.0])
    with pytest.raises(NonFiniteAnswersError, match="not finite"):
        workload.run(Knobs(batch_size=8, expert_count=1), 1.0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (Knobs(sm_clock=0.8), "sets no clocks"),
        (Knobs(ttt_steps=1), "no batch norms"),
        (Knobs(expert_count=5), "has 4 experts"),
    ],
)
def test_knobs_that_cannot_be_applied_are_refused(knobs, message):
    workload, _, launches = make()
    workload.reset(0)
    with pytest.raises(KnobRefusedError, match=message):
        workload.run(knobs, 1.0)
    assert not launches and assert_conserved(workload.run(Knobs(expert_count=1), 1.0), (0, 0))


def test_a_workload_must_be_reset_and_may_be_closed_twice():
    workload, _, _ = make()
    workload.warm_up([1, 8], [1, 2], 0)
    with pytest.raises(RuntimeError, match="reset"):
        workload.run(Knobs(expert_count=1), 1.0)
    workload.reset(0)
    workload.close()
    workload.close()
    with pytest.raises(RuntimeError, match="reset"):
        workload.run(Knobs(expert_count=1), 1.0)
    with pytest.raises(ValueError, match="shifts"):
        make(TrafficConfig(shifts=(0, 3)))


class Images(Samples):
    """Random images with random labels."""

    def __init__(self) -> None:
        self.images = torch.randint(0, 256, (POOL, 28, 28), generator=torch.Generator().manual_seed(0)).byte()

    def take(self, shift, index):
        return self.images[index], index % 10


def adapting_workload() -> tuple[Any, MoEModel]:
    config = ModelConfig(
        task="vision", d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, expert_widths=(16,) * 4,
        top_k=2, top_k_choices=(1, 2), norm="batch", n_classes=10,
    )  # fmt: skip
    samples: Any = Images()
    model = initialise(MoEModel(config), torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    clock = Clock()
    traffic = TrafficConfig(kind="poisson", low_load=0.5, high_load=0.5)
    runner = Runner(model, samples, "cpu", clock)
    workload = LiveWorkload(runner, traffic, CAPACITY_RPS, 5, Service(), clock=clock, sleep=clock.sleep)
    return workload, model


def test_adaptation_changes_later_answers_only_and_reset_undoes_it():
    workload, model = adapting_workload()
    knobs = Knobs(batch_size=32, expert_count=2, ttt_steps=2)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def episode(knobs):
        workload.reset(3)
        return [workload.run(knobs, 0.3) for _ in range(2)]

    adapted, again, plain = episode(knobs), episode(knobs), episode(replace(knobs, ttt_steps=0))
    assert [s.entropy for s in adapted] == [s.entropy for s in again]
    assert adapted[-1].entropy < plain[-1].entropy  # what the steps minimise
    assert sum(s.ttt_steps for s in adapted) == 2 * sum(s.batches for s in adapted)
    assert sum(s.ttt_steps for s in plain) == 0
    workload.reset(3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    ranges = [(0, 16), (0, 16)]  # a batch is scored before it is learned from
    first = workload.runner.launch(ranges, 0, knobs).result()
    workload.runner.reset(3)
    unadapted = workload.runner.launch(ranges, 0, replace(knobs, ttt_steps=0)).result()
    assert np.array_equal(first.correct, unadapted.correct) and first.entropy_sum == unadapted.entropy_sum


def test_warm_up_leaves_no_trace():
    workload, model = adapting_workload()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    workload.warm_up([4, 64], [1, 2], 2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_launch_never_waits_for_the_device():
    config = ModelConfig(
        task="vision", d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, expert_widths=(64,) * 4,
        top_k=2, top_k_choices=(1, 2), norm="batch", n_classes=10,
    )  # fmt: skip
    with torch.device("cuda"):
        model = initialise(MoEModel(config), torch.Generator("cuda").manual_seed(0))
    model.requires_grad_(False).eval().cast_weights(torch.bfloat16)
    samples: Any = Images()
    samples.images = samples.images.cuda()
    traffic = TrafficConfig(kind="poisson", low_load=2.0, high_load=2.0)
    workload = LiveWorkload(Runner(model, samples, "cuda"), traffic, 2000.0, 5, Service())
    workload.warm_up([64], [1, 2], 1)
    with no_host_wait():
        batch = workload.runner.launch([(0, 40), (0, 24)], 0, Knobs(batch_size=64, expert_count=2))
    workload.runner.synchronize()
    assert batch.done() and batch.result().correct.shape == (64,)
    workload.reset(0)
    waiting = (0.0, 0.0)
    for ttt_steps in (0, 1, 0):
        stats = workload.run(Knobs(batch_size=64, expert_count=2, ttt_steps=ttt_steps), 0.5)
        waiting = assert_conserved(stats, waiting)
        assert stats.batches > 0 and stats.busy_s > 0.0
    workload.close()
