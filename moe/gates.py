"""When to adapt: rules that look at what serving gave and say yes or no. Pure; most remember something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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
    """Adapt for some batches from a change of confidence on (two-sided Page-Hinkley; Page, Biometrika 1954).

    A drop is what a shift does to a model that knows nothing of it; a rise, as when a model adapted to other
    inputs is confidently wrong, counts as well. The deviations from the running mean, less a tolerance, are
    summed up on either side; an alarm is a sum further than `threshold` above its lowest value so far. After
    an alarm the test starts anew. What comes first is new: the start counts as an alarm.

    Args:
        threshold: Sum of deviations that is an alarm, positive.
        tolerance: Deviation of a batch that counts as none.
        adapt_for: Batches to adapt to from the start, or an alarm, on.
    """

    def __init__(self, threshold: float = 0.5, tolerance: float = 0.02, adapt_for: int = 20) -> None:
        if not threshold > 0 or not tolerance >= 0 or adapt_for < 1:
            raise ValueError(
                "threshold must be positive, tolerance not negative and adapt_for at least 1, got "
                f"{threshold}, {tolerance}, {adapt_for}"
            )
        self.threshold, self.tolerance, self.adapt_for = threshold, tolerance, adapt_for
        self._to_adapt = adapt_for
        self._restart()

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        self._n += 1
        self._mean += (observed.confidence - self._mean) / self._n
        below = self._mean - observed.confidence
        for side, deviation in enumerate((below, -below)):
            self._sum[side] += deviation - self.tolerance
            self._lowest[side] = min(self._lowest[side], self._sum[side])
        if any(total - low > self.threshold for total, low in zip(self._sum, self._lowest, strict=True)):
            self._to_adapt = self.adapt_for
            self._restart()
        adapts = self._to_adapt > 0
        self._to_adapt -= adapts
        return adapts

    def _restart(self) -> None:
        self._n, self._mean = 0, 0.0
        self._sum, self._lowest = [0.0, 0.0], [0.0, 0.0]  # of drops, of rises


class WhenCool:
    """Adapt where another rule does and the thermal stage is NOMINAL; the other sees every batch."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def decide(self, observed: Observed) -> bool:
        """Whether to adapt to the batch."""
        wanted = self.gate.decide(observed)
        return wanted and observed.stage == "NOMINAL"
