"""Re-centring: what the classifier sees keeps a mean of zero, without a gradient and without a pass.

After "NEO: No-Optimization Test-Time Adaptation through Latent Re-Centering", ICLR 2026, arXiv 2510.05635.
All that the classifier makes of a mean of features is a mean of logits, W m, since it has no offset of its
own. So the logits of the answers are enough to know by, and the last norm's offset is moved by the shortest
vector that takes their mean away. Shapes: B samples, C classes, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.model.transformer import MoEModel
from moe.ttt.eva import eva
from moe.ttt.methods import batch_statistics, dynamic_evaluation, eata, sar, tent
from moe.ttt.roid import roid
from moe.ttt.rotation import rotation
from moe.ttt.settings import (
    BatchStatistics,
    DynamicEvaluation,
    Eata,
    Eva,
    Neo,
    RmsDynamicEvaluation,
    Roid,
    Rotation,
    Sar,
    Tent,
)
from moe.ttt.state import AdaptationState, offset_of
from moe.ttt.steps import Step, check_batch, check_finite

PLAIN: dict[type[BatchStatistics], Callable[..., Step]] = {
    BatchStatistics: batch_statistics,
    Tent: tent,
    Eata: eata,
    Sar: sar,
    Roid: roid,
    Eva: eva,
    Rotation: rotation,
    DynamicEvaluation: dynamic_evaluation,
    RmsDynamicEvaluation: dynamic_evaluation,
}
"""Function of each type of settings, but for those that stand on another method."""


def neo(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Neo,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Move the last norm's offset against the mean of the logits, after a step of the base method if any.

    With a base the mean is that of its adapting pass, whose statistics will be in force; alone it is that of
    `answers`, and costs a pass where there are none. Repeated, the offset holds a running mean.

    Raises:
        ValueError: The task is not vision, the state is another method's, or the base refuses.
        AdaptationDiverged: An answer is not a number; all is as before.
    """
    check_batch(model, inputs)
    if state.centring is None:
        raise ValueError("this state was not started to re-centre; start it with the method's settings")
    step = Step(selected=len(inputs))
    if settings.base is None:
        mean = (_answered(model, inputs, top_k, routing_bias) if answers is None else answers).mean(dim=0)
        check_finite(mean.sum())
    else:
        with _first_answers(model.head) as seen:
            step = PLAIN[type(settings.base)](model, state, inputs, settings.base, top_k, routing_bias)
        mean = seen[0]
    if step.selected:
        with torch.no_grad():
            offset_of(model).sub_(settings.centre_momentum * (state.centring @ mean.float()))
    return step


def uncentred(model: MoEModel, state: AdaptationState, logits: Tensor) -> Tensor:
    """Return logits, [B, C], as they were with the last norm's offset of the start."""
    moved = offset_of(model) - state.source.statistics[-1]  # [D]
    return logits - model.head.weight.float() @ moved


@torch.no_grad()
def _answered(model: MoEModel, inputs: Tensor, top_k: int | None, routing_bias: float) -> Tensor:
    return model(inputs, top_k, routing_bias).logits


@contextmanager
def _first_answers(head: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the mean logits of the first pass in the context, [C]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, logits: Tensor) -> None:
        if not seen:
            seen.append(logits.detach().float().mean(dim=0))

    handle = head.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
