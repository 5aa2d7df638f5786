"""Limits of a scenario: power budgets, the temperature limit, and what follows where they are not kept.

Both are priced (`thermoe_env.mdp.reward`). With a brake, a slowdown or an alarm they also act, in every world
alike (`thermoe_env.mdp.limits`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints
from pydantic.dataclasses import dataclass

from moe.ranges import STRICT, Celsius, Degrees, Number, Seconds, Throttle, Watts, Whole
from thermoe_env.problem.announced import Events

RiseShare = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?%$")]


OVERLOAD = 0.2
"""Above the budget, as a share of it, that a brake bears for its grace."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PowerBrake:
    """Power above the budget for too long holds the device down for a while, as a power brake signal does."""

    grace_s: Annotated[Number, Field(ge=0.0, le=1e6)] = 2.0
    """How long a fifth above the budget is borne; more is borne for less, as by a breaker of inverse time,
    and what lies below the budget makes up for what lay above."""
    duty: Throttle = 0.5
    """Share of the time for which the device may run while it holds."""
    hold_s: Seconds = 10.0
    """It holds for this long, rounded up to whole intervals, and is released whatever the power is then."""

    @property
    def bears_s(self) -> float:
        """Joules above the budget that are borne, over the budget."""
        return OVERLOAD * self.grace_s


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

    temperature_c: Celsius | RiseShare
    """Or, as 90%, this share of the card's own rise from idle to full load of the standard service (before
    fans answer it), above where it idles: the same on any card."""
    stage_margins_c: tuple[Degrees, Degrees, Degrees] = (6.0, 3.0, 1.0)
    """Margins below the limit at which ELEVATED, HOT and CRITICAL begin."""
    hysteresis_c: Degrees = 1.5
    """A stage is left once the margin has grown this far beyond its beginning."""
    slowdown: Slowdown | None = None
    alarm: Alarm | None = None
    """What reaching the limit brings about, one of the two or neither; None: a price."""

    def on_a_card(self, idle_c: float, rise_c: float) -> float:
        """The limit, degC, on a card that idles at `idle_c` and rises from there by `rise_c` at full load."""
        if isinstance(self.temperature_c, str):
            return round(idle_c + float(self.temperature_c[:-1]) / 100.0 * rise_c, 2)
        return self.temperature_c

    def __post_init__(self) -> None:
        if self.slowdown is not None and self.alarm is not None:
            raise ValueError(
                "limits.slowdown (duty, recover_c) and limits.alarm (drain_s) exclude each other: a node "
                "either slows down at its limit or drains; give one and leave the other out (null)"
            )
        elevated, hot, critical = self.stage_margins_c
        if not elevated > hot > critical:
            raise ValueError(f"limits.stage_margins_c must fall, got {self.stage_margins_c}")
