"""Limits that act: power brake, thermal slowdown and alarm, as state that moves once per interval.

What an interval was measured to be decides what holds in the next: the share of time for which the device
may run (`track.duty`), and how many classes of requests may be begun. Nothing here asks where a reading comes
from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe.compiled import inlined
from thermoe_env.problem.scenario import Scenario

CAUSES = ("brake", "slowdown", "alarm")
"""What may hold the service down, by bit."""
CAUSES_OF = tuple(
    ", ".join(cause for bit, cause in enumerate(CAUSES) if held >> bit & 1)
    for held in range(1 << len(CAUSES))
)
"""Text of each set of bits, "" of none."""

STATE = ("duty", "over_budget_j", "brake_left_s", "at_limit", "drain_left_s")
"""What is remembered between intervals. `at_limit`, 0.0 or 1.0: the limit was reached and is not left yet."""


class Acts(NamedTuple):
    """What follows where limits are not kept; one that the scenario leaves out does nothing."""

    brake_bears_s: float
    """Joules above the budget that the brake bears, over the budget."""
    brake_duty: float
    brake_hold_s: float
    slowdown_duty: float
    recover_c: float
    """Margin at which the limit counts as left."""
    drain_s: float

    @classmethod
    def of(cls, scenario: Scenario) -> Acts:
        """Those of a scenario."""
        brake, limits = scenario.power_budget.brake, scenario.limits
        never = math.inf, 1.0, 0.0
        return cls(
            *(never if brake is None else (brake.bears_s, brake.duty, brake.hold_s)),
            *((1.0, 0.0) if limits.slowdown is None else (limits.slowdown.duty, limits.slowdown.recover_c)),
            0.0 if limits.alarm is None else limits.alarm.drain_s,
        )


@inlined
def heed_power(rules, track, power_w, budget_w):
    """Move the brake by an interval of mean power `power_w` under `budget_w`.

    It goes by joules, as a breaker of inverse time: much is borne for less long than little, and what lies
    below the budget makes up for what lay above.
    """
    if track.brake_left_s > 0.0:
        track.brake_left_s = max(0.0, track.brake_left_s - rules.interval_s)
        return
    track.over_budget_j = max(0.0, track.over_budget_j + (power_w - budget_w) * rules.interval_s)
    if track.over_budget_j > rules.brake_bears_s * budget_w:
        track.brake_left_s, track.over_budget_j = rules.brake_hold_s, 0.0


@inlined
def heed_temperature(rules, track, margin_c):
    """Enter and leave the limit at a reading, and set the duty that brake and slowdown leave."""
    if margin_c <= 0.0:
        if track.at_limit == 0.0:
            track.drain_left_s = rules.drain_s
        track.at_limit = 1.0
    elif margin_c >= rules.recover_c:
        track.at_limit = 0.0
    duty = rules.brake_duty if track.brake_left_s > 0.0 else 1.0
    track.duty = min(duty, rules.slowdown_duty) if track.at_limit > 0.0 else duty


@inlined
def pass_drain(rules, track):
    """Let an interval of a drain pass."""
    track.drain_left_s = max(0.0, track.drain_left_s - rules.interval_s)


@inlined
def show_limits(rules, track, budget_w, raw):
    """Fill what is observed.

    The duty of the coming interval, how long what has a time still holds, and how much of what the brake
    bears is used up.
    """
    raw.duty = 0.0 if track.drain_left_s > 0.0 else track.duty
    raw.release_s = max(track.brake_left_s, track.drain_left_s)
    used_j = track.over_budget_j
    raw.overload_share = used_j / (rules.brake_bears_s * budget_w) if used_j > 0.0 else 0.0


@inlined
def open_classes(track):
    """How many classes of requests may be begun in the coming interval."""
    return 0 if track.drain_left_s > 0.0 else 2


@inlined
def held_by(rules, track):
    """What holds in the coming interval, bits in the order of `CAUSES`."""
    held = 0
    if track.brake_left_s > 0.0:
        held += 1
    if track.at_limit > 0.0 and rules.slowdown_duty < 1.0:
        held += 2
    if track.drain_left_s > 0.0:
        held += 4
    return held
