"""The thermal signal: stages with hysteresis, a level in [0, 1], and announced power budgets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe.compiled import fill, jit
from moe.randomness import derive, uniform
from thermoe_env.problem.limits import PowerBudget

STAGES = ("NOMINAL", "ELEVATED", "HOT", "CRITICAL")
_SIGNAL_SPAN_C = 10.0


@jit
def next_stage(stage, margin_c, begin_c, hysteresis_c):
    """Stage after a reading: entered at its margin, left one at a time beyond the hysteresis.

    Args:
        stage: current stage, 0 to 3.
        margin_c: limit less temperature.
        begin_c: float [3], falling margins at which stages 1 to 3 begin.
        hysteresis_c: extra margin needed to leave a stage.
    """
    entered = 0
    for s in range(3):
        if margin_c <= begin_c[s]:
            entered = s + 1
    if entered >= stage:
        return entered
    return stage - 1 if margin_c > begin_c[stage - 1] + hysteresis_c else stage


@jit
def thermal_signal(margin_c):
    """0 far below the limit, 1 at it, linear over the last 10 degrees."""
    return min(1.0, max(0.0, 1.0 - margin_c / _SIGNAL_SPAN_C))


class BudgetTerms(NamedTuple):
    """A `PowerBudget`, as compiled code reads it."""

    normal_w: float
    event_low_w: float
    event_high_w: float
    event_low_s: float
    event_high_s: float
    gap_low_s: float
    gap_high_s: float
    interval_s: float


def budget_terms(config: PowerBudget, interval_s: float) -> BudgetTerms:
    """`BudgetTerms` of a scenario's budget."""
    return BudgetTerms(config.normal_w, *config.event_w, *config.event_s, *config.gap_s, interval_s)


@jit
def fill_power_budget(terms, seed, budget_w):
    """Draw the power budget of an episode.

    Args:
        terms: `BudgetTerms`.
        seed: uint64.
        budget_w: float [steps + notice + 1]; filled.
    """
    key = derive(seed, np.uint64(3))
    fill(budget_w, terms.normal_w)
    end_s = budget_w.shape[0] * terms.interval_s
    t, i = uniform(key, 0, 0.0, terms.gap_high_s), 1
    while t < end_s:
        duration = uniform(key, i, terms.event_low_s, terms.event_high_s)
        first, last = round(t / terms.interval_s), round((t + duration) / terms.interval_s)
        event_w = uniform(key, i + 1, terms.event_low_w, terms.event_high_w)
        for interval in range(int(first), min(int(last), budget_w.shape[0])):
            budget_w[interval] = event_w
        t += duration + uniform(key, i + 2, terms.gap_low_s, terms.gap_high_s)
        i += 3


def draw_power_budget(config: PowerBudget, seed: int, steps: int, interval_s: float) -> np.ndarray:
    """Power budget in W per interval, drawn for an episode: normal, with demand-response events.

    Returns:
        float [steps + notice + 1]: longer than the episode by the notice, so that a look ahead exists.
    """
    budget_w = np.zeros(steps + round(config.notice_s / interval_s) + 1)
    fill_power_budget(budget_terms(config, interval_s), np.uint64(seed), budget_w)
    return budget_w
