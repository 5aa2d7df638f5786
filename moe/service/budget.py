"""A budget of energy for adaptation, in joules: earned as time passes or work is served, banked, spent.

It recovers: after a refusal, earning goes on and a later step is paid for. It is bounded: what is not spent
within `bank_windows` windows of its window expires, so a quiet day does not pay for an hour of adaptation.

The arithmetic is compiled functions over one float array, a *purse*, which the twin keeps one of per
environment; `EnergyBudget` is the same behind checks. The service's rule is `pay_steps`, in both worlds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe.compiled import copy_row, jit
from moe.workload import Knobs

(
    _WINDOW_S, _JOULES_PER_S, _FRACTION, _FULL_J, _ELAPSED_S, _EARNED_J, _CHARGED_J, _EXPIRED_J, _REFUSED,
    _OLDEST,
) = range(10)  # fmt: skip
"""Places in a purse. The elapsed time is of the present window; from the last place on: what is left of each
window, oldest first."""


def open_purse(
    *,
    window_s: float,
    bank_windows: int = 1,
    joules_per_s: float = 0.0,
    fraction: float = 0.0,
    initial_j: float = 0.0,
    full_serving_w: float = 0.0,
) -> np.ndarray:
    """Return a purse in a first window that holds `initial_j`; the arguments are those of `EnergyBudget`."""
    purse = np.zeros(_OLDEST + bank_windows + 1)
    purse[_WINDOW_S], purse[_JOULES_PER_S], purse[_FRACTION] = window_s, joules_per_s, fraction
    purse[_FULL_J] = (joules_per_s + fraction * full_serving_w) * window_s * (bank_windows + 1)
    purse[_EARNED_J] = purse[-1] = initial_j
    return purse


_SHORTEST_WINDOW_S = 1e-3
"""`earn` goes through windows one by one, and a shorter one would vanish against the time that passes."""

UNLIMITED = np.zeros(0)
"""The purse of a service without a budget; only `share_of` may be asked about it."""


@jit
def balance_of(purse):
    """Joules that can be spent now."""
    balance = 0.0
    for i in range(_OLDEST, purse.shape[0]):
        balance += purse[i]
    return balance


@jit
def share_of(purse):
    """What can be spent now over a full bank, at most 1; 1 where nothing limits it."""
    if purse.shape[0] == 0:
        return 1.0
    balance = balance_of(purse)
    return 1.0 if balance >= purse[_FULL_J] else balance / purse[_FULL_J]


@jit
def earn(purse, seconds, serving_j):
    """Let time pass in which serving took `serving_j`, evenly; in no time, the present window earns it."""
    whole_s, whole_j = seconds, purse[_JOULES_PER_S] * seconds + purse[_FRACTION] * serving_j
    if seconds <= 0.0:
        purse[-1] += whole_j
        purse[_EARNED_J] += whole_j
        return
    window_s = purse[_WINDOW_S]
    # Windows that begin and end within the time are all alike; only those that are kept need be made.
    windows = purse.shape[0] - _OLDEST
    skipped = max(0, int((purse[_ELAPSED_S] + seconds) // window_s) - windows - 1)
    lost = skipped * window_s / whole_s * whole_j
    purse[_EARNED_J] += lost
    purse[_EXPIRED_J] += lost
    seconds -= skipped * window_s
    while seconds > 0.0:
        part = min(seconds, window_s - purse[_ELAPSED_S])
        purse[-1] += part / whole_s * whole_j
        purse[_EARNED_J] += part / whole_s * whole_j
        purse[_ELAPSED_S] += part
        seconds -= part
        if purse[_ELAPSED_S] >= window_s:
            purse[_EXPIRED_J] += purse[_OLDEST]
            for i in range(_OLDEST, purse.shape[0] - 1):
                purse[i] = purse[i + 1]
            purse[-1] = 0.0
            purse[_ELAPSED_S] = 0.0


@jit
def charge(purse, cost_j):
    """Spend a cost, the oldest joules first, or refuse it whole; returns whether it was spent."""
    if cost_j > balance_of(purse):
        purse[_REFUSED] += 1.0
        return False
    purse[_CHARGED_J] += cost_j
    for i in range(_OLDEST, purse.shape[0]):
        taken = min(purse[i], cost_j)
        purse[i] -= taken
        cost_j -= taken
    return True


@jit
def pay_steps(purse, seconds, serving_j, step_j, steps):
    """Pay for the adaptation steps of a micro-batch, one by one and each whole; returns how many are paid.

    This is the rule of the service: time passes, what serving the batch earns goes to the present window, and
    each step is charged before it is taken. One that cannot be paid is refused, and with it those after it.

    Args:
        purse: not `UNLIMITED`.
        seconds: since the launch of the batch before, or since `earn` was last called.
        serving_j: energy of serving the batch.
        step_j: energy of one step.
        steps: steps that are asked for.
    """
    earn(purse, seconds, 0.0)
    earn(purse, 0.0, serving_j)
    for paid in range(steps):
        if not charge(purse, step_j):
            purse[_REFUSED] += steps - paid - 1.0
            return paid
    return steps


class EnergyBudget:
    """Joules that adaptation may spend."""

    def __init__(
        self,
        *,
        window_s: float,
        bank_windows: int = 1,
        joules_per_s: float = 0.0,
        fraction: float = 0.0,
        initial_j: float = 0.0,
        full_serving_w: float = 0.0,
    ) -> None:
        """Start in a first window that holds `initial_j`.

        Args:
            window_s: Length of a window.
            bank_windows: Past windows whose rest is kept, 0 or more.
            joules_per_s: Earned per second.
            fraction: Earned per joule of serving.
            initial_j: Earned at the start.
            full_serving_w: Power of serving at full load, which says what a full bank is (`share`).

        Raises:
            ValueError: A number is negative or not finite, the window is shorter than a millisecond, or
                nothing is ever earned.
        """
        numbers = {"joules_per_s": joules_per_s, "fraction": fraction, "initial_j": initial_j}
        others = {"bank_windows": bank_windows, "window_s": window_s, "full_serving_w": full_serving_w}
        for name, value in {**numbers, **others}.items():
            _check(name, value)
        if window_s < _SHORTEST_WINDOW_S:
            raise ValueError(f"window_s must be at least {_SHORTEST_WINDOW_S} s, got {window_s}")
        if not any(numbers.values()):
            raise ValueError(f"a budget needs something to earn: one of {tuple(numbers)} must be positive")
        self._take(open_purse(**numbers, **others))

    @classmethod
    def of(cls, purse: np.ndarray) -> EnergyBudget:
        """Budget that starts as a purse, which stays as it is; not `UNLIMITED`."""
        budget = cls.__new__(cls)
        budget._take(purse)
        return budget

    def _take(self, purse: np.ndarray) -> None:
        self._fresh, self._purse = purse.copy(), purse.copy()

    def reset(self) -> None:
        """Start anew."""
        copy_row(self._purse, self._fresh)

    @property
    def earned_j(self) -> float:
        """Sum of all that was earned, the initial sum included."""
        return float(self._purse[_EARNED_J])

    @property
    def charged_j(self) -> float:
        """Sum of all that was charged."""
        return float(self._purse[_CHARGED_J])

    @property
    def expired_j(self) -> float:
        """Sum of all that expired unspent."""
        return float(self._purse[_EXPIRED_J])

    @property
    def refused(self) -> int:
        """Number of charges refused."""
        return int(self._purse[_REFUSED])

    @property
    def balance_j(self) -> float:
        """Joules that can be spent now."""
        return balance_of(self._purse)

    @property
    def share(self) -> float:
        """What can be spent now over all that can be banked at full load, at most 1."""
        return share_of(self._purse)

    def earn(self, seconds: float, serving_j: float = 0.0) -> None:
        """Let time pass in which serving took `serving_j`; the energy counts as evenly spread over it.

        Raises:
            ValueError: A number is negative or not finite, or energy came in no time.
        """
        _check("seconds", seconds)
        _check("serving_j", serving_j)
        if serving_j and not seconds:
            raise ValueError(f"serving_j needs the seconds it took, got {serving_j} J in 0 s")
        earn(self._purse, float(seconds), float(serving_j))

    def afford(self, cost_j: float) -> bool:
        """Whether a cost could be charged now."""
        _check("cost_j", cost_j)
        return cost_j <= self.balance_j

    def charge(self, cost_j: float) -> bool:
        """Spend a cost, the oldest joules first, or refuse it whole; returns whether it was spent.

        Raises:
            ValueError: The cost is negative or not finite.
        """
        _check("cost_j", cost_j)
        return charge(self._purse, float(cost_j))

    def pay_steps(self, seconds: float, serving_j: float, step_j: float, steps: int) -> int:
        """Pay for the steps of a micro-batch, see the function of this name.

        Raises:
            ValueError: A number is negative or not finite.
        """
        values = {"seconds": seconds, "serving_j": serving_j, "step_j": step_j, "steps": steps}
        for name, value in values.items():
            _check(name, value)
        return pay_steps(self._purse, float(seconds), float(serving_j), float(step_j), steps)


@dataclass(frozen=True)
class StepBudget:
    """A budget with what the work costs: what a service needs to pay for its adaptation steps."""

    energy: EnergyBudget
    batch_energy_j: Callable[[int, Knobs], tuple[float, float]]
    """(J of serving a micro-batch of so many requests, J of one adaptation step after it)."""


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
