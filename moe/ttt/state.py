"""All that a method remembers from step to step.

What adaptation changes is: the parameters of its group, the running statistics of batch norms, the last
norm's offset where `neo` moves it, the optimizer's state, moving averages, and the shifts of a bank.
`AdaptationState` holds or reaches all of it, so that its `snapshot`, `restore` and `reset` are complete.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe.model.transformer import MoEModel
from moe.ttt.groups import Group, batch_norms, collect_params, running_statistics
from moe.ttt.service import STATISTICS_MOMENTUM
from moe.ttt.settings import Bank, Eva, Rotation, Settings, Tent, plain, recentres

SOURCE_BATCHES = 1_000_000
"""Batches that the statistics of the unadapted model count for in a bank: a new one hardly moves them."""


@dataclass(frozen=True)
class Saved:
    """A copy of everything that adaptation changes; see `AdaptationState.snapshot`."""

    parameters: list[Tensor]
    statistics: list[Tensor]
    optimizer: dict[str, Any] | None
    averages: dict[str, Tensor]
    shifts: tuple[Shift, ...] = ()


@dataclass(frozen=True)
class Shift:
    """A shift that a bank knows: how its features look, and the state that goes with it.

    Attributes:
        mean: Of each channel that the first norm takes in.  # [D] variance: Likewise.  # [D] batches:
        Batches that it has learned from. saved: State when it was last left, without a bank of its own; of
        the shift in force it is out of date.
    """

    mean: Tensor
    variance: Tensor
    batches: int
    saved: Saved


@dataclass
class AdaptationState:
    """What a method remembers; made by `start`.

    Attributes:
        parameters: Those that adapt; none for `batch_statistics`.
        names: Their names.
        optimizer: Over them; None where there are none.
        averages: Moving averages of the method by name, missing until there is one.
        shifts: Those that a bank knows, the one in force last.
        source: The state at the start, for `reset`.
        fisher: Constant weight of each parameter's distance to the start, or none; see `fisher_anchor`.
        rms: Constant root mean square of each parameter's gradient, or none; see `gradient_rms`.
        centring: Constant map from mean logits to the last norm's offset that gives them, or none.  # [D, C]
    """

    parameters: list[nn.Parameter]
    names: list[str]
    optimizer: torch.optim.Optimizer | None
    source: Saved
    averages: dict[str, Tensor] = field(default_factory=dict)
    shifts: tuple[Shift, ...] = ()
    fisher: list[Tensor] | None = None
    rms: list[Tensor] | None = None
    centring: Tensor | None = None

    @property
    def descent(self) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            ValueError: The state was started for `batch_statistics`.
        """
        if self.optimizer is None:
            raise ValueError("this state was started without parameters; start it with the method's settings")
        return self.optimizer

    def moved(self, model: MoEModel) -> list[Tensor]:
        """What steps move without a gradient, no copies: running statistics, and the offset of `neo`."""
        return running_statistics(model) + ([] if self.centring is None else [offset_of(model)])

    def snapshot(self, model: MoEModel) -> Saved:
        """Copy all that adaptation changes. Copies what adapts, so the group sets the cost; no host wait."""
        return Saved(
            parameters=[parameter.detach().clone() for parameter in self.parameters],
            statistics=[tensor.detach().clone() for tensor in self.moved(model)],
            optimizer=None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            averages={name: value.clone() for name, value in self.averages.items()},
            shifts=self.shifts,
        )

    def restore(self, model: MoEModel, saved: Saved) -> None:
        """Put a snapshot back, bit for bit; it may be put back again."""
        _copy(self.parameters, saved.parameters)
        _copy(self.moved(model), saved.statistics)
        self.averages = {name: value.clone() for name, value in saved.averages.items()}
        self.shifts = saved.shifts
        if self.optimizer is not None and saved.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.load_state_dict(copy.deepcopy(saved.optimizer))

    def reset(self, model: MoEModel) -> None:
        """Undo all adaptation: parameters, statistics, optimizer and averages as `start` left them."""
        self.restore(model, self.source)

    @contextmanager
    def unadapted(self, model: MoEModel) -> Iterator[None]:
        """Let the model answer within the context as it did at the start; all is afterwards as it was."""
        adapted = [*self.parameters, *self.moved(model)]
        now = [tensor.detach().clone() for tensor in adapted]
        _copy(adapted, [*self.source.parameters, *self.source.statistics])
        try:
            yield
        finally:
            _copy(adapted, now)

    def average(self, name: str, value: Tensor, decay: float) -> Tensor:
        """Fold a value into a moving average, which starts at its first value, and return it."""
        old = self.averages.get(name)
        self.averages[name] = value if old is None else decay * old + (1 - decay) * value
        return self.averages[name]

    @torch.no_grad()
    def pull_back(self, share: float) -> None:
        """Take all parameters a share of the way back to the start."""
        for parameter, first in zip(self.parameters, self.source.parameters, strict=True):
            parameter.lerp_(first, share)


def start(model: MoEModel, settings: Settings, group: Group = "norms") -> AdaptationState:
    """Prepare a model to adapt: freeze all but the group, leave eval mode on, and make the state.

    A bank knows the shift of the training data from the start where running statistics say how it looks.

    Args:
        model: Model to adapt.
        settings: Of the method that will be used.
        group: What adapts; methods without a gradient have no parameters to adapt and take none.

    Raises:
        ValueError: The group is empty, or the model lacks what the method needs: batch norms, a last norm
            with an offset, or a rotation head.
    """
    base = plain(settings)
    if base is not None and not isinstance(base, Tent):
        require_batch_norms(model)
    if isinstance(base, Rotation) and model.rotation_head is None:
        raise ValueError(
            "the model has no rotation head: train one with `python -m moe.training --task vision "
            "--rotation-head`, or adapt by another method"
        )
    if isinstance(base, Eva) and group != "norms":
        raise ValueError(f"eva perturbs the norms' gains and offsets, so its group is 'norms', got {group!r}")
    model.requires_grad_(False).eval()
    for _, norm in batch_norms(model):
        norm.momentum = STATISTICS_MOMENTUM if base is None else base.statistics_momentum
    state = AdaptationState([], [], None, Saved([], [], None, {}))
    if isinstance(base, Tent):
        state.parameters, state.names = collect_params(model, group)
        for parameter in state.parameters:
            parameter.requires_grad_(True)
        state.optimizer = torch.optim.SGD(state.parameters, lr=base.learning_rate, momentum=base.momentum)
    if recentres(settings):
        offset_of(model)
        state.centring = torch.linalg.pinv(model.head.weight.float())
    state.source = state.snapshot(model)
    first = next(batch_norms(model), None)
    if isinstance(settings, Bank) and first is not None:
        mean, variance = (tensor.clone() for tensor in running_statistics(model)[:2])
        state.shifts = (Shift(mean, variance, SOURCE_BATCHES, state.source),)
        state.source = state.snapshot(model)
    return state


def require_batch_norms(model: MoEModel) -> None:
    """Refuse a model without batch norms for a method that moves their statistics."""
    if model.config.norm != "batch":
        raise ValueError(
            f"batch_statistics needs a model with norm 'batch', got {model.config.norm!r}; "
            "use a method with a gradient"
        )


def offset_of(model: MoEModel) -> Tensor:
    """Return the last norm's offset, [D], whose mean over the tokens the classifier sees.

    Raises:
        ValueError: It has none.
    """
    if model.config.norm == "rms":
        raise ValueError(
            "neo moves the offset of the last norm, and norm 'rms' has none; use a model with norm 'batch', "
            "'group' or 'layer', or another method"
        )
    return model.get_parameter("norm.bias").detach()


@torch.no_grad()
def _copy(targets: list[Any], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
