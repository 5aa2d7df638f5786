"""Training losses of the router.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from moe.router import Routing
from moe.statistics import tokens_per_expert


def load_balance_loss(routing: Routing) -> Tensor:
    """Return ``E * sum_e f_e P_e``: 1 for a uniform router, up to E when one expert gets everything.

    f_e is the share of assignments that expert e receives and P_e its mean router probability
    (Switch Transformer, arXiv 2101.03961, equations 4 to 6).
    """
    n_experts = routing.router_logits.shape[-1]
    counts = tokens_per_expert(routing)  # [E]
    share = counts / counts.sum()  # [E]
    probability = routing.router_logits.softmax(dim=-1).mean(dim=0)  # [E]
    return n_experts * (share * probability).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Return the mean squared log-partition, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.router_logits.logsumexp(dim=-1).square().mean()
