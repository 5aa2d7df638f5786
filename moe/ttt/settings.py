"""Settings of the methods: a frozen dataclass each, whose type picks the method; wrappers hold their base's.

`Neo` and `Bank` work on top of another method, which is nested: `Bank(base=Neo(base=BatchStatistics()))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moe.ttt.service import LEARNING_RATE, STATISTICS_MOMENTUM


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Settings of `batch_statistics`.

    Attributes:
        statistics_momentum: Share of the batch in the running statistics, 0 to 1.
    """

    statistics_momentum: float = STATISTICS_MOMENTUM

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _check_shares(self, "statistics_momentum")


@dataclass(frozen=True, kw_only=True)
class Tent(BatchStatistics):
    """Settings of `tent`, and what all methods with a gradient share. The optimizer is SGD.

    Attributes:
        learning_rate: Of a loss in shares of log C, so that it means the same for any number of classes.
        momentum: Of SGD, 0 to below 1.
    """

    learning_rate: float = LEARNING_RATE
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _check_positive(self, "learning_rate")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be within 0 <= momentum < 1, got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class Eata(Tent):
    """Settings of `eata`.

    Attributes:
        entropy_margin: Samples above are unreliable; a share of log C (0.4: EATA, section 4.1).
        redundancy_margin: Samples whose probabilities have at least this cosine to their moving average are
            redundant; 0.4 for 10 classes, 0.05 for 1000 in the paper.
        average_decay: Of that moving average.
        anchor_strength: Weight of the Fisher anchor, where one was made (`fisher_anchor`).
    """

    entropy_margin: float = 0.4
    redundancy_margin: float = 0.4
    average_decay: float = 0.9
    anchor_strength: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _check_shares(self, "entropy_margin", "redundancy_margin", "average_decay")
        _check_positive(self, "anchor_strength")


@dataclass(frozen=True, kw_only=True)
class Sar(Tent):
    """Settings of `sar`.

    Attributes:
        entropy_margin: As of `Eata`.
        rho: Length of the ascent step.
        recover_below_nats: Back to the start when the moving average of the entropy falls under this.
            In nats, 0.2 as in SAR's code, whose models tell 1000 classes apart.
        average_decay: Of that moving average.
    """

    entropy_margin: float = 0.4
    rho: float = 0.05
    recover_below_nats: float = 0.2
    average_decay: float = 0.9

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _check_shares(self, "entropy_margin", "average_decay")
        _check_positive(self, "rho")
        if not 0 <= self.recover_below_nats < math.inf:
            raise ValueError(
                f"recover_below_nats must be finite and not negative, got {self.recover_below_nats}"
            )


@dataclass(frozen=True, kw_only=True)
class Rotation(Tent):
    """Settings of `rotation`; the loss is in shares of log 4, and takes larger steps than an entropy."""

    learning_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class DynamicEvaluation(Tent):
    """Settings of `dynamic_evaluation`; the loss is in nats per byte.

    The default learning rate is for norms, which a tenfold one ruins; the last block takes 1.

    Attributes:
        decay: Share of the way back to the first parameters in each step, 0 to below 1.
    """

    decay: float = 0.0
    learning_rate: float = 3e-2
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be within 0 <= decay < 1, got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class RmsDynamicEvaluation(DynamicEvaluation):
    """Settings of `dynamic_evaluation` with gradients over their usual size, which `gradient_rms` measures.

    The defaults are for the last block, which learns most and is the cheapest; norms take a rate of 1e-2.

    Attributes:
        epsilon: Added to that size, in units of its mean over the group: parameters that hardly have a
            gradient before a shift would fly off after it.
    """

    epsilon: float = 1.0
    learning_rate: float = 1.5e-3
    decay: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _check_positive(self, "epsilon")


@dataclass(frozen=True, kw_only=True)
class Roid(Tent):
    """Settings of `roid`.

    Attributes:
        temperature: Of the weights of certainty times diversity (ROID, section 3.2); smaller is sharper.
        source_share: Share of the way back to the first parameters after each step (section 3.1).
        average_decay: Of the moving average of the answers' probabilities.
    """

    temperature: float = 1 / 3
    source_share: float = 0.01
    average_decay: float = 0.9

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _check_positive(self, "temperature")
        _check_shares(self, "source_share", "average_decay")


@dataclass(frozen=True, kw_only=True)
class Eva(Tent):
    """Settings of `eva`; gains and offsets of norms move without a gradient.

    Attributes:
        perturbation: Size of the two-sided perturbation, a share of each gain, and of one for offsets.
        source_share: Share of the way back to the first parameters after each step.
    """

    perturbation: float = 0.05
    source_share: float = 0.01

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _check_positive(self, "perturbation")
        _check_shares(self, "source_share")


@dataclass(frozen=True, kw_only=True)
class Neo:
    """Settings of `neo`.

    Attributes:
        base: Of the method that takes a step first; None re-centres alone, without a pass.
        centre_momentum: Share of a batch in the running mean that is taken away, above 0 to 1.
    """

    base: BatchStatistics | None = None
    centre_momentum: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _check_positive(self, "centre_momentum")
        _check_shares(self, "centre_momentum")
        if not isinstance(self.base, BatchStatistics | None):
            raise ValueError(f"neo re-centres after a plain method, got base {type(self.base).__name__}")


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Settings of `bank`.

    Attributes:
        base: Of the method that takes the steps. Its `statistics_momentum` is the least share of a batch in a
            shift's statistics, which start as the plain mean of its batches.
        room: Shifts that are remembered, at least 2; the least recently met is forgotten for a new one.
        same_below: Distance of a batch's features to those of a shift below which it is that shift's, in nats
            (mean over the channels, see `moe.ttt.steps.divergence`).
    """

    base: BatchStatistics | Neo = field(default_factory=lambda: BatchStatistics(statistics_momentum=0.1))
    room: int = 16
    same_below: float = 0.02

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not isinstance(self.base, BatchStatistics | Neo):
            raise ValueError(f"a bank holds states of another method, got base {type(self.base).__name__}")
        if self.room < 2:
            raise BankRoomError(
                f"room must be at least 2, the shift in force and one to return to, got {self.room}; "
                "use the base method alone"
            )
        _check_positive(self, "same_below")


Settings = BatchStatistics | Neo | Bank


class BankRoomError(ValueError):
    """A bank has no room for a second shift."""


def plain(settings: Settings) -> BatchStatistics | None:
    """Return the settings of the innermost method; None where `Neo` stands alone."""
    while isinstance(settings, Neo | Bank):
        if settings.base is None:
            return None
        settings = settings.base
    return settings


def step_share(settings: Settings) -> float:
    """Return the share of what is adapted that one step replaces, above 0 to 1.

    The twin plays by it (`moe.service.adaptation`): of running statistics, or of the centre where `neo`
    stands alone. A bank puts the state of a batch's shift in force, so one step replaces all; what `neo`
    moves in it follows more slowly.
    """
    if isinstance(settings, Bank):
        return 1.0
    if isinstance(settings, Neo):
        return settings.centre_momentum if settings.base is None else settings.base.statistics_momentum
    return settings.statistics_momentum


def recentres(settings: Settings) -> bool:
    """Whether `neo` is among the methods."""
    return isinstance(settings.base if isinstance(settings, Bank) else settings, Neo)


def _check_shares(settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must be within 0..1, got {getattr(settings, name)}")


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(settings, name)}")
