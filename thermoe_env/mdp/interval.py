"""What an interval means: averages, stage, quality account, reward and the raw observation.

`settle` is the one place where work and reading become reward and observation, in both worlds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe.compiled import inlined, inner
from moe.memory import as_record
from moe.service.budget import share_of
from moe.service.gates import CHANGE_TEST, any_changed
from moe.workload import KNOB_NAMES, REQUEST_CLASSES
from thermoe_env.device.physics import approach, decay
from thermoe_env.mdp.fields import FIELD_NAMES
from thermoe_env.mdp.limits import STATE as LIMIT_STATE
from thermoe_env.mdp.limits import (
    Acts,
    heed_power,
    heed_temperature,
    pass_drain,
    show_limits,
)
from thermoe_env.mdp.reward import Prices, owe, reward_terms
from thermoe_env.mdp.signals import next_stage
from thermoe_env.problem.problem import Problem

COST_NAMES = ("above_limit_s", "missed", "over_budget_j")
"""Constraint costs of an interval, apart from the reward."""

TRACK_DTYPE = np.dtype(
    [
        (name, np.float64)
        for name in (
            "step", "stage", "temp_c", "power_slow_w", "energy_j", "load_fast", "load_slow",
            "late_share_slow", "confidence", "confidence_slow", "confidence_sum", "answered_sum",
            "ttt_effort", "heat_debt_s", "quality_debt", "since_change_s", "adapted_since_change_s",
            *LIMIT_STATE,
        )
    ]
    + [("late_debt", np.float64, (len(REQUEST_CLASSES),)), ("change_test", np.float64, (2, CHANGE_TEST))]
)  # fmt: skip
"""What the environment remembers between intervals; debts below 0 are what was done beyond a promise."""


CHANGE_THRESHOLD, CHANGE_TOLERANCE = 0.006, 0.0025
"""Of the change tests of confidence and entropy: several standard errors of a second's answers."""


_FIRST_LEVEL = FIELD_NAMES.index(f"{KNOB_NAMES[0]}_level")
"""Place of the first knob's level; the others follow in the order of the table."""


class Rules(NamedTuple):
    """The scenario's limits and references, as compiled code reads them."""

    limit_c: float
    """Of a device whose inlet is modelled; `begin` and `settle` are told the one in force."""
    stage_begin_c: np.ndarray  # [3]
    hysteresis_c: float
    load_per_request: float
    """One over the requests of the standard service in one interval."""
    energy_per_request_j: float
    """Of the standard service at full load."""
    late_share: float
    """Of the finished requests of a class that may be late or expired."""
    hot_share: float
    """Of the time that may be above the limit."""
    share_per_j: float
    """One over its energy in an episode at full load."""
    interval_s: float
    steps: int
    notice: int
    """Intervals by which budgets are announced."""
    max_clock_mhz: float
    keep_5s: float
    """Weight of the past in an average with a time constant of 5 s, after one interval."""
    keep_20s: float
    keep_30s: float
    level_share: np.ndarray  # [knobs], one over the highest level
    first_budget_share: float
    """What adaptation may spend at the start, over a full bank."""
    brake_bears_s: float
    """This and what follows are `thermoe_env.mdp.limits.Acts`."""
    brake_duty: float
    brake_hold_s: float
    slowdown_duty: float
    recover_c: float
    drain_s: float


def prices_of(problem: Problem) -> np.ndarray:
    """`Prices` of a problem, as an array of one record."""
    s = problem.scenario
    energy_j, good = problem.reference_power_w * s.interval_s, problem.reference_good_rps * s.interval_s
    return as_record(Prices.of(s.reward, energy_j, good, s.interval_s))


def rules_of(problem: Problem) -> np.ndarray:
    """`Rules` of a problem, as an array of one record."""
    s = problem.scenario
    rules = Rules(
        problem.limit_c, np.array(s.limits.stage_margins_c), s.limits.hysteresis_c,
        1.0 / (problem.capacity_rps * s.interval_s), problem.reference_power_w / problem.capacity_rps,
        s.feasible.late_share, s.feasible.hot_share,
        1.0 / (problem.reference_power_w * s.interval_s * s.steps), s.interval_s, s.steps,
        round(s.power_budget.notice_s / s.interval_s), problem.twin.max_clock_mhz,
        decay(s.interval_s, 5.0), decay(s.interval_s, 20.0), decay(s.interval_s, 30.0),
        np.array([1.0 / max(1.0, len(problem.knobs.levels[name]) - 1) for name in KNOB_NAMES]),
        share_of(problem.purse), *Acts.of(s),
    )  # fmt: skip
    return as_record(rules)


@inlined
def _ahead(rules, series, step):
    """What is announced of a value: (now, least within the notice, most, intervals until it changes)."""
    now = series[step]
    least, most, change = now, now, rules.notice
    for later in range(rules.notice, 0, -1):
        then = series[step + later]
        least, most = min(least, then), max(most, then)
        if then != now:
            change = later
    return now, least, most, change


@inner
def look_ahead(rules, announced, step, raw):
    """Fill the fields of what is announced: now, the hardest within the notice, and time until it changes."""
    now, least, most, change = _ahead(rules, announced[0], step)
    raw.budget_w, raw.budget_ahead_w, raw.budget_change_s = now, least, change * rules.interval_s
    now, least, most, change = _ahead(rules, announced[1], step)
    raw.price, raw.price_ahead, raw.price_change_s = now, most, change * rules.interval_s
    now, least, most, change = _ahead(rules, announced[2], step)
    raw.promised_tpot_s, raw.promised_tpot_ahead_s = now, least
    raw.promised_tpot_change_s = change * rules.interval_s


@inner
def begin(rules, limit_c, track, gpu, announced, raw):
    """Start an episode: clear `track` and fill the raw observation of a device at rest.

    Args:
        rules: `Rules`.
        limit_c: temperature limit in force.
        track: record of `TRACK_DTYPE`, zeroed by the caller.
        gpu: first reading, record of `GPU_DTYPE`.
        announced: float [3, steps + notice + 1], `ANNOUNCED`.
        raw: record of `RAW_DTYPE`, zeroed by the caller; `fill_levels` has the rest.
    """
    track.temp_c = gpu.temp_c
    track.power_slow_w = gpu.power_w
    margin = limit_c - gpu.temp_c
    track.stage = next_stage(int(track.stage), margin, rules.stage_begin_c, rules.hysteresis_c)
    heed_temperature(rules, track, margin)
    show_limits(rules, track, announced[0, int(track.step)], raw)
    raw.temp_c, raw.mem_temp_c, raw.margin_c = gpu.temp_c, gpu.mem_temp_c, margin
    raw.temp_mean_c, raw.temp_spread_c = gpu.temp_mean_c, gpu.temp_spread_c
    raw.stage = track.stage
    raw.power_w, raw.power_slow_w = gpu.power_w, gpu.power_w
    raw.sm_clock_share = gpu.sm_clock_mhz / rules.max_clock_mhz
    look_ahead(rules, announced, int(track.step), raw)
    raw.ttt_budget = rules.first_budget_share
    raw.time_left = 1.0


@inner
def settle(rules, prices, quality_floor, limit_c, track, work, gpu, announced, adapts, raw, terms, cost):
    """Account for one interval.

    Args:
        rules: `Rules`.
        prices: `Prices`.
        quality_floor: float [S], least quality per input shift, on the mean of an episode.
        limit_c: temperature limit in force.
        track: record of `TRACK_DTYPE`, updated.
        work: record of `WORK_DTYPE`, what was done.
        gpu: record of `GPU_DTYPE`, what was read.
        announced: float [3, steps + notice + 1], `ANNOUNCED`.
        adapts: whether the knobs ask for adaptation.
        raw: record of `RAW_DTYPE`, filled but for what `fill_levels` has.
        terms: float [5], filled.
        cost: float [3], filled.

    Returns:
        The reward.
    """
    step = int(track.step)
    budget_now, price, promised_s = announced[0, step], announced[1, step], announced[2, step]
    dt = rules.interval_s
    answered, expired = work.answered[0] + work.answered[1], work.expired[0] + work.expired[1]
    missed = work.late[0] + work.late[1] + expired
    over_c = gpu.temp_c - limit_c
    late = 0.0
    for c in range(work.late.shape[0]):
        missed_here = work.late[c] + work.expired[c]
        finished = work.answered[c] + work.expired[c]
        track.late_debt[c], more = owe(track.late_debt[c], missed_here - rules.late_share * finished)
        late += more
    hot_s = dt if over_c > 0.0 else 0.0
    track.heat_debt_s, heat_s = owe(track.heat_debt_s, hot_s - rules.hot_share * dt)
    wrong = answered * quality_floor[int(work.shift_id)] - work.correct
    track.quality_debt, quality = owe(track.quality_debt, wrong)
    energy_j = price * gpu.energy_j
    if step + 1 == rules.steps:  # what is left to do costs what the standard service takes for it
        energy_j += (work.waiting[0] + work.waiting[1]) * rules.energy_per_request_j
    reward = reward_terms(prices, work.good, energy_j, late, heat_s, quality, terms)
    cost[0] = hot_s
    cost[1] = missed
    cost[2] = max(0.0, gpu.power_w - budget_now) * dt

    arrived = work.arrived[0] + work.arrived[1]
    load = arrived * rules.load_per_request
    late_share = missed / max(1.0, answered + expired)
    first = step == 0
    track.load_fast = load if first else approach(track.load_fast, load, rules.keep_5s)
    track.load_slow = load if first else approach(track.load_slow, load, rules.keep_30s)
    track.late_share_slow = approach(track.late_share_slow, late_share, rules.keep_30s)
    track.power_slow_w = approach(track.power_slow_w, gpu.power_w, rules.keep_20s)
    track.energy_j += gpu.energy_j
    track.ttt_effort = approach(track.ttt_effort, 1.0 if adapts else 0.0, rules.keep_30s)
    track.since_change_s += dt
    if adapts:
        track.adapted_since_change_s += dt
    indicator, change = 0.0, 0.0
    if answered > 0:
        # A shift may leave confidence where it was and show in entropy alone.
        answers = (work.confidence, work.entropy)
        if any_changed(track.change_test, answers, CHANGE_THRESHOLD, CHANGE_TOLERANCE):
            track.since_change_s, track.adapted_since_change_s = 0.0, 0.0
        if track.answered_sum > 0.0:
            change = work.confidence - track.confidence
        track.confidence = work.confidence
        slow = work.confidence if track.answered_sum == 0.0 else track.confidence_slow
        indicator = work.confidence - slow
        track.confidence_slow = approach(slow, work.confidence, rules.keep_20s)
        track.confidence_sum += work.confidence * answered
        track.answered_sum += answered
    margin = limit_c - gpu.temp_c
    track.stage = next_stage(int(track.stage), margin, rules.stage_begin_c, rules.hysteresis_c)
    heed_power(rules, track, gpu.power_w, budget_now)
    pass_drain(rules, track)
    heed_temperature(rules, track, margin)
    show_limits(rules, track, budget_now, raw)

    raw.temp_c, raw.mem_temp_c, raw.margin_c, raw.stage = gpu.temp_c, gpu.mem_temp_c, margin, track.stage
    raw.temp_mean_c, raw.temp_spread_c = gpu.temp_mean_c, gpu.temp_spread_c
    raw.temp_slope_c_per_s = (gpu.temp_c - track.temp_c) / dt
    raw.power_w, raw.power_slow_w = gpu.power_w, track.power_slow_w
    raw.energy_share = track.energy_j * rules.share_per_j
    raw.sm_clock_share = gpu.sm_clock_mhz / rules.max_clock_mhz
    raw.power_capped_s, raw.thermal_throttle_s = gpu.power_capped_s, gpu.thermal_throttle_s
    raw.queue_interactive_s = work.waiting[0] * rules.load_per_request * dt
    raw.queue_deferrable_s = work.waiting[1] * rules.load_per_request * dt
    raw.oldest_interactive_s, raw.oldest_deferrable_s = work.oldest_s[0], work.oldest_s[1]
    raw.load, raw.load_fast, raw.load_slow = load, track.load_fast, track.load_slow
    raw.interactive_share = work.arrived[0] / max(1.0, arrived)
    raw.late_share, raw.late_share_slow = late_share, track.late_share_slow
    raw.batch_fill, raw.busy = work.batch_fill, work.busy_s / dt
    raw.confidence, raw.entropy = work.confidence, work.entropy
    raw.confidence_change = change
    raw.shift_indicator = indicator
    raw.since_change_s, raw.adapted_since_change_s = track.since_change_s, track.adapted_since_change_s
    raw.confidence_mean = track.confidence_sum / max(1.0, track.answered_sum)
    raw.ttt_effort = track.ttt_effort
    raw.ttt_budget = work.budget_share
    raw.ttt_refused_share = work.ttt_refused / max(1.0, work.ttt_refused + work.ttt_steps + work.ttt_left_out)
    raw.load_imbalance = work.load_imbalance
    raw.tpot_share = work.tpot_s / promised_s if promised_s > 0.0 else 0.0
    track.temp_c = gpu.temp_c
    track.step = step + 1
    look_ahead(rules, announced, step + 1, raw)
    raw.time_left = 1.0 - track.step / rules.steps
    return reward


@inlined
def fill_levels(rules, index, raw_row):
    """Fill the fields of the knobs' levels, each as a share of the highest.

    Args:
        rules: `Rules`.
        index: int64 [knobs], levels in force.
        raw_row: float [fields].
    """
    for k in range(index.shape[0]):
        raw_row[_FIRST_LEVEL + k] = index[k] * rules.level_share[k]
