"""The observation: one table of fields that makes the space, encodes, decodes and documents.

An observation is a flat float32 vector in [-1, 1]; each field is scaled from [low, high] and clipped.
Some ends follow from the problem: its card, devices, budgets and terms of service. Rules read physical values
through `ranges_of(problem).decode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gymnasium import spaces

from moe.compiled import inlined, small
from moe.service.queueing import SLOT_S
from moe.workload import KNOB_NAMES
from thermoe_env.problem.problem import Problem


@dataclass(frozen=True)
class Derived:
    """An end of a range that follows from the problem."""

    text: str
    """For the table."""
    of: Callable[[Problem], float]


@dataclass(frozen=True)
class Field:
    """One observed quantity."""

    name: str
    unit: str
    low: float | Derived
    high: float | Derived
    source: str


def _most_power_w(problem: Problem) -> float:
    """Readings may lie a little above the cap, which holds a mean."""
    budget, cap_w = problem.scenario.power_budget, problem.twin.power_cap_w
    return 1.1 * max(cap_w * len(problem.scenario.devices), budget.normal_w, budget.event_w[1])


def _longest_hold_s(problem: Problem) -> float:
    brake, alarm = problem.scenario.power_budget.brake, problem.scenario.limits.alarm
    holds = (0.0 if brake is None else brake.hold_s, 0.0 if alarm is None else alarm.drain_s)
    return max(holds) or 1.0


_COOL_C = Derived("inlet - 10", lambda problem: problem.twin.inlet_c - 10.0)
_HOT_C = Derived(
    "shutdown or memory limit", lambda problem: max(problem.twin.shutdown_c, problem.twin.mem_limit_c)
)
_POWER_W = Derived("1.1 x (power cap x devices, or a budget above)", _most_power_w)
_NOTICE_S = Derived("notice", lambda problem: problem.scenario.power_budget.notice_s)


def _highest_price(problem: Problem) -> float:
    price = problem.scenario.price
    return 1.0 if price is None else max(1.0, price.times[1])


def _promised_tpot_s(problem: Problem) -> float:
    generate = problem.scenario.generate
    if generate is None:
        return 1.0
    return max(generate.tpot_s[0], 0.0 if generate.strict is None else generate.strict.tpot_s[1])


_PRICE = Derived("1, or the highest price", _highest_price)
_TPOT_S = Derived("longest promise, 1 without", _promised_tpot_s)
_RELEASE_S = Derived("longest hold or drain, 1 without", _longest_hold_s)
_INTERACTIVE_S, _DEFERRABLE_S = (
    Derived(f"expiry + {SLOT_S:g}", lambda problem, c=c: problem.scenario.service.expire_after_s[c] + SLOT_S)
    for c in range(2)
)
"""Nobody waits for longer, looked at once per slot."""


def _confidence_step(problem: Problem) -> float:
    """Knobs do more to the confidence of tokens than to that of answers of one pass."""
    if problem.scenario.generate is None:
        return 0.1
    return max(0.1, float(np.ptp(problem.profile.confidence)))


_FALL = Derived("-(0.1, tokens: range of the profile)", lambda problem: -_confidence_step(problem))
_RISE = Derived("0.1, tokens: range of the profile", _confidence_step)

FIELDS: tuple[Field, ...] = (
    Field("temp_c", "degC", _COOL_C, _HOT_C, "hottest die sensor at the end of the interval"),
    Field("mem_temp_c", "degC", _COOL_C, _HOT_C, "hottest memory sensor"),
    Field("temp_mean_c", "degC", _COOL_C, _HOT_C, "mean of the devices' die sensors"),
    Field("temp_spread_c", "degC", 0.0, 20.0, "hottest die sensor less coolest, 0 with one device"),
    Field("temp_slope_c_per_s", "degC/s", -15.0, 15.0, "change of the hottest die sensor over the interval"),
    Field("margin_c", "degC", -10.0, 40.0, "virtual temperature limit less hottest die"),
    Field("stage", "1", 0.0, 3.0, "thermal stage: NOMINAL, ELEVATED, HOT, CRITICAL"),
    Field("power_w", "W", 0.0, _POWER_W, "mean power of the interval, all devices"),
    Field("power_slow_w", "W", 0.0, _POWER_W, "mean power, 20 s average"),
    Field("budget_w", "W", 0.0, _POWER_W, "power budget of the coming interval"),
    Field("budget_ahead_w", "W", 0.0, _POWER_W, "lowest announced budget within the notice"),
    Field(
        "budget_change_s",
        "s",
        0.0,
        _NOTICE_S,
        "time until the announced budget changes; the notice if it does not",
    ),
    Field("price", "1", 0.0, _PRICE, "price of energy in the coming interval over the usual one"),
    Field("price_ahead", "1", 0.0, _PRICE, "highest announced price within the notice"),
    Field("price_change_s", "s", 0.0, _NOTICE_S, "time until the announced price changes, as the budget's"),
    Field(
        "promised_tpot_s",
        "s",
        0.0,
        _TPOT_S,
        "time per output token promised to interactive requests in the coming interval, 0 without tokens",
    ),
    Field("promised_tpot_ahead_s", "s", 0.0, _TPOT_S, "shortest announced within the notice"),
    Field("promised_tpot_change_s", "s", 0.0, _NOTICE_S, "time until it changes, as the budget's"),
    Field("tpot_share", "1", 0.0, 2.0, "mean time per output token over the promise of the interval"),
    Field(
        "duty",
        "1",
        0.0,
        1.0,
        "share of the coming interval for which limits let the device run; 0: no request is begun",
    ),
    Field(
        "release_s",
        "s",
        0.0,
        _RELEASE_S,
        "time until the power brake or the alarm's drain ends, 0 where neither holds; a slowdown has none",
    ),
    Field(
        "overload_share",
        "1",
        0.0,
        1.0,
        "joules above the budget, less those below it, over what the brake bears; 0 without a brake",
    ),
    Field("energy_share", "1", 0.0, 1.5, "energy used so far over the standard service's at full load"),
    Field("sm_clock_share", "1", 0.0, 1.0, "SM clock of the slowest device over its maximum"),
    Field("power_capped_s", "s", 0.0, 1.0, "time the power cap held the clock down"),
    Field("thermal_throttle_s", "s", 0.0, 1.0, "time a thermal slowdown held the clock down"),
    Field(
        "queue_interactive_s",
        "s",
        0.0,
        _INTERACTIVE_S,
        "waiting interactive requests over the reference capacity",
    ),
    Field(
        "queue_deferrable_s",
        "s",
        0.0,
        _DEFERRABLE_S,
        "waiting deferrable requests over the reference capacity",
    ),
    Field("oldest_interactive_s", "s", 0.0, _INTERACTIVE_S, "age of the oldest interactive request"),
    Field("oldest_deferrable_s", "s", 0.0, _DEFERRABLE_S, "age of the oldest deferrable request"),
    Field("load", "1", 0.0, 2.0, "arrivals of the interval over the reference capacity"),
    Field("load_fast", "1", 0.0, 2.0, "same, 5 s average"),
    Field("load_slow", "1", 0.0, 2.0, "same, 30 s average"),
    Field("interactive_share", "1", 0.0, 1.0, "share of interactive requests in the arrivals"),
    Field("late_share", "1", 0.0, 1.0, "share of late answers and expiries in the interval"),
    Field("late_share_slow", "1", 0.0, 1.0, "same, 30 s average"),
    Field("batch_fill", "1", 0.0, 1.0, "mean requests per batch over the batch size"),
    Field("busy", "1", 0.0, 1.2, "busy time of the device over the interval"),
    Field("confidence", "1", 0.0, 1.0, "mean probability of the answers given"),
    Field("entropy", "1", 0.0, 0.6, "mean entropy of the answers over its maximum"),
    Field("confidence_change", "1", _FALL, _RISE, "confidence less that of the interval before"),
    Field("shift_indicator", "1", -0.2, 0.2, "confidence less its 20 s average: it moves when the inputs do"),
    Field(
        "since_change_s",
        "s",
        0.0,
        8.0,
        "time since confidence or entropy last changed (`moe.service.gates.changed`), or the start",
    ),
    Field("adapted_since_change_s", "s", 0.0, 8.0, "of that, intervals with adaptation"),
    Field("confidence_mean", "1", 0.0, 1.0, "mean confidence of the episode so far"),
    Field("ttt_effort", "1", 0.0, 1.0, "share of the last intervals with adaptation, 30 s average"),
    Field("ttt_budget", "1", 0.0, 1.0, "energy that adaptation may spend over a full bank, 1 if unlimited"),
    Field("ttt_refused_share", "1", 0.0, 1.0, "share of adaptation steps that the energy budget refused"),
    Field("load_imbalance", "1", 0.0, 3.0, "coefficient of variation of tokens per expert"),
    *(
        Field(f"{name}_level", "1", 0.0, 1.0, f"level of the knob {name}, 0 lowest to 1 highest")
        for name in KNOB_NAMES
    ),
    Field("time_left", "1", 0.0, 1.0, "share of the episode still to come"),
)

FIELD_NAMES = tuple(f.name for f in FIELDS)
RAW_DTYPE = np.dtype([(name, np.float64) for name in FIELD_NAMES])
"""One raw observation in physical units; its float64 view has the fields in table order."""


class Ranges(NamedTuple):
    """Ends of every field's range in one problem, float64 [fields] in table order."""

    low: np.ndarray
    high: np.ndarray

    @property
    def scale(self) -> np.ndarray:
        """What a unit of a field is in an observation, [fields]."""
        return 2.0 / (self.high - self.low)

    def decode(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        """Physical values of a batch of observations by field name.

        Args:
            observation: [n, fields] or [fields].

        Returns:
            name -> [n] (or scalar array); clipped values read as the end of their range.

        Raises:
            ValueError: not as many fields, or ranges, as there are.
        """
        if np.shape(observation)[-1:] != (len(FIELDS),) or len(self.low) != len(FIELDS):
            raise ValueError(
                f"an observation has {len(FIELDS)} fields, got shape {np.shape(observation)} and "
                f"{len(self.low)} ranges; one recorded by a version with other fields, or without their "
                "ranges, cannot be decoded, play the episode again"
            )
        span = self.high - self.low
        values = self.low + (np.asarray(observation, np.float64) + 1.0) * 0.5 * span
        return {name: values[..., i] for i, name in enumerate(FIELD_NAMES)}


def ranges_of(problem: Problem) -> Ranges:
    """The ranges that a problem's observations are scaled from."""

    def value(end: float | Derived) -> float:
        return end.of(problem) if isinstance(end, Derived) else end

    return Ranges(np.array([value(f.low) for f in FIELDS]), np.array([value(f.high) for f in FIELDS]))


def observation_space() -> spaces.Box:
    """The space that the table makes."""
    return spaces.Box(-1.0, 1.0, (len(FIELDS),), np.float32)


@small
def encode_row(raw, low, scale, out):
    """Scale one raw row (float64 [fields]) by `Ranges` into an observation row (float32 [fields])."""
    for f in range(raw.shape[0]):
        out[f] = min(1.0, max(-1.0, (raw[f] - low[f]) * scale[f] - 1.0))


@inlined
def encode_finite(raw, low, scale, out):
    """`encode_row`; returns whether all raw values are finite."""
    encode_row(raw, low, scale, out)
    total = 0.0
    for f in range(raw.shape[0]):
        total += raw[f]
    return math.isfinite(total)


def fields_table() -> str:
    """The table in Markdown, for documentation."""

    def shown(end: float | Derived) -> str:
        return end.text if isinstance(end, Derived) else f"{end:g}"

    rows = [
        f"| {i} | `{f.name}` | {f.unit} | {shown(f.low)} | {shown(f.high)} | {f.source} |"
        for i, f in enumerate(FIELDS)
    ]
    return "\n".join(
        ["| Num | Observation | Unit | Min | Max | Source |", "|---|---|---|---|---|---|", *rows]
    )
