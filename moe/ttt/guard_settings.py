"""What a guard is told and what it tells: its limits, and what it has seen (`moe.ttt.guards`)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """Limits of a guard.

    Attributes:
        concentration_limit: Share of the most frequent class in a moving average of the answers, above which
            they have collapsed; more than a correlated stream gives.
        entropy_limit: Mean entropy over log C, a moving average, below which they have.
        average_decay: Of both moving averages.
        outlier_z: Robust z-score from which a batch is an outlier.
        warm_up: Batches that set the baselines before a batch is judged.
        shift_after: Outliers in a row that are taken for a change of the inputs rather than for poison;
            the last of them becomes the new baseline.
        spread_limit: Effective number of classes among a batch's answers, over the most there can be (classes
            or answers), below which a batch is looked at closer.
        doubt_margin: Mean entropy over log C that the batch's own statistics must add for it to be left out.
        gather: Batches left out for holding few classes that are kept; a batch drawn evenly from them is
            learned from if it holds many.
        probation: Steps that a snapshot must be followed by before it counts as good; at least as many as
            the averages take to tell a collapse, or a collapsed state would count as good.
    """

    concentration_limit: float = 0.9
    entropy_limit: float = 0.01
    average_decay: float = 0.8
    outlier_z: float = 6.0
    warm_up: int = 8
    shift_after: int = 2
    spread_limit: float = 0.55
    doubt_margin: float = 0.05
    gather: int = 8
    probation: int = 24

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing."""
        for name in (
            "concentration_limit", "entropy_limit", "average_decay", "spread_limit", "doubt_margin"
        ):  # fmt: skip
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be within 0 < {name} < 1, got {getattr(self, name)}")
        for name in ("warm_up", "shift_after", "gather", "probation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.outlier_z < math.inf:
            raise ValueError(f"outlier_z must be positive and finite, got {self.outlier_z}")
        if self.probation < self.steps_to_tell:
            raise ValueError(
                f"probation must be at least the {self.steps_to_tell} steps that these limits and this "
                f"average_decay take to tell a collapse, got {self.probation}"
            )

    @property
    def steps_to_tell(self) -> int:
        """Batches until a complete collapse is told, whatever the averages were before."""
        smallest = min(1 - self.concentration_limit, self.entropy_limit)
        return math.floor(math.log(smallest) / math.log(self.average_decay)) + 1


@dataclass(frozen=True)
class GuardCounters:
    """What a guard has seen.

    Attributes:
        steps: Steps taken and kept.
        empty: Steps that selected nothing.
        poisoned: Batches left out as outliers.
        concentrated: Batches left out for holding few classes.
        collapsed: Collapses of the answers.
        non_finite: Answers, losses or parameters that were not finite.
        rollbacks: Returns to a snapshot; one for each of the two above.
    """

    steps: int = 0
    empty: int = 0
    poisoned: int = 0
    concentrated: int = 0
    collapsed: int = 0
    non_finite: int = 0
    rollbacks: int = 0
