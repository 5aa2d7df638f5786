"""The twin's core: determinism, conservation, and the energy account."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.service.queueing import SLOT_S
from moe.service.traffic import TrafficConfig
from moe.workload import Knobs
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.telemetry import TwinTelemetry
from thermoe_env.twin.workload import TwinWorkload

ONE = [{}]
TWO = [{"experts": [0, 1, 2, 3]}, {"experts": [4, 5, 6, 7], "inlet_offset_c": 6.0}]


def play(batch: TwinBatch, seeds: list[int], actions: np.ndarray, row: int) -> list[tuple]:
    """Everything one environment of a batch returned over the actions. [T, n, controlled]"""
    seen = [tuple(batch.reset(seeds)[row])]
    for action in actions:
        step = batch.step(batch.problem.knobs.indices(action, "multi_discrete"))
        last = step.final_observation if step.truncated[row] else step.observation
        seen.append((*last[row], step.reward[row], *batch.terms[row], *batch.cost[row]))
    return seen


def acting(devices: list, **limits) -> dict:
    """Limits that act and air that grows warm, often enough for an episode to meet all of them."""
    return {
        "devices": devices,
        "limits": {"temperature_c": 56.0, **limits},
        "power_budget": {
            "event_w": [330.0, 390.0],
            "gap_s": [3.0, 9.0],
            "brake": {"grace_s": 1.0, "duty": 0.37, "hold_s": 4.0},
        },
        "inlet": {"kind": "ramp", "by_c": 7.0, "from_s": 30.0, "to_s": 80.0},
    }


@pytest.mark.parametrize(
    ("overrides", "duties"),
    [
        ({"devices": ONE}, {1.0}),
        ({"devices": TWO}, {1.0}),
        (acting(ONE, slowdown={"duty": 0.55, "recover_c": 2.0}), {1.0, 0.55, 0.37}),
        (acting(TWO, alarm={"drain_s": 9.0}), {1.0, 0.37, 0.0}),
    ],
    ids=["one", "two", "slowdown", "alarm"],
)
def test_one_environment_is_the_same_alone_in_a_batch_and_on_any_thread(
    problem: Problem, overrides, duties
) -> None:
    problem = Problem.of(load_scenario(problem.scenario, **overrides))
    steps, seeds = problem.scenario.steps, [11, 5, 7, 3, 2]
    actions = np.random.default_rng(0).integers(
        0, problem.knobs.nvec, (steps, len(seeds), len(problem.knobs.nvec))
    )
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        whole = play(TwinBatch(problem, 5), seeds, actions, 2)
        alone = play(TwinBatch(problem, 1), [7], actions[:, 2:3], 0)
        numba.set_num_threads(threads)
        threaded = play(TwinBatch(problem, 5), seeds, actions, 2)
    finally:
        numba.set_num_threads(threads)
    assert whole == alone == threaded

    env = ThermalMoEEnv(problem.scenario, world="twin")
    observation, _ = env.reset(seed=7)
    single, met = [tuple(observation)], set()
    for action in actions[:, 2]:
        observation, reward, _, truncated, info = env.step(action)
        single.append((*observation, reward, *info["reward_terms"].values(), *info["cost"].values()))
        met.add(info["limits"]["duty"])
    assert truncated
    assert single == whole
    assert met == duties


def test_episodes_of_a_batch_are_those_of_the_single_environment(problem: Problem) -> None:
    scenario = load_scenario(problem.scenario, episode_s=12)
    short = Problem.of(scenario)
    batch, env = TwinBatch(short, 3), ThermalMoEEnv(scenario, world="twin")
    first = batch.reset([4, 9, 1])
    expected, _ = env.reset(seed=9)
    assert np.array_equal(first[1], expected)
    index = short.knobs.indices(np.tile(short.knobs.action(), (3, 1)), "multi_discrete")
    for _ in range(scenario.steps):
        step = batch.step(index)
    assert step.truncated.all()
    assert np.array_equal(step.observation[1], env.reset()[0]), "the second episode of seed 9 differs"


@given(
    seed=st.integers(0, 2**31),
    low=st.floats(0.05, 1.0),
    spread=st.floats(0.0, 2.0),
    share=st.floats(0.0, 1.0),
    devices=st.sampled_from([ONE, TWO]),
    knobs=st.lists(st.tuples(*(st.integers(0, 2) for _ in range(4))), min_size=3, max_size=12),
    classes=st.lists(st.integers(0, 2), min_size=12, max_size=12),
)
@settings(max_examples=60)
def test_requests_are_conserved(problem: Problem, seed, low, spread, share, devices, knobs, classes) -> None:
    """In = answered + expired + waiting, whatever the traffic and the knobs."""
    traffic = TrafficConfig(low_load=low, high_load=low + spread, interactive_share=share)
    scenario = load_scenario(
        problem.scenario,
        traffic=dict(vars(traffic)),
        episode_s=12,
        service={"expire_after_s": (0.5, 61.0), "deadline_s": (0.3, 60.0)},
        devices=devices,
    )
    telemetry = TwinTelemetry(Problem.of(scenario))
    workload = TwinWorkload(Problem.of(scenario), lambda: telemetry.clocks)
    workload.reset(seed)
    telemetry.reset(seed)
    arrived, answered, expired = np.zeros(2), np.zeros(2), np.zeros(2)
    levels = problem.knobs.levels
    for (bias, batch, experts, ttt), open_classes in zip(knobs, classes, strict=False):
        setting = Knobs(
            routing_bias=levels["routing_bias"][bias],
            batch_size=int(levels["batch_size"][2 * batch]),
            expert_count=int(levels["expert_count"][experts]),
            ttt_steps=int(levels["ttt_steps"][ttt]),
        )
        stats = workload.run(setting, 1.0, open_classes)
        telemetry.read(stats, 1.0)
        arrived += stats.arrived
        answered += stats.answered
        expired += stats.expired
        assert np.array_equal(arrived, answered + expired + stats.waiting)
        assert stats.latency_histogram.sum() == sum(stats.answered)
        assert all(np.less_equal(stats.late, stats.answered))
        assert 0.0 <= stats.good <= stats.correct * (1.0 + 1e-12)
        assert stats.correct <= sum(stats.answered)
        assert 0.0 <= stats.busy_s <= 1.0 + 1e-9


def test_energy_is_the_integral_of_power(problem: Problem) -> None:
    """Energy per interval = idle + what the profile charges for the batches launched, carried over slots."""
    scenario = load_scenario(problem.scenario, randomize={"energy": 0.0, "leakage": 0.0})
    batch = TwinBatch(Problem.of(scenario), 1)
    batch.reset([3])
    index = problem.knobs.indices(problem.knobs.action()[None], "multi_discrete")
    power, energy, dynamic = [], [], 0.0
    for _ in range(200):
        batch.step(index)
        dynamic += batch.slot_energy.sum()
        power.append(batch.gpu["power_w"][0])
        energy.append(batch.gpu["energy_j"][0])
    assert np.sum(power) * scenario.interval_s == pytest.approx(np.sum(energy), rel=1e-12)
    idle = np.sum(energy) - dynamic
    low, high = (problem.twin.idle_power_w * (1.0 + problem.twin.leakage_per_c * d) for d in (-15.0, 35.0))
    assert low < idle / 200 < high, "what is not dynamic energy must be idle power with leakage"


def test_busy_time_follows_the_slots(problem: Problem) -> None:
    """Slot energies of a saturated device cover every slot: the device never rests."""
    scenario = load_scenario(
        problem.scenario,
        traffic={"kind": "poisson", "low_load": 3.0, "high_load": 3.0, "interactive_share": 0.1},
    )
    workload = TwinWorkload(Problem.of(scenario), lambda: 1.0)
    workload.reset(0)
    for _ in range(3):
        stats = workload.run(Knobs(batch_size=2048, expert_count=4), 1.0)
    assert stats.busy_s == pytest.approx(1.0, abs=1e-6)
    assert stats.slot_energy_j is not None
    assert len(stats.slot_energy_j) == round(1.0 / SLOT_S)
    assert np.all(stats.slot_energy_j > 0.0)
