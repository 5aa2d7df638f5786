"""The thermal signal: stages with hysteresis, a level in [0, 1], and announced power budgets."""

from __future__ import annotations

import numpy as np

from moe.queueing import jit
from thermoe_env.scenario import PowerBudget

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


def draw_power_budget(config: PowerBudget, seed: int, steps: int, interval_s: float) -> np.ndarray:
    """Power budget in W per interval, drawn for an episode: normal, with demand-response events.

    Returns:
        float [steps + notice]: longer than the episode by the notice, so that a look ahead exists.
    """
    rng = np.random.default_rng([seed, 3])
    notice = round(config.notice_s / interval_s)
    budget = np.full(steps + notice + 1, config.normal_w)
    t = rng.uniform(0.0, config.gap_s[1])
    while t < len(budget) * interval_s:
        duration = rng.uniform(*config.event_s)
        budget[round(t / interval_s) : round((t + duration) / interval_s)] = rng.uniform(*config.event_w)
        t += duration + rng.uniform(*config.gap_s)
    return budget
