"""What a card can say of itself: a sample of its sensors, what no sensor can say, and energy against power.

Nothing here knows how a card is read; `moe.device.nvml` reads NVIDIA's.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from moe.errors import ReadingError

PERIOD_S = 0.1
"""Time between ticks of the energy counter on data-centre boards."""
AVERAGE_S = 1.0
"""Time over which a board averages the power that it reports."""
RANGES: dict[str, tuple[float, float]] = {
    "temp_c": (1.0, 150.0),
    "mem_temp_c": (1.0, 150.0),
    "sm_clock_mhz": (1.0, 10_000.0),
    "mem_clock_mhz": (1.0, 100_000.0),
    "util": (0.0, 100.0),
    "power_w": (0.1, 10_000.0),
    "energy_j": (0.0, 1e12),
    "power_capped_s": (0.0, 1e9),
    "thermal_throttle_s": (0.0, 1e9),
}
"""What a card at work answers, ends included. Drivers answer 0, 255 or all ones where they know nothing."""
MOST_OF_LIMIT = 1.5
"""Mean power over the power limit that no board reaches: H100s report up to 1.02 over a second."""
LEAST_OF_AVERAGE = 0.25
"""Energy of the last second by the counter over that by the board's average. No good counter falls below,
even where power has just stepped: three H100s stay above 0.77, an H200 above 0.57."""
LEAST_OF_INSTANT = 0.05
"""Likewise over the power of the moment, on boards that average nothing: at rest they draw a tenth of it."""


class Tick(NamedTuple):
    """A reading of a card's energy."""

    energy_j: float
    """Since the driver was loaded, or since the card was opened; only differences mean something."""
    time_s: float
    """`time.perf_counter()` of the reading."""


class Sample(NamedTuple):
    """What the sensors say at one moment; energy and times are cumulative."""

    time_s: float
    """`time.perf_counter()` when the energy was read."""
    energy_j: float
    temp_c: float
    mem_temp_c: float
    """NaN where the card has no such sensor."""
    sm_clock_mhz: float
    power_w: float
    """Of the last second where `Board.averages`, else of the moment."""
    power_capped_s: float
    thermal_throttle_s: float


class Board(Protocol):
    """What a card is known to do."""

    name: str
    power_limit_w: float
    """Infinite where unknown."""
    averages: bool
    """Whether it averages the power that it reports over `AVERAGE_S`."""


def usable(card: str, name: str, value: object, scale: float = 1.0) -> float:
    """A sensor's answer as a number.

    Args:
        card: its name, for the message.
        name: a key of `RANGES`.
        value: what the driver gave.
        scale: to the unit of `name`.

    Raises:
        ReadingError: it is none, no number, or outside `RANGES`.
    """
    low, high = RANGES[name]
    if isinstance(value, int | float) and low <= value * scale <= high:
        return float(value * scale)
    shown = f"{value * scale:g}" if isinstance(value, int | float) else repr(value)
    raise ReadingError(
        f"{card}: {name} is {shown}, which no card at work answers ({low:g} to {high:g}); update or reload "
        "the driver"
    )


def check_energy(board: Board, energy_j: float, elapsed_s: float, power_w: float | None = None) -> None:
    """Refuse what no board can have used.

    Args:
        board: whose energy.
        energy_j: difference of two readings.
        elapsed_s: time between them.
        power_w: what the board reports at the end, if it was read. A time shorter than it is averaged over is
            not compared with it.

    Raises:
        ReadingError: the energy fell, rose by more than the board can draw, or by less than its power says.
    """
    if energy_j < 0.0:
        raise ReadingError(
            f"{board.name}: energy_j fell by {-energy_j:g} J in {elapsed_s:.3g} s: the counter wrapped or "
            "the driver was reloaded; begin a new episode"
        )
    if energy_j > MOST_OF_LIMIT * board.power_limit_w * (elapsed_s + PERIOD_S):  # a tick may lie just outside
        raise ReadingError(
            f"{board.name}: energy_j rose by {energy_j:g} J in {elapsed_s:.3g} s, on a board of "
            f"{board.power_limit_w:g} W: the counter jumped; reload the driver"
        )
    if power_w is None or elapsed_s < AVERAGE_S - PERIOD_S:
        return
    least_w = power_w * (LEAST_OF_AVERAGE if board.averages else LEAST_OF_INSTANT)
    if energy_j < least_w * AVERAGE_S:
        raise ReadingError(
            f"{board.name}: energy_j rose by {energy_j:g} J in {elapsed_s:.3g} s, but the board reports "
            f"{power_w:g} W: the counter stands still or misses energy; reload the driver"
        )
