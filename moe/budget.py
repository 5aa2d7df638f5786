"""A budget of energy for adaptation, in joules: earned as time passes or work is served, banked, spent.

It recovers: after a refusal, earning goes on and a later step is paid for. It is bounded: what is not spent
within `bank_windows` windows of its window expires, so a quiet day does not pay for an hour of adaptation.
"""

from __future__ import annotations

import math
from collections import deque


class EnergyBudget:
    """Joules that adaptation may spend.

    Attributes:
        earned_j: Sum of all that was earned, the initial sum included.
        charged_j: Sum of all that was charged.
        expired_j: Sum of all that expired unspent.
        refused: Number of charges refused.
    """

    def __init__(
        self,
        *,
        window_s: float,
        bank_windows: int = 1,
        joules_per_s: float = 0.0,
        fraction: float = 0.0,
        initial_j: float = 0.0,
    ) -> None:
        """Start in a first window that holds `initial_j`.

        Args:
            window_s: Length of a window.
            bank_windows: Past windows whose rest is kept, 0 or more.
            joules_per_s: Earned per second.
            fraction: Earned per joule of serving.
            initial_j: Earned at the start.

        Raises:
            ValueError: A number is negative or not finite, the window is empty, or nothing is ever earned.
        """
        numbers = {"joules_per_s": joules_per_s, "fraction": fraction, "initial_j": initial_j}
        for name, value in {**numbers, "bank_windows": bank_windows, "window_s": window_s}.items():
            _check(name, value)
        if not window_s:
            raise ValueError("window_s must be positive, got 0")
        if not any(numbers.values()):
            raise ValueError(f"a budget needs something to earn: one of {tuple(numbers)} must be positive")
        self.window_s, self.joules_per_s, self.fraction = window_s, joules_per_s, fraction
        self.earned_j, self.charged_j, self.expired_j, self.refused = initial_j, 0.0, 0.0, 0
        self._windows = deque([0.0] * bank_windows + [initial_j])  # what is left of each, oldest first
        self._elapsed_s = 0.0  # of the present window

    @property
    def balance_j(self) -> float:
        """Joules that can be spent now."""
        return sum(self._windows)

    def earn(self, seconds: float, serving_j: float = 0.0) -> None:
        """Let time pass in which serving took `serving_j`; the energy counts as evenly spread over it.

        Raises:
            ValueError: A number is negative or not finite, or energy came in no time.
        """
        _check("seconds", seconds)
        _check("serving_j", serving_j)
        if not seconds:
            if serving_j:
                raise ValueError(f"serving_j needs the seconds it took, got {serving_j} J in 0 s")
            return
        whole_s, whole_j = seconds, self.joules_per_s * seconds + self.fraction * serving_j
        # Windows that begin and end within the time are all alike; only those that are kept need be made.
        skipped = max(0, int((self._elapsed_s + seconds) // self.window_s) - len(self._windows) - 1)
        lost = skipped * self.window_s / whole_s * whole_j
        self.earned_j += lost
        self.expired_j += lost
        seconds -= skipped * self.window_s
        while seconds > 0:
            part = min(seconds, self.window_s - self._elapsed_s)
            self._windows[-1] += part / whole_s * whole_j
            self.earned_j += part / whole_s * whole_j
            self._elapsed_s += part
            seconds -= part
            if self._elapsed_s >= self.window_s:
                self.expired_j += self._windows.popleft()
                self._windows.append(0.0)
                self._elapsed_s = 0.0

    def afford(self, cost_j: float) -> bool:
        """Whether a cost could be charged now."""
        _check("cost_j", cost_j)
        return cost_j <= self.balance_j

    def charge(self, cost_j: float) -> bool:
        """Spend a cost, the oldest joules first, or refuse it whole; returns whether it was spent.

        Raises:
            ValueError: The cost is negative or not finite.
        """
        if not self.afford(cost_j):
            self.refused += 1
            return False
        self.charged_j += cost_j
        for i, left in enumerate(self._windows):
            taken = min(left, cost_j)
            self._windows[i] = left - taken
            cost_j -= taken
        return True


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
