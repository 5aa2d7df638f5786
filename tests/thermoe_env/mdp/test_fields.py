"""Ranges of the observation: what they follow from, and that what happens lies within them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from thermoe_env.configs import configs_dir
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import FIELD_NAMES, Ranges, encode_row, ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

SCENARIOS = sorted(path.stem for path in (configs_dir() / "scenarios").glob("*.yaml"))
POWERS = ("power_w", "power_slow_w", "budget_w", "budget_ahead_w")


def ends(problem: Problem, name: str) -> tuple[float, float]:
    low, high = np.array(ranges_of(problem))[:, FIELD_NAMES.index(name)]
    return float(low), float(high)


def test_decode_inverts_encode(problem: Problem) -> None:
    ranges, rng = ranges_of(problem), np.random.default_rng(0)
    raw = rng.uniform(ranges.low, ranges.high, (50, len(FIELD_NAMES)))
    observation = np.zeros(raw.shape, np.float32)
    for row, out in zip(raw, observation, strict=True):
        encode_row(row, ranges.low, ranges.scale, out)
    assert observation.min() < -0.9 and observation.max() > 0.9
    expected = 2.0 * (raw - ranges.low) / (ranges.high - ranges.low) - 1.0
    np.testing.assert_allclose(observation, expected, atol=1e-6)
    for column, (name, values) in enumerate(ranges.decode(observation).items()):
        assert name == FIELD_NAMES[column]
        span = ranges.high[column] - ranges.low[column]
        assert values == pytest.approx(raw[:, column], abs=1e-6 * span)


@pytest.mark.parametrize("name", POWERS)
def test_powers_end_a_tenth_above_what_the_devices_may_draw_or_are_granted(name: str) -> None:
    one, two = (Problem.of(load_scenario(scenario)) for scenario in ("vision", "two-devices"))
    assert ends(one, name) == pytest.approx((0.0, 770.0))  # a cap of 700 W
    assert ends(two, name) == pytest.approx((0.0, 1540.0))
    small = replace(one, twin=replace(one.twin, power_cap_w=300.0, cap_onset_w=250.0))
    assert ends(small, name) == pytest.approx((0.0, 770.0))  # the budget is 700 W
    granted = Problem.of(load_scenario("vision", power_budget={"normal_w": 500.0, "event_w": [230.0, 900.0]}))
    assert ends(granted, name) == pytest.approx((0.0, 990.0))


def test_temperatures_and_times_end_with_the_card_and_the_terms_of_service() -> None:
    problem = Problem.of(
        load_scenario("vision", service={"expire_after_s": [2.0, 70.0]}, power_budget={"notice_s": 40})
    )
    hot = replace(problem, twin=replace(problem.twin, inlet_c=45.0, shutdown_c=115.0))
    assert ends(hot, "temp_c") == ends(hot, "mem_temp_c") == (35.0, 115.0)
    for name in ("queue", "oldest"):  # expiry is looked at every 0.25 s
        assert ends(problem, f"{name}_interactive_s") == (0.0, 2.25)
        assert ends(problem, f"{name}_deferrable_s") == (0.0, 70.25)
    assert ends(problem, "budget_change_s") == (0.0, 40.0)


def test_an_environment_shows_a_card_s_power_beyond_800_w() -> None:
    env = ThermalMoEEnv(
        "two-devices", world="twin", overrides={"episode_s": 60, "traffic": {"low_load": 1.2}}
    )
    decode = ranges_of(env.problem).decode
    env.reset(seed=0)
    seen, read = [], []
    for _ in range(60):
        observation, *_, info = env.step(env.problem.knobs.action(expert_count=8))
        seen.append(float(decode(observation)["power_w"]))
        read.append(info["reading"]["power_w"])
    assert max(read) > 850.0
    assert seen == pytest.approx(read, abs=1e-3)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_field_is_clipped_in_more_than_a_twentieth_of_random_steps(scenario: str) -> None:
    problem = Problem.of(load_scenario(scenario))
    n, rng, ranges = 32, np.random.default_rng(1), ranges_of(problem)
    batch = TwinBatch(problem, n)
    batch.reset(np.arange(n))
    outside = np.zeros(len(FIELD_NAMES))
    for _ in range(problem.scenario.steps):
        action = rng.integers(0, problem.knobs.nvec, (n, len(problem.knobs.nvec)))
        batch.step(problem.knobs.indices(action, "multi_discrete"))
        raw = batch.raw.view(np.float64).reshape(n, -1)
        outside += ((raw < ranges.low - 1e-9) | (raw > ranges.high + 1e-9)).mean(axis=0)
    share = dict(zip(FIELD_NAMES, outside / problem.scenario.steps, strict=True))
    del share["since_change_s"]  # saturates: a change longer ago says no more
    assert {name: value for name, value in share.items() if value > 0.05} == {}


def test_what_cannot_be_decoded_is_refused(problem: Problem) -> None:
    ranges, observation = ranges_of(problem), np.zeros((3, len(FIELD_NAMES)), np.float32)
    with pytest.raises(ValueError, match="play the episode again"):
        ranges.decode(observation[:, 2:])
    with pytest.raises(ValueError, match="without their ranges"):
        Ranges(*np.zeros((2, 0))).decode(observation)
