"""Reward, stages, budgets and physics against rules written a second time, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from thermoe_env.device import physics
from thermoe_env.mdp.reward import REWARD_TERMS, Prices, owe, reward_terms
from thermoe_env.mdp.signals import (
    ANNOUNCED,
    announced_terms,
    draw_power_budget,
    fill_events,
    next_stage,
    thermal_signal,
)
from thermoe_env.problem.limits import PowerBudget
from thermoe_env.problem.scenario import RewardWeights, load_scenario

PRICES = Prices.of(RewardWeights(), 600.0, 50_000.0, 1.0)
BEGIN = np.array([6.0, 3.0, 1.0])
positive = st.floats(0.0, 1e5)


def total(**change: float) -> float:
    """Reward of an ordinary interval with some of it changed."""
    plain = {
        "good": 30_000.0,
        "energy_j": 400.0,
        "late": 10.0,
        "heat_s": 0.5,
        "quality": 0.0,
    }
    arguments = [*{**plain, **change}.values(), np.zeros(len(REWARD_TERMS))]
    return reward_terms(PRICES, *arguments)


@given(good=positive, energy_j=positive, late=positive, heat_s=st.floats(0, 1), quality=positive)
def test_reward_is_the_sum_of_its_terms_and_each_has_its_sign(good, energy_j, late, heat_s, quality) -> None:
    terms = np.zeros(len(REWARD_TERMS))
    reward = reward_terms(PRICES, good, energy_j, late, heat_s, quality, terms)
    assert reward == pytest.approx(terms.sum(), rel=1e-12, abs=1e-12)
    assert terms[0] >= 0.0 and np.all(terms[1:] <= 0.0)


@given(more=st.floats(1.0, 1e4))
def test_reward_falls_with_every_ill_and_rises_with_good_answers(more: float) -> None:
    assert total(good=30_000.0 + more) > total()
    for ill in ("energy_j", "late", "heat_s", "quality"):
        assert total(**{ill: 400.0 + more}) < total(**{ill: 400.0})


def test_the_standard_service_at_full_load_spends_a_third_of_what_it_earns() -> None:
    assert total(good=50_000.0, energy_j=600.0, late=0.0, heat_s=0.0) == pytest.approx(1.0 - 0.35)


@given(st.lists(st.floats(-50.0, 50.0), min_size=1, max_size=40))
def test_what_a_debt_grows_by_adds_up_to_what_is_owed(growths: list[float]) -> None:
    debt, charged = 0.0, 0.0
    for growth in growths:
        debt, more = owe(debt, growth)
        charged += more
    assert debt == pytest.approx(sum(growths))
    assert charged == pytest.approx(max(0.0, debt))


@given(st.lists(st.floats(-5.0, 20.0), min_size=1, max_size=60))
def test_stages_enter_at_once_and_leave_with_hysteresis(margins: list[float]) -> None:
    stage = 0
    for margin in margins:
        before, stage = stage, next_stage(stage, margin, BEGIN, 1.5)
        entered = int(np.sum(margin <= BEGIN))
        assert stage >= entered, "a stage is entered the moment its margin is reached"
        assert stage >= before - 1, "stages are left one at a time"
        if before > entered:
            assert (stage < before) == (margin > BEGIN[before - 1] + 1.5)


def test_thermal_signal_rises_to_one_at_the_limit() -> None:
    assert [thermal_signal(m) for m in (30.0, 10.0, 5.0, 0.0, -3.0)] == pytest.approx(
        [0.0, 0.0, 0.5, 1.0, 1.0]
    )


@given(seed=st.integers(0, 2**32))
def test_budgets_keep_to_their_ranges_and_repeat(seed: int) -> None:
    config = PowerBudget()
    budget = draw_power_budget(config, seed, 300, 1.0)
    assert len(budget) == 300 + config.notice_s + 1
    event = budget[budget != config.normal_w]
    assert np.all((event >= config.event_w[0]) & (event <= config.event_w[1]))
    assert np.array_equal(budget, draw_power_budget(config, seed, 300, 1.0))


def test_events_last_and_pause_as_long_as_the_scenario_says() -> None:
    """Each once per draw: evenly spread over their ranges, up to rounding to whole intervals."""
    config = PowerBudget(event_s=(20.0, 50.0), gap_s=(30.0, 90.0))
    durations, gaps, firsts = [], [], []
    for seed in range(100):
        budget = draw_power_budget(config, seed, 1000, 1.0)
        edges = np.flatnonzero(np.diff(budget != config.normal_w)) + 1
        firsts.append(edges[0])
        lengths = np.diff(edges)  # an event, a gap, an event, ...
        durations.extend(lengths[::2])
        gaps.extend(lengths[1::2])
    for lengths, (low, high) in ((durations, config.event_s), (gaps, config.gap_s), (firsts, (0.0, 90.0))):
        assert low - 1 <= min(lengths) <= low + 3 and high - 3 <= max(lengths) <= high + 1
        assert np.mean(lengths) == pytest.approx(0.5 * (low + high), rel=0.15)


def test_budget_price_and_promise_change_apart_from_each_other() -> None:
    when = {"event_s": [20.0, 50.0], "gap_s": [30.0, 90.0]}
    scenario = load_scenario(
        "default", power_budget=when, price={"times": [2.0, 3.0], **when},
        generate={"tpot_s": [0.02, 1.0], "strict": {"tpot_s": [0.001, 0.002], **when}},
    )  # fmt: skip
    terms, n = announced_terms(scenario), 5000
    drawn = np.zeros((len(ANNOUNCED), n))
    for row in range(len(ANNOUNCED)):
        fill_events(terms[row], np.uint64(7), np.uint64(row), drawn[row])
    other = drawn != np.array([[700.0], [1.0], [0.02]])
    assert np.all(np.abs(np.corrcoef(other)[np.triu_indices(3, 1)]) < 0.2)
    np.testing.assert_allclose(other.mean(axis=1), 35 / 95, atol=0.08)
    for row, (low, high) in enumerate(((300.0, 420.0), (2.0, 3.0), (0.001, 0.002))):
        assert np.all((drawn[row][other[row]] >= low) & (drawn[row][other[row]] <= high))
    usual = announced_terms(load_scenario("vision"))
    for row, value in ((1, 1.0), (2, 0.0)):
        fill_events(usual[row], np.uint64(7), np.uint64(row), drawn[row])
        assert np.all(drawn[row] == value)


def test_relax_solves_the_node_equation() -> None:
    """Against SciPy's integrator, over steps of any size."""
    tau, target, start = 7.0, 30.0, 5.0
    solution = solve_ivp(lambda _, x: (target - x) / tau, (0.0, 20.0), [start], rtol=1e-10, atol=1e-10)
    for step in (0.05, 1.0, 20.0):
        x = start
        for _ in range(round(20.0 / step)):
            x = physics.relax(x, target, step, tau)
        assert x == pytest.approx(solution.y[0, -1], abs=1e-6)


LIMITS = {"power_cap_w": 700.0, "slowdown_c": 87.0, "hw_slowdown_c": 89.0, "memory_limit_c": 95.0}


def clock(now: float, die: float, memory: float, demand: float) -> tuple[float, float, float]:
    return physics.next_clock(now, die, memory, demand, *LIMITS.values())


def test_throttle_holds_die_memory_and_power() -> None:
    assert clock(1.0, 60.0, 60.0, 500.0) == (1.0, 0.0, 0.0)
    assert clock(1.0, 60.0, 60.0, 700.0) == (1.0, 0.0, 0.0)
    assert clock(0.5, 60.0, 60.0, 300.0) == pytest.approx((0.54, 0.0, 0.0)), "25 intervals from half to full"
    assert clock(0.8, 60.0, 60.0, 2800.0) == pytest.approx((0.4, 1.0, 0.0)), "power goes with its square"
    assert clock(1.0, 87.0, 60.0, 500.0) == clock(1.0, 60.0, 95.0, 500.0) == pytest.approx((0.92, 0.0, 1.0))
    assert clock(1.0, 87.0, 60.0, 900.0) == pytest.approx((0.92, 0.0, 1.0)), "heat goes before power"
    assert clock(0.9, 89.0, 60.0, 500.0) == (0.45, 0.0, 1.0)


@pytest.mark.parametrize(("die", "demand"), [(88.0, 500.0), (95.0, 500.0), (60.0, 1e6)])
def test_no_throttle_goes_below_a_quarter_of_the_clock(die: float, demand: float) -> None:
    now = 1.0
    for _ in range(50):
        now = clock(now, die, 60.0, demand)[0]
    assert now == 0.25


def test_power_and_energy_fall_with_the_clock_as_voltage_does() -> None:
    """f V^2 with V falling by 0.6 of its full value per full clock, to a floor of 0.7 at half the clock."""
    for at, volts in ((1.0, 1.0), (0.9, 0.94), (0.75, 0.85), (0.5, 0.7), (0.25, 0.7)):
        assert physics.clock_power_factor(at) == pytest.approx(at * volts**2)


def test_idle_power_lies_on_the_line_between_the_two_clocks_it_was_seen_at() -> None:
    for at, expected in ((1.0, 120.0), (0.6, 100.0), (0.2, 80.0), (0.1, 80.0)):
        assert physics.idle_reference_w(120.0, 80.0, at, 0.2) == pytest.approx(expected)
