"""The step that a service takes unless told otherwise: entropy minimisation (TENT: Wang et al., ICLR 2021).

Only the norms adapt (arXiv 2006.10726, section 3). Each step moves their running statistics toward the
batch's and takes one gradient step of their gains and offsets on the mean entropy of the batch's own
answers. Unlike the original, answers are not taken from the adapting pass: the model serves in eval mode
from its running statistics, so that an answer does not depend on what else is in its batch, and serving
without adaptation costs one forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.errors import ThermoeError
from moe.model.transformer import MoEModel
from moe.ttt.groups import batch_statistics_in_force

LEARNING_RATE = 1e-3
"""Small, because a service takes thousands of steps. A hundred steps at a hundred times this rate did not
collapse; they helped under noise and harmed under pixelation by a few points."""

STATISTICS_MOMENTUM = 0.2
"""Share of the batch in the running statistics, which bring most of the recovery; ten steps replace 89%."""


class AdaptationDiverged(ThermoeError):
    """The entropy of the answers stopped being a finite number."""


def adapt(
    model: MoEModel, optimizer: torch.optim.Optimizer, images: Tensor, top_k: int, routing_bias: float = 0.0
) -> Tensor:
    """Take one adaptation step on a batch without labels.

    Args:
        model: Model that `moe.ttt.start` prepared.
        optimizer: Of its state.
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
