"""Limits of a scenario: power budgets, the temperature limit, and what follows where they are not kept.

Both are priced (`thermoe_env.mdp.reward`). With a brake, a slowdown or an alarm they also act, in every world
alike (`thermoe_env.mdp.limits`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe.ranges import STRICT, Celsius, Degrees, Number, Seconds, Throttle, Watts, Whole
from thermoe_env.problem.announced import Events


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PowerBrake:
    """Power above the budget for too long holds the device down for a while, as a power brake signal does."""

    grace_s: Annotated[Number, Field(ge=0.0, le=1e6)] = 2.0
    """Intervals in a row above the budget that are forgiven; one more engages the brake."""
    duty: Throttle = 0.5
    """Share of the time for which the device may run while it holds."""
    hold_s: Seconds = 10.0
    """It holds for this long, rounded up to whole intervals, and is released whatever the power is then."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Slowdown:
    """A die at the limit is held down until it has cooled."""

    duty: Throttle = 0.5
    """Share of the time for which the device may run until then."""
    recover_c: Degrees = 3.0
    """How far below the limit the die has to be."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Alarm:
    """A die that reaches the limit drains the node: no request is begun for a while, what runs goes on.

    It is armed again once the die has been below the limit, also while the node drains: one that stays hot
    drains once, one that reaches the limit again drains for as long again from then.
    """

    drain_s: Seconds = 60.0
    """Rounded up to whole intervals."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PowerBudget(Events):
    """Demand response: the grid asks for less power for a while and says so ahead."""

    normal_w: Watts = 700.0
    event_w: tuple[Watts, Watts] = (230.0, 340.0)
    """Budget during an event, uniform."""
    notice_s: Annotated[Whole, Field(ge=1, le=3600)] = 10
    """How long ahead all is announced that changes by events."""
    brake: PowerBrake | None = None
    """What a budget that is not kept brings about; None: a price."""

    def __post_init__(self) -> None:
        self._check("event_w", "event_s", "gap_s")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ThermalLimits:
    """The virtual temperature limit and the stages below it (hardware limits lie far above)."""

    temperature_c: Celsius
    stage_margins_c: tuple[Degrees, Degrees, Degrees] = (6.0, 3.0, 1.0)
    """Margins below the limit at which ELEVATED, HOT and CRITICAL begin."""
    hysteresis_c: Degrees = 1.5
    """A stage is left once the margin has grown this far beyond its beginning."""
    deferrable_below: Annotated[Whole, Field(ge=0, le=4)] = 3
    """Deferrable requests are served in stages below this one (3 is CRITICAL)."""
    slowdown: Slowdown | None = None
    alarm: Alarm | None = None
    """What reaching the limit brings about, one of the two or neither; None: a price."""

    def __post_init__(self) -> None:
        if self.slowdown is not None and self.alarm is not None:
            raise ValueError(
                "limits.slowdown (duty, recover_c) and limits.alarm (drain_s) exclude each other: a node "
                "either slows down at its limit or drains; give one and leave the other out (null)"
            )
        elevated, hot, critical = self.stage_margins_c
        if not elevated > hot > critical:
            raise ValueError(f"limits.stage_margins_c must fall, got {self.stage_margins_c}")
