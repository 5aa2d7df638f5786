"""Settings of the adaptation methods, and all that a method remembers from step to step.

What adaptation changes is: the parameters of its group, the running statistics of batch norms, the
optimizer's state, and moving averages. `AdaptationState` holds or reaches all of it, so that its `snapshot`,
`restore` and `reset` are complete.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe.model.transformer import MoEModel
from moe.ttt.groups import Group, batch_norms, collect_params, running_statistics
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


@dataclass(frozen=True)
class Saved:
    """A copy of everything that adaptation changes; see `AdaptationState.snapshot`."""

    parameters: list[Tensor]
    statistics: list[Tensor]
    optimizer: dict[str, Any] | None
    averages: dict[str, Tensor]


@dataclass
class AdaptationState:
    """What a method remembers; made by `start`.

    Attributes:
        parameters: Those that adapt; none for `batch_statistics`.
        names: Their names.
        optimizer: Over them; None where there are none.
        averages: Moving averages of the method by name, missing until there is one.
        source: The state at the start, for `reset`.
        fisher: Constant weight of each parameter's distance to the start, or none; see `fisher_anchor`.
        rms: Constant root mean square of each parameter's gradient, or none; see `gradient_rms`.
    """

    parameters: list[nn.Parameter]
    names: list[str]
    optimizer: torch.optim.Optimizer | None
    source: Saved
    averages: dict[str, Tensor] = field(default_factory=dict)
    fisher: list[Tensor] | None = None
    rms: list[Tensor] | None = None

    @property
    def descent(self) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            ValueError: The state was started for `batch_statistics`.
        """
        if self.optimizer is None:
            raise ValueError("this state was started without parameters; start it with the method's settings")
        return self.optimizer

    def snapshot(self, model: MoEModel) -> Saved:
        """Copy all that adaptation changes. Copies what adapts, so the group sets the cost; no host wait."""
        return _save(model, self.parameters, self.optimizer, self.averages)

    def restore(self, model: MoEModel, saved: Saved) -> None:
        """Put a snapshot back, bit for bit; it may be put back again."""
        _copy(self.parameters, saved.parameters)
        _copy(running_statistics(model), saved.statistics)
        self.averages = {name: value.clone() for name, value in saved.averages.items()}
        if self.optimizer is not None and saved.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.load_state_dict(copy.deepcopy(saved.optimizer))

    def reset(self, model: MoEModel) -> None:
        """Undo all adaptation: parameters, statistics, optimizer and averages as `start` left them."""
        self.restore(model, self.source)

    def average(self, name: str, value: Tensor, decay: float) -> Tensor:
        """Fold a value into a moving average, which starts at its first value, and return it."""
        old = self.averages.get(name)
        self.averages[name] = value if old is None else decay * old + (1 - decay) * value
        return self.averages[name]


def start(model: MoEModel, settings: BatchStatistics, group: Group = "norms") -> AdaptationState:
    """Prepare a model to adapt: freeze all but the group, leave eval mode on, and make the state.

    Args:
        model: Model to adapt.
        settings: Of the method that will be used.
        group: What adapts; `batch_statistics` has no parameters to adapt and takes none.

    Raises:
        ValueError: The group is empty, or the method needs batch norms and the model has none.
    """
    model.requires_grad_(False).eval()
    for _, norm in batch_norms(model):
        norm.momentum = settings.statistics_momentum
    if not isinstance(settings, Tent):
        require_batch_norms(model)
        return AdaptationState([], [], None, _save(model, [], None, {}))
    parameters, names = collect_params(model, group)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)
    return AdaptationState(parameters, names, optimizer, _save(model, parameters, optimizer, {}))


def require_batch_norms(model: MoEModel) -> None:
    """Refuse a model without batch norms for a method that moves their statistics."""
    if model.config.norm != "batch":
        raise ValueError(
            f"batch_statistics needs a model with norm 'batch', got {model.config.norm!r}; "
            "use a method with a gradient"
        )


def _save(
    model: MoEModel,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    averages: dict[str, Tensor],
) -> Saved:
    return Saved(
        parameters=[parameter.detach().clone() for parameter in parameters],
        statistics=[buffer.clone() for buffer in running_statistics(model)],
        optimizer=None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        averages={name: value.clone() for name, value in averages.items()},
    )


@torch.no_grad()
def _copy(targets: list[Any], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _check_shares(settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must be within 0..1, got {getattr(settings, name)}")


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(settings, name)}")
