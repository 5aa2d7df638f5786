"""Signals: stages of heat with hysteresis, a level in [0, 1], and what is announced ahead."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe.compiled import fill, inlined, jit
from moe.memory import as_record
from moe.randomness import derive, uniform
from thermoe_env.problem.announced import Events
from thermoe_env.problem.limits import PowerBudget
from thermoe_env.problem.scenario import Scenario

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


class EventTerms(NamedTuple):
    """A value over an episode, and the `Events` that change it, as compiled code reads them."""

    normal: float
    event_low: float
    event_high: float
    event_low_s: float
    event_high_s: float
    gap_low_s: float
    gap_high_s: float
    interval_s: float


ANNOUNCED = ("budget_w", "price", "tpot_s")
"""Values over an episode that are announced ahead: power budget, price of energy over the usual one, and the
time per output token that interactive requests are promised (0 where a service gives none)."""
_STREAMS = np.array([3, 10, 11], np.uint64)
"""Of an episode's seed, from which each is drawn."""


def announced_terms(scenario: Scenario) -> np.ndarray:
    """`EventTerms` of each of `ANNOUNCED` in a scenario, records [3]."""
    generate, budget, never = scenario.generate, scenario.power_budget, Events()
    promised_s = 0.0 if generate is None else generate.tpot_s[0]
    strict = None if generate is None else generate.strict
    rows = (
        (budget.normal_w, budget.event_w, budget),
        (1.0, (1.0, 1.0), never) if scenario.price is None else (1.0, scenario.price.times, scenario.price),
        (promised_s, (promised_s, promised_s), never)
        if strict is None
        else (promised_s, strict.tpot_s, strict),
    )
    return np.concatenate(
        [
            as_record(EventTerms(normal, *values, *when.event_s, *when.gap_s, scenario.interval_s))
            for normal, values, when in rows
        ]
    )


@jit
def fill_events(terms, seed, stream, series):
    """Draw a value over an episode.

    Args:
        terms: `EventTerms`.
        seed: uint64.
        stream: uint64, which of the seed's.
        series: float [steps + notice + 1]; filled.
    """
    key = derive(seed, stream)
    fill(series, terms.normal)
    end_s = series.shape[0] * terms.interval_s
    t, i = uniform(key, 0, 0.0, terms.gap_high_s), 1
    while t < end_s:
        duration = uniform(key, i, terms.event_low_s, terms.event_high_s)
        first, last = round(t / terms.interval_s), round((t + duration) / terms.interval_s)
        value = uniform(key, i + 1, terms.event_low, terms.event_high)
        for interval in range(int(first), min(int(last), series.shape[0])):
            series[interval] = value
        t += duration + uniform(key, i + 2, terms.gap_low_s, terms.gap_high_s)
        i += 3


@inlined
def fill_announced(terms, seed, announced):
    """Draw all of `ANNOUNCED` for an episode: `EventTerms` [3] and float [3, steps + notice + 1]."""
    for row in range(terms.shape[0]):
        fill_events(terms[row], seed, _STREAMS[row], announced[row])


def draw_power_budget(config: PowerBudget, seed: int, steps: int, interval_s: float) -> np.ndarray:
    """Power budget in W per interval, drawn for an episode: normal, with demand-response events.

    Returns:
        float [steps + notice + 1]: longer than the episode by the notice, so that a look ahead exists.
    """
    budget_w = np.zeros(steps + round(config.notice_s / interval_s) + 1)
    terms = EventTerms(config.normal_w, *config.event_w, *config.event_s, *config.gap_s, interval_s)
    fill_events(terms, np.uint64(seed), _STREAMS[0], budget_w)
    return budget_w
