"""The service's test-time training: entropy minimisation (TENT: Wang et al., ICLR 2021).

Only the norms adapt (arXiv 2006.10726, section 3). Each step moves their running statistics toward the
batch's and takes one gradient step of their gains and offsets on the mean entropy of the batch's own
answers. Unlike the original, answers are not taken from the adapting pass: the model serves in eval mode
from its running statistics, so that an answer does not depend on what else is in its batch, and serving
without adaptation costs one forward pass.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.model import MoEModel
from moe.ttt.groups import batch_norms, batch_statistics_in_force, collect_params

LEARNING_RATE = 1e-3
"""Small, because a service takes thousands of steps. A hundred steps at a hundred times this rate did not
collapse; they helped under noise and harmed under pixelation by a few points."""

STATISTICS_MOMENTUM = 0.2
"""Share of the batch in the running statistics, which bring most of the recovery; ten steps replace 89%."""


class AdaptationDiverged(RuntimeError):
    """The entropy of the answers stopped being a finite number."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that adaptation changes; see ``snapshot``."""

    norms: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]


def configure(model: MoEModel) -> MoEModel:
    """Freeze everything but the gains and offsets of the norms, leave eval mode on, and return the model.

    Raises:
        ValueError: The model has no batch norms to adapt.
    """
    if model.config.norm != "batch":
        raise ValueError(
            f"adaptation needs a model with norm 'batch', got {model.config.norm!r} ({model.config.task})"
        )
    model.requires_grad_(False).eval()
    for _, norm in batch_norms(model):
        norm.requires_grad_(True)
        norm.momentum = STATISTICS_MOMENTUM
    return model


def make_optimizer(model: MoEModel) -> torch.optim.Optimizer:
    """Return the optimizer of a configured model."""
    return torch.optim.SGD(collect_params(model)[0], lr=LEARNING_RATE, momentum=0.9)


def adapt(
    model: MoEModel, optimizer: torch.optim.Optimizer, images: Tensor, top_k: int, routing_bias: float = 0.0
) -> Tensor:
    """Take one adaptation step on a batch without labels.

    Args:
        model: Configured model.
        optimizer: Its optimizer.
        images: uint8, at least 2.  # [B, 28, 28]
        top_k: Experts per token.
        routing_bias: Pull to cheap experts.

    Returns:
        Mean entropy of the answers before the step over its maximum, 0 to 1; 0-dim.

    Raises:
        AdaptationDiverged: The entropy is not finite; the parameters are as before, the statistics are not.
    """
    with torch.enable_grad(), batch_statistics_in_force(model):
        entropy = model(images, top_k, routing_bias).entropy.mean()
    if not torch.isfinite(entropy):
        raise AdaptationDiverged(f"the mean entropy is {entropy.item()}; restore a snapshot to go on")
    optimizer.zero_grad(set_to_none=True)
    entropy.backward()
    optimizer.step()
    return entropy.detach()


def snapshot(model: MoEModel, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copy the norms (parameters and running statistics) and the optimizer's state."""
    norms = {
        name: {key: value.clone() for key, value in norm.state_dict().items()}
        for name, norm in batch_norms(model)
    }
    return Snapshot(norms=norms, optimizer=copy.deepcopy(optimizer.state_dict()))


def restore(model: MoEModel, optimizer: torch.optim.Optimizer, saved: Snapshot) -> None:
    """Put a snapshot back, bit for bit."""
    for name, norm in batch_norms(model):
        norm.load_state_dict(saved.norms[name])
    optimizer.load_state_dict(copy.deepcopy(saved.optimizer))
