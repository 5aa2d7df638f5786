"""What the methods of test-time training share: the adapting pass, its checks, and what a step returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.model.transformer import ModelOutput, MoEModel
from moe.ttt.groups import batch_statistics_in_force, running_statistics
from moe.ttt.service import AdaptationDiverged
from moe.ttt.state import AdaptationState


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        selected: Samples the step learned from; 0 means that it was skipped.
        loss: Loss before the step, 0-dim on the device; None without a gradient step.
        recovered: Whether `sar` went back to the start afterwards.
        changed: Whether `bank` found another shift than the one in force: answers given before are those of a
            model that was adapted to something else.
    """

    selected: int
    loss: Tensor | None = None
    recovered: bool = False
    changed: bool = False


SKIPPED = Step(selected=0)


def descend(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    objective: Callable[[ModelOutput], Tensor],
    top_k: int | None,
    routing_bias: float,
) -> Tensor:
    """Run the adapting pass and leave the gradients with the parameters; returns the loss.

    Raises:
        AdaptationDiverged: The loss is not a number; there is no new gradient.
    """
    with torch.enable_grad(), batch_statistics_in_force(model):
        loss = objective(model(inputs, top_k, routing_bias))
    check_finite(loss)
    state.descent.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def look(
    model: MoEModel, inputs: Tensor, top_k: int | None, routing_bias: float
) -> tuple[ModelOutput, list[Tensor]]:
    """Answer as the adapting pass would, but without a graph, and leave the running statistics.

    In eval mode nobody would be sure after a shift, nothing be selected, and the statistics never follow.

    Returns:
        The answers, and the running statistics as the whole batch moves them: sure samples alone would
        bias them.
    """
    with statistics_held(model):
        with batch_statistics_in_force(model):
            output = model(inputs, top_k, routing_bias)
        return output, [buffer.clone() for buffer in running_statistics(model)]


@contextmanager
def statistics_held(model: MoEModel) -> Iterator[None]:
    """Put the running statistics back behind the context."""
    before = [buffer.clone() for buffer in running_statistics(model)]
    try:
        yield
    finally:
        set_statistics(model, before)


@contextmanager
def statistics_undone_on_error(model: MoEModel) -> Iterator[None]:
    """Put the running statistics back if the context raises."""
    before = [buffer.clone() for buffer in running_statistics(model)]
    try:
        yield
    except BaseException:
        set_statistics(model, before)
        raise


@torch.no_grad()
def set_statistics(model: MoEModel, statistics: list[Tensor]) -> None:
    """Copy into the running statistics, in the order of `running_statistics`."""
    for buffer, value in zip(running_statistics(model), statistics, strict=True):
        buffer.copy_(value)


def divergence(mean: Tensor, variance: Tensor, mean_0: Tensor, variance_0: Tensor) -> Tensor:
    """Return how far channels' normal distributions are from others, 0-dim.

    Mean over the channels, [D] each, of the Kullback-Leibler divergence, in nats.
    """
    ratio = variance / variance_0
    return (ratio + (mean - mean_0) ** 2 / variance_0 - 1 - ratio.log()).mean() / 2


def check_finite(loss: Tensor) -> None:
    """Refuse a loss that is not a number; the host waits."""
    if not torch.isfinite(loss):
        raise AdaptationDiverged(
            f"the loss is {loss.item()}; the step was not taken, restore a snapshot to go on"
        )


def smallest_batch(model: MoEModel) -> int:
    """Return the fewest samples that an adapting pass takes."""
    return 2 if model.config.norm == "batch" else 1


def check_batch(model: MoEModel, inputs: Tensor) -> None:
    """Refuse text, and batches that a batch norm could not normalise."""
    if model.config.task != "vision":
        raise ValueError(f"this method needs a model of task 'vision', got {model.config.task!r}")
    if len(inputs) < smallest_batch(model):
        raise ValueError(
            f"a model with norm {model.config.norm!r} adapts to batches of at least "
            f"{smallest_batch(model)}, got {len(inputs)}; gather more requests"
        )
