"""Choosing experts: a linear router, and a selection-only bias toward cheap experts.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BIAS_SCALE = 4.0
"""Pull of ``routing_bias = 1`` on a cost difference of 1, in standard deviations of the token's logits.

Measured in the logits' own spread, the pull means the same for every layer, model and token. Among 8 to 16
logits the best lies about 1.5 to 1.8 standard deviations above the mean, and the costs of experts with widths
5:3 differ by 0.4: at 1 the cheap expert wins but for the most decided tokens, and 0..1 is the useful range.
"""


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        router_logits: Unbiased logits, float32.  # [T, E]
        weights: Combine weights of the chosen experts, float32, summing to 1 per token.  # [T, K]
        experts: Chosen experts, int64.  # [T, K]
    """

    router_logits: Tensor
    weights: Tensor
    experts: Tensor


def route(
    router_logits: Tensor, top_k: int, routing_bias: float | Tensor = 0.0, expert_cost: Tensor | None = None
) -> Routing:
    """Choose ``top_k`` experts per token by logit minus biased cost, and weigh them by logit alone.

    The bias decides who is chosen, never how the chosen are mixed, as the expert bias of DeepSeek-V3
    (arXiv 2412.19437, section 2.1.2). Hence a cost equal for all experts changes nothing, strength 0 changes
    nothing, and a larger bias never raises the mean cost of the chosen experts.

    Args:
        router_logits: Float32 logits.  # [T, E]
        top_k: Experts per token, 1..E.
        routing_bias: Strength, usefully 0..1 (see ``BIAS_SCALE``); a float or a 0-dim tensor.
        expert_cost: Cost per expert in [0, 1]; None means no bias.  # [E]

    Raises:
        ValueError: ``top_k`` is outside 1..E.
    """
    if not 1 <= top_k <= router_logits.shape[-1]:
        raise ValueError(f"top_k must be within 1..{router_logits.shape[-1]} experts, got {top_k}")
    scores_for_choice = router_logits.detach()
    if expert_cost is not None:
        spread = scores_for_choice.std(dim=-1, keepdim=True, correction=0)  # [T, 1]
        # Against the cheapest and not the mean: the choice is the same, and an equal cost is exactly 0.
        excess_cost = expert_cost - expert_cost.min()  # [E]
        scores_for_choice = scores_for_choice - routing_bias * BIAS_SCALE * spread * excess_cost  # [T, E]
    experts = scores_for_choice.topk(top_k, dim=-1).indices  # [T, K]
    weights = router_logits.gather(-1, experts).softmax(dim=-1)  # [T, K]
    return Routing(router_logits=router_logits, weights=weights, experts=experts)


class Router(nn.Module):
    """Linear map from token to expert logits, always in float32 (arXiv 2101.03961, section 2.4)."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # [E, D]

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 logits, [T, E], of tokens, [T, D]."""
        return F.linear(x.float(), self.weight)
