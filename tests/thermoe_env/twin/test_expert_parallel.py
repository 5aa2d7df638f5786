"""Tokens on several devices: the slowest one's time, energy where it is spent, air of their own, readings."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from moe.compiled import jit
from moe.lm.text import DOMAINS
from moe.step_cost import TERMS, StepWork
from moe.workload import Knobs
from thermoe_env.device.physics import clock_power_factor
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import ScenarioError
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.problem.token_tables import mean_context, token_work
from thermoe_env.seeding import episode_seed
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.generate import generate_service
from thermoe_env.twin.telemetry import TwinTelemetry
from thermoe_env.twin.token_steps import fill_energy, steps_of
from thermoe_env.twin.workload import TwinWorkload

KNOBS = ["routing_bias", "batch_size", "expert_count", "admission", "pace"]
"""Of a service that does not adapt, as one of several devices cannot."""
EXPERTS, LAYERS, WIDTH = 64, 8, 1024
"""Of the model that the shipped profile measured, and the width of its stream."""
STANDARD = Knobs(batch_size=128, expert_count=8)
AS_FITTED = {"steps": 0.0}
ALIKE = {"steps": 0.0, "resistance": 0.0, "time_constant": 0.0, "leakage": 0.0, "energy": 0.0, "inlet_c": 0.0}
FREE = {"latency_s": 0.0, "bytes_per_s": 1e15}
SLOW_LINK = {"latency_s": 1e-4, "bytes_per_s": 1e9}
CASES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "two, the slow one with few": ((48, 16), (1.0, 0.6)),
    "two, the slow one with many": ((48, 16), (0.6, 1.0)),
    "three": ((20, 20, 24), (0.9, 0.5, 1.0)),
    "eight": ((8,) * 8, (1.0, 0.9, 0.8, 0.7, 0.6, 0.95, 0.85, 1.0)),
}
"""Experts that each device holds, and its clock."""


def devices_of(held: tuple[int, ...], **every: Any) -> list[dict[str, Any]]:
    ends = np.cumsum((0, *held))
    return [
        {"experts": list(range(a, b)), **every}
        for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


def shared(held: tuple[int, ...], exchange: dict[str, float] | None = None, **overrides: Any) -> Problem:
    """The shipped scenario of tokens on several devices."""
    return Problem.of(
        load_scenario(
            "default",
            knobs=KNOBS,
            power_budget={"brake": None},
            **{"devices": devices_of(held), "exchange": exchange, "randomize": AS_FITTED, **overrides},
        )
    )


@jit
def _step(fixed, k, rows, filled, share, clocks):
    return steps_of(fixed, 0, 0, k, 0, rows, filled, share, clocks, 1.0)


@jit
def _energy(fixed, k, rows, filled, share, clocks, energy):
    steps = steps_of(fixed, 0, 0, k, 0, rows, filled, share, clocks, 1.0)
    fill_energy(fixed, 0, 0, k, 0, steps, 1.0, clocks, energy)


@cache
def fixed_of(held: tuple[int, ...], link: str = "free") -> Any:
    exchange = {"free": FREE, "slow": SLOW_LINK, "modelled": None}[link] if len(held) > 1 else None
    return generate_service(shared(held, exchange)).fixed


def step_s(held: tuple[int, ...], clocks: tuple[float, ...], link: str = "free") -> tuple[float, float]:
    """Of 64 rows of answers at 8 experts per token: alone, and where prompts take half of the other rows."""
    steps = _step(fixed_of(held, link), 3, 64.0, 0.5, 0.5, np.array(clocks))
    return steps.pure_s, steps.mixed_s


def energy_j(held: tuple[int, ...], clocks: tuple[float, ...]) -> np.ndarray:
    """Of the same steps, half of them mixed, [D]."""
    energy = np.empty(len(held))
    _energy(fixed_of(held), 3, 64.0, 0.5, 0.5, np.array(clocks), energy)
    return energy


def parts_by_hand(quantity: str) -> dict[tuple[bool, bool], float]:
    """Time or energy of that step of answers alone, by (of the experts, follows the clock)."""
    work = token_work(shared((EXPERTS,)))
    read = float(work.cost.reads(64.0, 0.0, 8, EXPERTS, DOMAINS[0]))
    amounts = work.cost.amounts(StepWork(64.0, 0.0, 64.0 * mean_context(work.lengths), 0.0, 8, read))
    fit = getattr(work.cost, quantity)
    parts = dict.fromkeys([(a, b) for a in (False, True) for b in (False, True)], 0.0)
    for name, amount, rate in zip(TERMS, amounts, fit.rate, strict=True):
        key = name in ("experts", "expert rows", "expert tiles"), name not in ("experts", "cache")
        parts[key] += amount * rate
    return parts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("link", ["slow", "modelled"])
def test_a_step_lasts_as_long_as_its_slowest_device_and_the_exchange(case: str, link: str) -> None:
    held, clocks = CASES[case]
    parts, n = parts_by_hand("time"), len(held)
    of_device = [
        parts[False, True] / clock
        + parts[False, False]
        + number / EXPERTS * (parts[True, True] / clock + parts[True, False])
        for number, clock in zip(held, clocks, strict=True)
    ]
    latency_s, bytes_per_s = (1e-4, 1e9) if link == "slow" else (20e-6, 370e9)
    each_sends = 64 * WIDTH * 4 * 2 * (n - 1) / n
    expected = max(of_device) + LAYERS * (latency_s + each_sends / bytes_per_s)
    assert step_s(held, clocks, link)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_energy_is_spent_where_the_work_is(case: str) -> None:
    """What is not the experts' on every device, what is by its share, each at the device's own clock."""
    held, clocks = CASES[case]
    parts = parts_by_hand("energy")
    energy = np.empty(len(held))
    _energy(fixed_of(held), 3, 64.0, 0.0, 0.0, np.array(clocks), energy)
    for joules, number, clock in zip(energy, held, clocks, strict=True):
        slower = clock_power_factor(clock) / clock
        common = parts[False, True] * slower + parts[False, False]
        experts = parts[True, True] * slower + parts[True, False]
        assert joules == pytest.approx(common + number / EXPERTS * experts, rel=1e-9)


@pytest.mark.parametrize("kind", [0, 1], ids=["answers alone", "with prompts"])
def test_equal_devices_divide_the_time_of_the_experts(kind: int) -> None:
    """From one device and two follow three numbers more: T(n) = rest + experts / n."""
    times = {n: step_s((EXPERTS // n,) * n, (1.0,) * n)[kind] for n in (1, 2, 4, 8)}
    experts = 2.0 * (times[1] - times[2])
    assert experts > 0.2 * times[1]
    for n in (4, 8):
        assert times[n] == pytest.approx(times[1] - experts * (1.0 - 1.0 / n), rel=1e-4)


def test_the_energy_of_equal_devices_is_one_s_and_the_rest_once_more_for_each() -> None:
    joules = {n: energy_j((EXPERTS // n,) * n, (1.0,) * n) for n in (1, 2, 8)}
    rest = joules[2].sum() - joules[1].sum()
    assert 0.0 < rest < joules[1].sum()
    assert joules[8].sum() == pytest.approx(joules[1].sum() + 7.0 * rest, rel=1e-9)
    np.testing.assert_allclose(joules[8], joules[8][0], rtol=1e-12)


@given(st.lists(st.floats(0.25, 1.0), min_size=3, max_size=3), st.integers(0, 2), st.floats(0.25, 1.0))
def test_a_slower_device_never_shortens_a_step(clocks: list[float], which: int, slower: float) -> None:
    held = (20, 20, 24)
    slowed = [clock * slower if d == which else clock for d, clock in enumerate(clocks)]
    before, after = step_s(held, tuple(clocks)), step_s(held, tuple(slowed))
    assert after[0] >= before[0] and after[1] >= before[1]


def test_moving_experts_away_from_the_slow_device_shortens_a_step() -> None:
    clocks = (0.5, 1.0)
    times = [step_s((number, EXPERTS - number), clocks) for number in (60, 48, 32, 16)]
    for kind in (0, 1):
        assert all(a[kind] > b[kind] for a, b in pairwise(times))


def test_shares_are_those_of_the_experts_held_at_any_bias() -> None:
    share = shared((48, 10, 6)).device_share
    np.testing.assert_allclose(share, np.broadcast_to([0.75, 10 / 64, 6 / 64], share.shape), rtol=1e-12)


def test_one_device_that_names_all_experts_is_the_shipped_scenario() -> None:
    one, named = Problem.of(load_scenario("default", knobs=KNOBS, randomize=AS_FITTED)), shared((EXPERTS,))
    fixed = [generate_service(problem).fixed for problem in (one, named)]
    for first, second in zip(*map(tree_leaves, fixed), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("held", [(32, 32), (20, 20, 24), (8,) * 8])
def test_energy_of_an_episode_is_idle_and_work(held: tuple[int, ...]) -> None:
    problem = shared(held, randomize=ALIKE, episode_s=60)
    problem = replace(problem, twin=replace(problem.twin, leakage_per_c=0.0))
    batch = TwinBatch(problem, 2, autoreset=False)
    batch.reset([0, 1])
    rng, energy, work = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    n = len(held)
    for _ in range(60):
        batch.step(problem.knobs.indices(rng.integers(0, problem.knobs.nvec, (2, 5)), "multi_discrete"))
        energy += batch.gpu["energy_j"]
        work += batch.slot_energy.sum(axis=(1, 2))
        assert not batch.gpu["power_capped_s"].any() and not batch.gpu["thermal_throttle_s"].any()
        np.testing.assert_allclose(batch.devices["power_w"].sum(axis=1), batch.gpu["power_w"], rtol=1e-12)
        own = batch.slot_energy.sum(axis=1) + problem.twin.idle_power_w  # J in a second
        np.testing.assert_allclose(batch.devices["power_w"], own, rtol=1e-12)
    np.testing.assert_allclose(energy, work + 60 * n * problem.twin.idle_power_w, rtol=1e-12)


def test_no_request_is_lost_whatever_the_clocks() -> None:
    problem, rng = shared((20, 20, 24), episode_s=60), np.random.default_rng(0)
    workload = TwinWorkload(problem, lambda: rng.uniform(0.25, 1.0, 3))
    workload.reset(0)
    waiting, levels = np.zeros(2), problem.knobs.levels
    for _ in range(60):
        index = np.array([rng.integers(len(values)) for values in levels.values()])
        work = workload.run(problem.knobs.knobs(index), 1.0, int(rng.integers(3)))
        change = np.array(work.waiting) - waiting
        waiting = np.array(work.waiting)
        assert np.array_equal(work.arrived, np.add(work.answered, work.expired) + change)
        assert work.device_clock is not None and work.sm_clock == work.device_clock.min()
        assert 0.0 <= work.busy_s <= 1.0 + 1e-9


def test_a_throttled_device_slows_all_answers() -> None:
    problem = shared((32, 32), episode_s=20)

    def token_s(*clocks: float) -> float:
        workload = TwinWorkload(problem, lambda: np.array(clocks))
        workload.reset(0)
        return [workload.run(STANDARD, 1.0) for _ in range(10)][-1].tpot_s

    assert token_s(1.0, 0.5) == token_s(0.5, 1.0) > 1.1 * token_s(1.0, 1.0)


def test_a_batch_plays_what_single_environments_do() -> None:
    devices = devices_of((32, 16, 16), drift_c=2.0, inlet_offset_c=3.0)
    problem = shared((32, 16, 16), devices=devices, episode_s=20)
    batch = TwinBatch(problem, 3)
    envs = [ThermalMoEEnv(problem.scenario, world="twin") for _ in range(3)]
    seen = batch.reset([4, 5, 6])
    for seed, (env, row) in enumerate(zip(envs, seen, strict=True), 4):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], row)
    rng = np.random.default_rng(1)
    for _ in range(19):
        actions = rng.integers(0, problem.knobs.nvec, (3, 5))
        step = batch.step(problem.knobs.indices(actions, "multi_discrete"))
        for i, env in enumerate(envs):
            observation, reward, *_, info = env.step(actions[i])
            np.testing.assert_array_equal(observation, step.observation[i])
            assert reward == step.reward[i]
            assert info["devices"]["power_w"] == tuple(batch.devices["power_w"][i])


def test_every_device_is_in_the_info_and_the_reading_sums_them_up() -> None:
    devices = [
        {**device, "inlet_offset_c": 4.0 * d, "drift_c": 1.0}
        for d, device in enumerate(devices_of((40, 16, 8)))
    ]
    env = ThermalMoEEnv(shared((40, 16, 8), devices=devices, episode_s=30).scenario, world="twin")
    observation, info = env.reset(seed=0)
    decode = ranges_of(env.problem).decode
    for _ in range(30):
        each, all_of_them, seen = info["devices"], info["reading"], decode(observation)
        assert {len(values) for values in each.values()} == {3}
        assert max(each["temp_c"]) == all_of_them["temp_c"]
        assert max(each["mem_temp_c"]) == all_of_them["mem_temp_c"]
        assert np.mean(each["temp_c"]) == pytest.approx(all_of_them["temp_mean_c"])
        assert max(each["temp_c"]) - min(each["temp_c"]) == all_of_them["temp_spread_c"]
        assert sum(each["power_w"]) == pytest.approx(all_of_them["power_w"])
        assert min(each["sm_clock_mhz"]) == all_of_them["sm_clock_mhz"]
        for name in ("temp_c", "temp_mean_c", "temp_spread_c", "power_w"):
            assert seen[name] == pytest.approx(all_of_them[name], abs=1e-3)
        share = all_of_them["sm_clock_mhz"] / env.problem.twin.max_clock_mhz
        assert seen["sm_clock_share"] == pytest.approx(share, abs=1e-6)
        observation, *_, info = env.step(env.action_space.sample())
    assert each["power_w"][0] > each["power_w"][2], "who holds more experts draws more"


def test_an_only_device_is_in_the_info_alike() -> None:
    env = ThermalMoEEnv("default", world="twin", overrides={"episode_s": 10})
    env.reset(seed=0)
    info = env.step(env.action_space.sample())[4]
    assert info["devices"] == {name: (info["reading"][name],) for name in info["devices"]}


def test_a_device_s_own_drift_is_its_own_and_adds_to_the_common_one() -> None:
    own_c, tau_s, episodes = 3.0, 20.0, 400
    plain = devices_of((32, 32))
    wandering = [plain[0], {**plain[1], "drift_c": own_c, "drift_tau_s": tau_s}]
    drifts = []
    for devices in (plain, wandering, [{**device, "drift_c": own_c} for device in plain]):
        batch = TwinBatch(shared((32, 32), devices=devices, episode_s=200), episodes)
        batch.reset(range(episodes))
        drifts.append(batch.state.drift_c.copy())
    still, one, both = drifts
    np.testing.assert_array_equal(still[..., 0], still[..., 1])
    np.testing.assert_array_equal(one[..., 0], still[..., 0])
    walk = (one - still)[:, 100:, 1]  # long after the beginning
    assert walk.std() == pytest.approx(own_c, rel=0.1) and abs(walk.mean()) < 0.3
    lag = round(tau_s)
    later = float((walk[:, :-lag] * walk[:, lag:]).mean() / walk.var())
    assert later == pytest.approx(np.exp(-1.0), abs=0.06)
    apart = (both - still)[:, 100:]
    assert abs(np.corrcoef(apart[..., 0].ravel(), apart[..., 1].ravel())[0, 1]) < 0.1


def test_telemetry_of_a_single_environment_has_the_batch_s_drift() -> None:
    problem = shared((32, 32), devices=devices_of((32, 32), drift_c=2.0), episode_s=30)
    telemetry, batch = TwinTelemetry(problem), TwinBatch(problem, 1)
    telemetry.reset(episode_seed(3, 0))
    batch.reset([3])
    np.testing.assert_array_equal(telemetry._here.drift_c[0], batch.state.drift_c[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"exchange": FREE}, r"exchange is between several devices.*latency_s=0.0.*1 of task 'generate'"),
        ({"devices": [*devices_of((EXPERTS,)), {"experts": []}]}, r"devices \[1\] would without any"),
        ({"devices": devices_of((16, 16))}, r"'h200-generate': .*0 to 63 .*left out are \[32,"),
        ({"devices": devices_of((40, 40))}, r"unknown are \[64,"),
        ({"devices": devices_of((32, 32), drift_c=-1.0)}, r"drift_c: .*greater than or equal to 0"),
        ({"devices": devices_of((32, 32), drift_tau_s=0.0)}, "drift_tau_s: "),
        ({"devices": devices_of((32, 32), drift_c=20.0)}, "drift_c and inlet"),
        ({"devices": devices_of((32, 32)), "exchange": {"latency_s": -1.0}}, "exchange.latency_s: "),
        ({"devices": devices_of((32, 32)), "exchange": {"bytes_per_s": 0.0}}, "exchange.bytes_per_s: "),
        ({"devices": devices_of((32, 32)), "exchange": {"latency": 0.0}}, "known keys: .*latency_s"),
    ],
)  # fmt: skip
def test_what_several_devices_cannot_be_is_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=f"(?s){message}"):
        Problem.of(load_scenario("default", knobs=KNOBS, **overrides))


def test_single_answers_have_no_exchange() -> None:
    with pytest.raises(ScenarioError, match="exchange is between several devices of task 'generate'"):
        load_scenario("two-devices", exchange=FREE)
