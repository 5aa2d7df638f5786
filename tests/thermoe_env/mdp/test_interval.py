"""What an interval means: observation, reward and costs, recomputed from what was served and read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe.workload import REQUEST_CLASSES, Workload, WorkStats
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import FIELD_NAMES, ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.score import KNOBS_READ

WEIGHTS = {"energy": 0.7, "late": 2.0, "heat": 0.5, "quality": 4.0}
LIMIT_C, NOTICE_S, EPISODE_S = 42.0, 6, 90
HARD = {
    "knobs": list(KNOBS_READ),
    "episode_s": EPISODE_S,
    "limits": {"temperature_c": LIMIT_C},
    "reward": WEIGHTS,
    "traffic": {"low_load": 0.2, "high_load": 2.5, "interactive_share": 0.6, "shift_dwell_s": 10.0},
    "service": {"expire_after_s": [1.0, 61.0]},
    "power_budget": {"gap_s": [3.0, 9.0], "event_s": [4.0, 12.0], "notice_s": NOTICE_S},
    "price": {"gap_s": [3.0, 9.0], "event_s": [4.0, 12.0], "times": [0.5, 2.0]},
    "adaptation": {"budget": {"fraction": 0.05, "window_s": 5.0, "bank_windows": 1}},
}
"""An episode in which limits, budgets, deadlines and the budget of adaptation are broken and kept."""


def averaged(values: pd.Series, time_constant_s: float, interval_s: float) -> pd.Series:
    """The running mean with this time constant; its first value is the first of the values."""
    return pd.Series(values.ewm(alpha=1.0 - math.exp(-interval_s / time_constant_s), adjust=False).mean())


def after(start: float, values: pd.Series) -> pd.Series:
    return pd.Series([start, *values])


def owed(growth: Any) -> np.ndarray:
    """By how much what is owed grows in each interval, where a debt grows by this."""
    return np.diff(np.maximum(0.0, np.cumsum(growth)), prepend=0.0)


def per_class(work: dict[str, Any]) -> dict[str, float]:
    """A column for each number."""
    return {
        name if np.ndim(value) == 0 else f"{name}_{request_class}": number
        for name, value in work.items()
        for request_class, number in zip(REQUEST_CLASSES, np.atleast_1d(value), strict=False)
    }


class LeavesOut:
    """A workload that leaves two adaptation steps out in each interval, as a live guard does."""

    def __init__(self, inner: Workload) -> None:
        self.reset, self._inner = inner.reset, inner

    def run(self, *arguments: Any) -> WorkStats:
        return replace(self._inner.run(*arguments), ttt_left_out=2.0)


def play(problem: Problem, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]:
    """An episode of random knobs, held for a random time: (observed values, facts, first reading)."""
    env, rng = ThermalMoEEnv(problem.scenario, world="twin"), np.random.default_rng(seed)
    seen, facts, ended, ranges = [], [], False, ranges_of(problem)
    world: Any = env._world
    world.workload = LeavesOut(world.workload)
    first = env.reset(seed=seed)[1]["reading"]
    action = rng.integers(0, problem.knobs.nvec)
    while not ended:
        if rng.random() < 0.2:
            action = rng.integers(0, problem.knobs.nvec)
        observation, reward, terminated, ended, info = env.step(action)
        assert not terminated
        seen.append(ranges.decode(observation))
        facts.append(
            per_class(info["work"])
            | {f"gpu_{name}": value for name, value in info["reading"].items()}
            | {f"term_{name}": value for name, value in info["reward_terms"].items()}
            | {f"cost_{name}": value for name, value in info["cost"].items()}
            | {f"level_{name}": level for name, level in zip(KNOBS_READ, action.tolist(), strict=True)}
            | {"budget_now_w": info["budget_w"], "price_now": info["price"], "reward": reward}
        )
    return pd.DataFrame(seen).astype(float), pd.DataFrame(facts).astype(float), first


def announced(values: Any, notice: int, interval_s: float) -> tuple[list[pd.Series], pd.Series]:
    """Of each interval's end: the values from there to the end of the notice, and time until they change."""
    ahead = [values[t + 1 : t + 1 + notice + 1] for t in range(len(values) - notice - 1)]
    changes = [next((i for i, b in enumerate(each) if b != each.iloc[0]), notice) for each in ahead]
    return ahead, pd.Series(changes) * interval_s


@pytest.fixture(scope="module", params=[1.0, 0.5])
def hard(request: pytest.FixtureRequest, problem: Problem) -> Problem:
    return Problem.of(load_scenario(problem.scenario, interval_s=request.param, **HARD))


def test_the_observation_is_what_its_table_says(hard: Problem) -> None:
    seen, w, first = play(hard, seed=4)
    dt, capacity = hard.scenario.interval_s, hard.capacity_rps
    answered = w.answered_interactive + w.answered_deferrable
    expired = w.expired_interactive + w.expired_deferrable
    late = w.late_interactive + w.late_deferrable + expired
    load = (w.arrived_interactive + w.arrived_deferrable) / (capacity * dt)
    late_share = late / np.maximum(1.0, answered + expired)
    adapts = (w.level_ttt_steps > 0).astype(float)
    sure = w.confidence[answered > 0]
    notice = round(NOTICE_S / dt)
    budgets, budget_changes = announced(w.budget_now_w, notice, dt)
    prices, price_changes = announced(w.price_now, notice, dt)
    asked = w.ttt_refused + w.ttt_steps + w.ttt_left_out
    expected = {
        "margin_c": LIMIT_C - w.gpu_temp_c,
        "temp_slope_c_per_s": after(first["temp_c"], w.gpu_temp_c).diff()[1:] / dt,
        "power_w": w.gpu_power_w,
        "power_slow_w": averaged(after(first["power_w"], w.gpu_power_w), 20.0, dt)[1:],
        "budget_w": w.budget_now_w[1:],
        "budget_ahead_w": pd.Series([each.min() for each in budgets]),
        "budget_change_s": budget_changes,
        "price": w.price_now[1:],
        "price_ahead": pd.Series([each.max() for each in prices]),
        "price_change_s": price_changes,
        "energy_share": w.gpu_energy_j.cumsum() / (hard.reference_power_w * EPISODE_S),
        "sm_clock_share": w.gpu_sm_clock_mhz / hard.twin.max_clock_mhz,
        "queue_interactive_s": w.waiting_interactive / capacity,
        "queue_deferrable_s": w.waiting_deferrable / capacity,
        "load": load,
        "load_fast": averaged(load, 5.0, dt),
        "load_slow": averaged(load, 30.0, dt),
        "interactive_share": w.arrived_interactive / (w.arrived_interactive + w.arrived_deferrable),
        "late_share": late_share,
        "late_share_slow": averaged(after(0.0, late_share), 30.0, dt)[1:],
        "busy": w.busy_s / dt,
        "confidence": w.confidence,
        "confidence_change": sure.diff().fillna(0.0).reindex(w.index, fill_value=0.0),
        "shift_indicator": (sure - averaged(sure, 20.0, dt).shift(1, fill_value=sure.iloc[0])).reindex(
            w.index, fill_value=0.0
        ),
        "confidence_mean": (w.confidence * answered).cumsum() / np.maximum(1.0, answered.cumsum()),
        "ttt_effort": averaged(after(0.0, adapts), 30.0, dt)[1:],
        "ttt_budget": w.budget_share,
        "ttt_refused_share": w.ttt_refused / np.maximum(1.0, asked),
        "time_left": 1.0 - (w.index.to_series() + 1) * dt / EPISODE_S,
    } | {
        f"{name}_level": w[f"level_{name}"] / (len(hard.knobs.levels[name]) - 1)
        for name in KNOBS_READ
    }  # fmt: skip
    for name, low, high in zip(FIELD_NAMES, *ranges_of(hard), strict=True):
        if name in expected:
            values = np.clip(np.asarray(expected[name]), low, high)
            np.testing.assert_allclose(
                seen[name][: len(values)], values, atol=1e-6 * (high - low), err_msg=name
            )
            assert np.ptp(values) > 0.0 or name == "sm_clock_share", name


def test_reward_and_costs_are_what_the_scenario_says_of_the_facts(hard: Problem) -> None:
    """In units of the standard service at full load: its energy, and its good answers, in an interval."""
    _, w, _ = play(hard, seed=5)
    dt = hard.scenario.interval_s
    unit_j, unit_good = hard.reference_power_w * dt, hard.reference_good_rps * dt
    missed = w.filter(regex="^(late|expired)_").sum(axis=1)
    over_c, over_j = w.gpu_temp_c - LIMIT_C, np.maximum(0.0, w.gpu_power_w - w.budget_now_w) * dt
    floor = hard.quality_floor[w.shift_id.astype(int)]
    late = [
        w[f"late_{c}"] + w[f"expired_{c}"] - 0.01 * (w[f"answered_{c}"] + w[f"expired_{c}"])
        for c in REQUEST_CLASSES
    ]
    left = np.where(w.index == w.index[-1], w.waiting_interactive + w.waiting_deferrable, 0.0)
    expected = {
        "good": w.good / unit_good,
        "energy": -w.price_now * w.gpu_energy_j / unit_j - left / (hard.capacity_rps * dt),
        "late": -sum(owed(of_class) for of_class in late) / unit_good,
        "heat": -owed(dt * ((over_c > 0.0) - 0.01)) / dt,
        "quality": -owed((w.answered_interactive + w.answered_deferrable) * floor - w.correct) / unit_good,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            w[f"term_{name}"], WEIGHTS.get(name, 1.0) * values, rtol=1e-9, atol=1e-9, err_msg=name
        )
        assert np.ptp(values) > 0.0, name
    assert left.any() and w.term_quality.max() > 0.0, "answers above the floor pay back what was charged"
    np.testing.assert_allclose(w.reward, w.filter(like="term_").sum(axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(w.cost_above_limit_s, dt * (over_c > 0.0))
    np.testing.assert_allclose(w.cost_missed, missed)
    np.testing.assert_allclose(w.cost_over_budget_j, over_j)
