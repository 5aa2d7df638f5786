"""Reward, stages, budgets and physics against rules written a second time, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from thermoe_env.device import physics
from thermoe_env.mdp.reward import REWARD_TERMS, Prices, reward_terms
from thermoe_env.mdp.signals import draw_power_budget, next_stage, thermal_signal
from thermoe_env.problem.scenario import PowerBudget, RewardWeights

PRICES = Prices.of(RewardWeights(quality=4.0), 600.0, 50_000.0, 1.0)
BEGIN = np.array([6.0, 3.0, 1.0])
positive = st.floats(0.0, 1e5)


def total(**change: float) -> float:
    """Reward of an ordinary interval with some of it changed."""
    plain = {
        "good": 30_000.0,
        "energy_j": 400.0,
        "missed": 10.0,
        "power_w": 400.0,
        "budget_w": 700.0,
        "over_c": -5.0,
        "shortfall": 0.0,
    }
    arguments = [*{**plain, **change}.values(), np.zeros(len(REWARD_TERMS))]
    return reward_terms(PRICES, *arguments)


@settings(deadline=None)  # the first call compiles
@given(
    good=positive,
    energy_j=positive,
    missed=positive,
    power_w=positive,
    budget_w=positive,
    over_c=st.floats(-50, 50),
    shortfall=positive,
)
def test_reward_is_the_sum_of_its_terms_and_each_has_its_sign(
    good, energy_j, missed, power_w, budget_w, over_c, shortfall
) -> None:
    terms = np.zeros(len(REWARD_TERMS))
    reward = reward_terms(PRICES, good, energy_j, missed, power_w, budget_w, over_c, shortfall, terms)
    assert reward == pytest.approx(terms.sum(), rel=1e-12, abs=1e-12)
    assert terms[0] >= 0.0 and np.all(terms[1:] <= 0.0)


@given(more=st.floats(1.0, 1e4))
def test_reward_falls_with_every_ill_and_rises_with_good_answers(more: float) -> None:
    assert total(good=30_000.0 + more) > total()
    for ill in ("energy_j", "missed", "shortfall"):
        assert total(**{ill: 400.0 + more}) < total(**{ill: 400.0})
    assert total(power_w=700.0 + more) < total(power_w=700.0)
    assert total(over_c=more) < total(over_c=0.0)


def test_the_standard_service_at_full_load_earns_nothing() -> None:
    assert total(good=50_000.0, energy_j=600.0, missed=0.0) == pytest.approx(0.0)


@given(st.lists(st.floats(-5.0, 20.0), min_size=1, max_size=60))
def test_stages_enter_at_once_and_leave_with_hysteresis(margins: list[float]) -> None:
    stage = 0
    for margin in margins:
        before, stage = stage, next_stage(stage, margin, BEGIN, 1.5)
        entered = int(np.sum(margin <= BEGIN))
        assert stage >= entered, "a stage is entered the moment its margin is reached"
        assert stage >= before - 1, "stages are left one at a time"
        if stage < before:
            assert margin > BEGIN[before - 1] + 1.5


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


def test_relax_solves_the_node_equation() -> None:
    """Against SciPy's integrator, over steps of any size."""
    tau, target, start = 7.0, 30.0, 5.0
    solution = solve_ivp(lambda _, x: (target - x) / tau, (0.0, 20.0), [start], rtol=1e-10, atol=1e-10)
    for step in (0.05, 1.0, 20.0):
        x = start
        for _ in range(round(20.0 / step)):
            x = physics.relax(x, target, step, tau)
        assert x == pytest.approx(solution.y[0, -1], abs=1e-6)


def test_throttle_holds_die_memory_and_power() -> None:
    arguments = {"power_cap_w": 700.0, "slowdown_c": 87.0, "hw_slowdown_c": 89.0, "memory_limit_c": 95.0}

    def clock(now: float, die: float, memory: float, demand: float) -> tuple[float, float, float]:
        return physics.next_clock(now, die, memory, demand, *arguments.values())

    assert clock(1.0, 60.0, 60.0, 500.0) == (1.0, 0.0, 0.0)
    assert clock(1.0, 60.0, 60.0, 800.0)[0] < 1.0
    assert clock(1.0, 60.0, 60.0, 800.0)[1:] == (1.0, 0.0)
    assert clock(1.0, 88.0, 60.0, 500.0)[1:] == (0.0, 1.0)
    assert clock(1.0, 60.0, 96.0, 500.0)[1:] == (0.0, 1.0)
    assert clock(1.0, 90.0, 60.0, 500.0)[0] == 0.5
    assert clock(0.5, 60.0, 60.0, 300.0)[0] > 0.5
