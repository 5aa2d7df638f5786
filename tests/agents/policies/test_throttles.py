"""Throttles: what they may touch, how they get there and back, and their memory against one by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.policies.registry import make_policy
from agents.policies.throttles import THROTTLES, Throttle, ThrottleConfig, cheapest_level, strain_of
from moe.profiles import save_profile
from tests.agents.policies.observations import RANGES, observation
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import load_settings
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.score import KNOBS_READ

STRAINED = observation(power_w=600.0, budget_ahead_w=300.0)
HOT = observation(margin_c=-8.0)
CALM = observation()


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """All knobs controlled."""
    path = tmp_path_factory.mktemp("profile") / "made-up.json"
    save_profile(make_profile(), path)
    return Problem.of(load_scenario("vision", profile=str(path), knobs=KNOBS_READ))


def levels(policy: Any, sequence: list[np.ndarray]) -> np.ndarray:
    """Actions of one environment through a sequence of observations, int [T, controlled]."""
    state, start, actions = None, np.ones(1, bool), []
    for seen in sequence:
        action, state = policy.predict(seen, state, start)
        actions.append(action[0])
        start = np.zeros(1, bool)
    return np.array(actions)


@pytest.mark.parametrize("strain", [STRAINED, HOT], ids=["power", "heat"])
@pytest.mark.parametrize("name", [name for name in THROTTLES if name != "pid"])
def test_single_knob_saturates_and_returns(problem: Problem, name: str, strain: np.ndarray) -> None:
    (knob,) = THROTTLES[name]
    column, static = problem.knobs.controlled.index(knob), problem.knobs.action()
    policy = Throttle(problem, ThrottleConfig(knobs=(knob,)), name)
    actions = levels(policy, [CALM] * 3 + [strain] * 30 + [CALM] * 30)
    np.testing.assert_array_equal(
        np.delete(actions, column, 1), np.delete(static, column)[None].repeat(63, 0)
    )
    way = np.abs(actions[:, column] - static[column])
    end = abs(cheapest_level(problem, knob) - static[column])
    assert not way[:3].any() and (np.diff(way[3:33]) >= 0).all() and way[32] == end
    assert (np.diff(way[33:]) <= 0).all() and way[-1] == 0


def test_cheapest_levels_take_the_least_energy(problem: Problem) -> None:
    profile, static = problem.profile, problem.scenario.static
    joules = [profile.energy_at(b, static.expert_count) / b for b in problem.knobs.levels["batch_size"]]
    assert cheapest_level(problem, "batch_size") == int(np.argmin(joules))
    assert cheapest_level(problem, "expert_count") == 0
    assert cheapest_level(problem, "routing_bias") == len(problem.knobs.levels["routing_bias"]) - 1


def test_knobs_are_lowered_in_the_stated_order(problem: Problem) -> None:
    config = ThrottleConfig(
        knobs=("expert_count", "sm_clock", "ttt_steps"), integral=0.03, proportional=0.0, adapt_steps=2
    )
    actions = levels(Throttle(problem, config), [STRAINED] * 60)
    columns = [problem.knobs.controlled.index(knob) for knob in config.knobs]
    taken = actions[0, columns] - actions[:, columns]  # [T, knobs] levels below the start
    assert taken[0].sum() == 0 and actions[0, columns[2]] == 2
    np.testing.assert_array_equal(taken[-1], actions[0, columns])
    for earlier, later in ((0, 1), (1, 2)):
        assert (taken[taken[:, later] > 0, earlier] == taken[-1, earlier]).all()
    assert len(np.unique(taken.sum(1))) == taken[-1].sum() + 1  # every level on the way is visited


def test_larger_strain_rules() -> None:
    config = ThrottleConfig(knobs=("pace",), budget_margin=0.1, heat_margin_c=3.0)
    both = observation(power_w=400.0, budget_ahead_w=500.0, margin_c=-4.0)
    assert strain_of(RANGES.decode(both), config)[0] == pytest.approx(0.7, abs=1e-5)
    hungry = observation(power_w=600.0, budget_ahead_w=400.0, margin_c=8.0)
    assert strain_of(RANGES.decode(hungry), config)[0] == pytest.approx(0.6, abs=1e-5)


def by_hand(strain: np.ndarray, config: ThrottleConfig, most: int) -> list[int]:
    """Levels taken by a textbook PID whose integral and output stay in [0, 1]."""
    integral, before, taken = 0.0, strain[0], []
    for value in strain:
        integral = min(1.0, max(0.0, integral + config.integral * value))
        output = config.proportional * value + integral + config.derivative * (value - before)
        taken.append(round(most * min(1.0, max(0.0, output))))
        before = value
    return taken


@settings(max_examples=20)
@given(
    power=st.lists(st.lists(st.floats(100.0, 790.0), min_size=3, max_size=3), min_size=8, max_size=8),
    restart=st.integers(1, 7),
)
def test_memory_is_one_controller_per_episode(
    problem: Problem, power: list[list[float]], restart: int
) -> None:
    config = ThrottleConfig(knobs=("sm_clock",), proportional=0.7, integral=0.3, derivative=0.4)
    policy = Throttle(problem, config)
    seen = np.array(
        [[observation(power_w=w, budget_ahead_w=400.0)[0] for w in row] for row in power]
    )  # [T, 3, F]
    state, start, actions = None, np.ones(3, bool), []
    for t, row in enumerate(seen):
        start = np.array([t == 0, t in (0, restart), t == 0])
        action, state = policy.predict(row, state, start)
        actions.append(action[:, problem.knobs.controlled.index("sm_clock")])
    static = problem.knobs.action()[problem.knobs.controlled.index("sm_clock")]
    taken = static - np.array(actions)  # [T, 3]
    strain = np.array([strain_of(RANGES.decode(row), config) for row in seen])
    for i in (0, 2):
        assert taken[:, i].tolist() == by_hand(strain[:, i], config, static)
    halves = by_hand(strain[:restart, 1], config, static) + by_hand(strain[restart:, 1], config, static)
    assert taken[:, 1].tolist() == halves


def test_what_a_throttle_refuses(problem: Problem, tmp_path: Any) -> None:
    save_profile(make_profile(), tmp_path / "made-up.json")
    default = Problem.of(load_scenario("vision", profile=str(tmp_path / "made-up.json")))
    with pytest.raises(ValueError, match=r"'clock_only' steers sm_clock.*add it to the scenario's `knobs`"):
        make_policy("clock_only", default)
    with pytest.raises(ValueError, match=r"cannot lower ttt_steps.*cheapest level already"):
        Throttle(problem, ThrottleConfig(knobs=("ttt_steps",)))
    with pytest.raises(ValueError, match="knobs must be different ones"):
        ThrottleConfig(knobs=("fan",))
    with pytest.raises(ValueError, match="must not be negative"):
        ThrottleConfig(knobs=("pace",), integral=-1.0)


@pytest.mark.parametrize("name", THROTTLES)
def test_shipped_settings(problem: Problem, name: str) -> None:
    assert load_settings(ThrottleConfig, "agents", name).knobs == THROTTLES[name]
    assert levels(make_policy(name, problem), [CALM])[0].shape == problem.knobs.nvec.shape


def test_several_knobs_pass_over_what_is_not_controlled(problem: Problem) -> None:
    few = replace(problem, knobs=replace(problem.knobs, controlled=("expert_count", "pace")))
    both = levels(
        Throttle(few, ThrottleConfig(knobs=("routing_bias", "pace"), adapt_steps=1)), [CALM] + [HOT] * 40
    )
    only = levels(Throttle(few, ThrottleConfig(knobs=("pace",))), [CALM] + [HOT] * 40)
    np.testing.assert_array_equal(both, only)
