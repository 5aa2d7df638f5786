"""When to adapt: rules that look at what serving gave and say yes or no. Pure; most remember something.

What tells a shift of the inputs is the change test `changed`: of confidence (`ConfidenceChange`), or of
confidence and entropy (`InputShift`), as the environment's observation has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from moe.compiled import jit

CHANGE_TEST = 6
"""Numbers that a change test remembers: values so far, their mean, and two sums with their lowest."""


@jit
def changed(test, value, threshold, tolerance):
    """Show a value to a two-sided test of change (Page-Hinkley; Page, Biometrika 1954).

    The deviations from the running mean, less a tolerance, are summed up on either side; an alarm is a sum
    further than the threshold above its lowest so far. After an alarm the test starts anew.

    Args:
        test: float [CHANGE_TEST], zeros at first; updated.
        value: the next one.
        threshold: sum of deviations that is an alarm.
        tolerance: deviation of a value that counts as none.

    Returns:
        Whether there is an alarm.
    """
    test[0] += 1.0
    test[1] += (value - test[1]) / test[0]
    alarm = False
    for side in range(2):
        deviation = test[1] - value if side == 0 else value - test[1]
        test[2 + side] += deviation - tolerance
        test[4 + side] = min(test[4 + side], test[2 + side])
        alarm |= test[2 + side] - test[4 + side] > threshold
    if alarm:
        test[:] = 0.0
    return alarm


@jit
def any_changed(tests, values, threshold, tolerance):
    """Show values of one time to a test each (`changed`); an alarm of one starts all anew.

    Args:
        tests: float [n, CHANGE_TEST], zeros at first; updated.
        values: tuple of n numbers.
        threshold: of every test.
        tolerance: of every test.

    Returns:
        Whether there is an alarm.
    """
    alarm = False
    for i in range(len(values)):
        alarm |= changed(tests[i], values[i], threshold, tolerance)
    if alarm:
        tests[:] = 0.0
    return alarm


@dataclass(frozen=True)
class Observed:
    """What a rule may look at, of one batch that was served.

    Attributes:
        entropy: Mean entropy of the answers over its maximum, 0 to 1.
        confidence: Mean probability of the answers, 0 to 1.
        stage: Thermal stage in force, ``"NOMINAL"`` when cool.
    """

    entropy: float
    confidence: float
    stage: str = "NOMINAL"

    def __post_init__(self) -> None:
        """Refuse what is no share, NaN included."""
        for name in ("entropy", "confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within 0..1, got {getattr(self, name)}")


class Gate(Protocol):
    """A rule: asked once per served batch, in order."""

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        ...


class Always:
    """Adapt to every batch."""

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        return True


class Never:
    """Adapt to none."""

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        return False


class Periodic:
    """Adapt to the first of every `every` batches."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self._n_seen = every, 0

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        self._n_seen += 1
        return (self._n_seen - 1) % self.every == 0


class EntropyThreshold:
    """Adapt where the entropy is above a limit."""

    def __init__(self, above: float) -> None:
        if not 0 <= above <= 1:
            raise ValueError(f"above must be within 0..1, got {above}")
        self.above = above

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        return observed.entropy > self.above


class ConfidenceChange:
    """Adapt for some batches from a change of confidence (`changed`) on.

    A drop is what a shift does to a model that knows nothing of it; a rise, as when a model adapted to other
    inputs is confidently wrong, counts as well. What comes first is new: the start counts as an alarm.

    Args:
        threshold: Sum of deviations that is an alarm, positive.
        tolerance: Deviation of a batch that counts as none.
        adapt_for: Batches to adapt to from the start, or an alarm, on.
    """

    _tested: ClassVar[tuple[str, ...]] = ("confidence",)

    def __init__(self, threshold: float = 0.5, tolerance: float = 0.02, adapt_for: int = 20) -> None:
        if not threshold > 0 or not tolerance >= 0 or adapt_for < 1:
            raise ValueError(
                "threshold must be positive, tolerance not negative and adapt_for at least 1, got "
                f"{threshold}, {tolerance}, {adapt_for}"
            )
        self.threshold, self.tolerance, self.adapt_for = threshold, tolerance, adapt_for
        self._to_adapt, self._adapted = adapt_for, False
        self._tests = np.zeros((len(self._tested), CHANGE_TEST))

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        if self._alarm(observed):
            self._to_adapt = self.adapt_for
        self._adapted = self._to_adapt > 0
        self._to_adapt -= self._adapted
        return self._adapted

    def _alarm(self, observed: Observed) -> bool:
        """Show the batch to the tests."""
        values = tuple(float(getattr(observed, name)) for name in self._tested)
        return any_changed(self._tests, values, self.threshold, self.tolerance)


class InputShift(ConfidenceChange):
    """Adapt for some batches from a change of confidence or of entropy on.

    Some shifts leave confidence where it was and show in entropy alone. What adaptation itself changes is no
    shift: a batch that follows one adapted to is not tested, and the tests start anew after it.
    """

    _tested = ("confidence", "entropy")

    def _alarm(self, observed: Observed) -> bool:
        if self._adapted:
            self._tests[:] = 0.0
            return False
        return super()._alarm(observed)


class WhenCool:
    """Adapt where another rule does and the thermal stage is NOMINAL; the other sees every batch."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        wanted = self.gate.decide(observed)
        return wanted and observed.stage == "NOMINAL"
