"""Choosing experts: a linear router, and a selection-only bias toward cheap experts.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.model.dispatch import Dispatch, make_dispatch

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
        experts: Chosen experts, int64. Where the number per token is known to the device only, K is the
            largest it may be, and E fills the null slots behind, whose weight is 0; so do all slots of
            tokens that are padding.  # [T, K]
    """

    router_logits: Tensor
    weights: Tensor
    experts: Tensor

    @cached_property
    def dispatch(self) -> Dispatch:
        """The choices sorted by expert; experts compute and statistics count by it."""
        return make_dispatch(self.experts, self.router_logits.shape[-1])


def route(
    router_logits: Tensor,
    top_k: int | Tensor,
    routing_bias: float | Tensor = 0.0,
    expert_cost: Tensor | None = None,
    *,
    balance_bias: Tensor | None = None,
    max_top_k: int | None = None,
    padding: Tensor | None = None,
) -> Routing:
    """Choose ``top_k`` experts per token by logit minus biased cost, and weigh them by logit alone.

    The bias decides who is chosen, never how the chosen are mixed, as the expert bias of DeepSeek-V3
    (arXiv 2412.19437, section 2.1.2). Hence a cost equal for all experts changes nothing, strength 0 changes
    nothing, and a larger bias never raises the mean cost of the chosen experts.

    Args:
        router_logits: Float32 logits.  # [T, E]
        top_k: Experts per token, 1..E. As a 0-dim tensor it is read by the device alone, so that a CUDA
            graph can be replayed with another; it is then not checked (see `moe.model.graph`).
        routing_bias: Strength, usefully 0..1 (see ``BIAS_SCALE``); a float or a 0-dim tensor.
        expert_cost: Cost per expert in [0, 1]; None means no bias.  # [E]
        balance_bias: Added to the logits for the choice alone, to balance the load; None means none.  # [E]
        max_top_k: Slots per token where ``top_k`` is a tensor; None means E.
        padding: Which tokens only fill up a batch: all their slots are null; None means none.  # [T]

    Raises:
        ValueError: ``top_k`` is outside 1..E, the bias is not finite, or the cost is of another model.
    """
    n_experts = router_logits.shape[-1]
    n_slots = top_k if isinstance(top_k, int) else max_top_k or n_experts
    if not 1 <= n_slots <= n_experts:
        raise ValueError(f"top_k must be within 1..{n_experts} experts, got {n_slots}")
    if not isinstance(routing_bias, Tensor):
        check_bias(routing_bias)
    scores_for_choice = router_logits.detach()
    if balance_bias is not None:
        scores_for_choice = scores_for_choice + balance_bias  # [T, E]
    if expert_cost is not None:
        check_cost_shape(expert_cost, n_experts)
        spread = router_logits.detach().std(dim=-1, keepdim=True, correction=0)  # [T, 1]
        # Against the cheapest and not the mean: the choice is the same, and an equal cost is exactly 0.
        excess_cost = expert_cost - expert_cost.min()  # [E]
        scores_for_choice = scores_for_choice - routing_bias * BIAS_SCALE * spread * excess_cost  # [T, E]
    experts = scores_for_choice.topk(n_slots, dim=-1).indices  # [T, K]
    chosen_logits = router_logits.gather(-1, experts)  # [T, K]
    if isinstance(top_k, Tensor):
        null = torch.arange(n_slots, device=experts.device) >= top_k  # [K]
        chosen_logits = chosen_logits.masked_fill(null, -math.inf)
        experts = experts.masked_fill(null, n_experts)
    weights = chosen_logits.softmax(dim=-1)
    if padding is not None:
        weights = weights.masked_fill(padding[:, None], 0.0)
        experts = experts.masked_fill(padding[:, None], n_experts)
    return Routing(router_logits, weights, experts)


def check_bias(routing_bias: float) -> None:
    """Refuse a strength that is not a number.

    Raises:
        ValueError: It is NaN or infinite.
    """
    if not math.isfinite(routing_bias):
        raise ValueError(f"routing_bias must be a finite number, usefully 0..1, got {routing_bias}")


def check_cost_shape(expert_cost: Tensor, n_experts: int) -> None:
    """Refuse the cost table of another model.

    Raises:
        ValueError: It has not one number per expert.
    """
    if expert_cost.shape != (n_experts,):
        raise ValueError(
            f"expert_cost needs one number for each of the {n_experts} experts, got shape "
            f"{tuple(expert_cost.shape)}; is it the cost table of another model?"
        )


class Router(nn.Module):
    """Linear map from token to expert logits, always in float32 (arXiv 2101.03961, section 2.4).

    Attributes:
        balance_bias: See ``ModelConfig.balance_bias``; None without.  # [E]
    """

    balance_bias: Tensor | None

    def __init__(self, d_model: int, n_experts: int, balance_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # [E, D]
        self.register_buffer("balance_bias", torch.zeros(n_experts) if balance_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 logits, [T, E], of tokens, [T, D]."""
        return F.linear(x.float(), self.weight)
