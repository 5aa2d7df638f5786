"""What is as usual and now and then, announced ahead, otherwise: when, and by how much.

Power budgets (`thermoe_env.problem.limits`) are of this kind, the price of energy and the promised time per
token too. Lengths and values are drawn per episode, evenly; the notice is that of the power budget for all.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe.ranges import STRICT, Dwell, Number, Seconds


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Events:
    """When: an event, a gap, an event, and so on; the first begins within a gap of the start."""

    event_s: tuple[Dwell, Dwell] = (20.0, 50.0)
    gap_s: tuple[Dwell, Dwell] = (30.0, 90.0)
    """Time between events."""

    def __post_init__(self) -> None:
        self._check("event_s", "gap_s")

    def _check(self, *names: str) -> None:
        for name in names:
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} needs low <= high, got [{low}, {high}]")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PriceEvents(Events):
    """Hours in which energy costs more, or less, than usual."""

    times: tuple[Annotated[Number, Field(ge=0.0, le=1000.0)], Annotated[Number, Field(ge=0.0, le=1000.0)]]
    """Price in an event over the usual one."""

    def __post_init__(self) -> None:
        self._check("event_s", "gap_s", "times")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StrictHours(Events):
    """Hours in which interactive requests are promised a shorter time per output token."""

    tpot_s: tuple[Seconds, Seconds]

    def __post_init__(self) -> None:
        self._check("event_s", "gap_s", "tpot_s")
