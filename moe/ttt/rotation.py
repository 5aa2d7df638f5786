"""Test-time training by rotation: the model learns from telling how far its own inputs are turned.

Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts", ICML
2020, arXiv 1909.13231. It needs a model that was trained with a rotation head (`ModelConfig.rotation_head`).
Shapes: B samples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model.transformer import ModelOutput, MoEModel
from moe.ttt.settings import Rotation
from moe.ttt.state import AdaptationState
from moe.ttt.steps import Step, check_batch, descend, look, set_statistics, statistics_held


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each square image, [B, H, H], counter-clockwise by its number of quarters, 0 to 3, [B]."""
    return _every_turn(images)[turns, torch.arange(len(images), device=images.device)]


def rotation_loss(output: ModelOutput, turns: Tensor) -> Tensor:
    """Return the mean cross-entropy of the rotation head's answers to turns, [B], in nats; 0-dim."""
    assert output.rotation_logits is not None
    return F.cross_entropy(output.rotation_logits, turns)


def rotation(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Rotation,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Descend the loss of the rotation head on a batch in all four turns (TTT, arXiv 1909.13231).

    The loss is a share of log 4, and the head itself stays. On a model with batch norms the turned batch is
    normalised by itself, and the running statistics follow the upright one, which costs a pass without a
    graph more.

    Raises:
        ValueError: The batch is a single sample and the model has batch norms.
        AdaptationDiverged: The loss is not a number.
    """
    check_batch(model, inputs)
    moved = look(model, inputs, top_k, routing_bias)[1] if model.config.norm == "batch" else []
    turns = torch.arange(4, device=inputs.device).repeat_interleave(len(inputs))  # [4 B]

    def objective(output: ModelOutput) -> Tensor:
        return rotation_loss(output, turns) / math.log(4)

    with statistics_held(model):
        loss = descend(model, state, _every_turn(inputs).flatten(0, 1), objective, top_k, routing_bias)
    state.descent.step()
    set_statistics(model, moved)
    return Step(selected=len(inputs), loss=loss)


def _every_turn(images: Tensor) -> Tensor:
    """Turn all images, [B, H, H], by 0 to 3 quarters, [4, B, H, H]."""
    return torch.stack([images.rot90(quarters, (1, 2)) for quarters in range(4)])
