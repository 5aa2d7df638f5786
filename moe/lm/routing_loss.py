"""What a training asks of the routers beside right answers: an even load, or few experts read in decode.

A decode step reads the weights of every expert that any of its tokens picks, once. For B sequences that run
together these are ``sum_e 1 - prod_t (1 - p_te)`` experts, with p_te the probability that token t picks
expert e. Who runs together is chance, so the B tokens are drawn from those of the batch, with repetition; the
mean over all draws is ``sum_e 1 - (1 - mean_t p_te)^B``, exactly and without drawing any.

The other way to fewer joules, a loss per token as `moe.training.energy_loss`, has nothing to choose here: all
experts of these models are equal, and every token uses K of them.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.lm.config import LmConfig, Recipe
from moe.lm.model import RoutingDecision
from moe.training.energy_loss import BUDGET_RAMP, dual_step

RUNNING = (8, 32, 128)
"""Sequences that run together; the loss is the mean over these."""
BUDGET_RUNNING = 32
"""Sequences that a budget is for."""
DAMPING = 4.0
"""Of a budget, see `dual_step`; strong, since an expert that is given up hardly comes back."""
NOISE = 1.0
"""Standard deviation of the noise of a logit, see `pick_probability`."""


def balance_loss(decision: RoutingDecision) -> Tensor:
    """Load balance loss, 1 for an even load (Switch, arXiv 2101.03961, equation 4), 0-dim."""
    share = decision.dispatch.tokens_per_expert / decision.experts.numel()  # [E]
    gates = decision.logits.sigmoid()
    p = (gates / gates.sum(dim=-1, keepdim=True)).mean(dim=0)  # [E]
    return len(p) * (share * p).sum()


def pick_probability(logits: Tensor, top_k: int) -> Tensor:
    """Probability that an expert is among a token's best K when its own logit has normal noise.

    Shazeer et al., arXiv 1701.06538, appendix A, who train a load by it; here the noise is in the estimate
    alone, not in the routing.

    Args:
        logits: Float32.  # [T, E]
        top_k: K, below E.

    Returns:
        Float32, differentiable.  # [T, E]
    """
    best = logits.topk(top_k + 1, dim=-1).values
    last_in, first_out = best[:, -2:-1], best[:, -1:]  # [T, 1] each
    bar = torch.where(logits >= last_in, first_out, last_in)  # K-th best of the others
    return torch.special.ndtr((logits - bar) / NOISE)


def expected_reads(share: Tensor, running: int) -> Tensor:
    """Experts that a step reads, mean over draws of its tokens, 0-dim.

    Args:
        share: Mean over tokens of the probability that one picks an expert.  # [E]
        running: B, tokens of the step.
    """
    return (1 - (1 - share) ** running).sum()


class RoutingLoss:
    """Balance and reads, weighed as a recipe says; made for one training.

    The weight of the reads grows over the first half of the training: a router that is pushed from the start
    gives up experts before it knows what they are good for. With a budget the weight is a Lagrange multiplier
    that follows the experts that are really picked (`moe.training.energy_loss.dual_step`), and the budget
    tightens over as long, from all experts.

    Attributes:
        multiplier: Weight of the reads, on the device and never waited for.  # 0-dim

    Raises:
        ValueError: The budget is not between K and E, or there is nothing to choose.
    """

    def __init__(self, config: LmConfig, recipe: Recipe, device: torch.device) -> None:
        self.config, self.recipe = config, recipe
        self.multiplier = torch.tensor(float(recipe.read_weight), device=device)
        asked = recipe.read_weight > 0 or recipe.read_budget is not None
        self.reads = asked and config.n_experts > 0  # a dense model, to compare with, has none to read
        if self.reads and config.n_experts <= config.top_k:
            raise ValueError(
                f"there is nothing to choose where each token picks {config.top_k} of {config.n_experts} "
                "experts: leave read_weight and read_budget out"
            )
        budget = recipe.read_budget
        if self.reads and budget is not None and not config.top_k < budget <= config.n_experts:
            raise ValueError(
                f"read_budget={budget} means nothing: a step reads more than the {config.top_k} experts of a "
                f"token, and at most {config.n_experts}; give a number between"
            )

    def __call__(self, decisions: Sequence[RoutingDecision], progress: float) -> Tensor:
        """Return the loss of a step's decisions, one per layer, 0-dim, and move the multiplier.

        Args:
            decisions: None of a dense model.
            progress: Share of the training that is done.
        """
        total = self.multiplier.new_zeros(())
        for decision in decisions:
            total = total + self.recipe.balance_weight / len(decisions) * balance_loss(decision)
        return total + self._reads(decisions, progress) if self.reads else total

    def record(self) -> dict[str, Any]:
        """What a record of the training says beside the recipe, in JSON types."""
        return {"read_weight": round(self.multiplier.item(), 4)} if self.reads else {}

    def _reads(self, decisions: Sequence[RoutingDecision], progress: float) -> Tensor:
        c, budget = self.config, self.recipe.read_budget
        reads = []
        for decision in decisions:
            share = pick_probability(decision.logits, c.top_k).mean(dim=0)  # [E]
            reads += [expected_reads(share, running) for running in RUNNING]
        tightness = min(1.0, progress / BUDGET_RAMP)
        weight = self.multiplier * tightness
        if budget is not None:
            picked = [d.dispatch.tokens_per_expert / len(d.experts) for d in decisions]  # [E] each
            read = torch.stack([expected_reads(share, BUDGET_RUNNING) for share in picked]).mean()
            allowed = c.n_experts + (budget - c.n_experts) * tightness
            excess = (read - allowed) / c.n_experts
            weight, self.multiplier = dual_step(self.multiplier, excess, DAMPING)
        return weight * torch.stack(reads).mean() / c.n_experts
