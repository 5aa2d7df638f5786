"""Training losses of the router, and the balance that needs none.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model.config import ModelConfig
from moe.model.router import Routing
from moe.model.usage import tokens_per_expert


def expert_groups(config: ModelConfig) -> Tensor:
    """Number the experts by their kind, int64, [E]."""
    kinds = config.expert_kinds
    return torch.tensor([kinds.index(kind) for kind in kinds])


def load_balance_loss(routing: Routing, groups: Tensor | None = None) -> Tensor:
    """Return ``E * sum_e f_e P_e``: 1 for a uniform router, up to E when one expert gets everything.

    f_e is the share of assignments that expert e receives and P_e its mean router probability
    (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    With groups it is the same loss inside each, weighted by the group's share of the assignments: with n_e
    experts in the group of e and Q_e the share of e in the probability of its group, ``sum_e n_e f_e Q_e``.
    It is 1 when each group is uniform, whatever the groups' shares.

    Args:
        routing: The decision.
        groups: Group of each expert, 0 to E - 1; None means one group.  # [E]
    """
    n_experts = routing.router_logits.shape[-1]
    counts = tokens_per_expert(routing)  # [E]
    share = counts / counts.sum()  # [E]
    probability = routing.router_logits.softmax(dim=-1).mean(dim=0)  # [E]
    if groups is None:
        return n_experts * (share * probability).sum()
    alike = _alike(groups)  # [E, E]
    of_group = (alike * probability).sum(dim=-1)  # [E]
    # A group that no token wants by any representable probability has nothing to share out.
    within = probability / of_group.clamp_min(torch.finfo(of_group.dtype).tiny)  # [E]
    return (alike.sum(dim=-1) * share * within).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Return the mean squared log-partition, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.router_logits.logsumexp(dim=-1).square().mean()


def expected_energy(routing: Routing, expert_cost: Tensor) -> Tensor:
    """Return the cost per token and chosen slot that the router's probabilities expect; 1 when they are even.

    For one expert per token it is ``sum_e p_e c_e / mean(c)`` with p the softmax of the logits. For K it is
    the mean cost of the members of a set of K experts, drawn with a probability proportional to the product
    of its members' p (conditional Poisson sampling; Chen, Dempster and Liu, Biometrika 81, 1994). The K best
    are its most probable set, but unlike their choice it has a gradient. The plain sum has one too, but next
    to none for the second expert and those after it once the first takes most of p: the router then learns
    a cheap first expert and keeps its dear others.

    The expected cost of a token in the unit of ``expert_cost`` is this times K times ``mean(c)``.

    Args:
        routing: The decision, without null slots: K is the number of its slots.
        expert_cost: Cost per routed token of each expert in any unit, not all 0.  # [E]
    """
    top_k = routing.experts.shape[-1]
    # From the mean of the best K, so that the most probable set has weight 1; float64 for the less probable.
    logits = routing.router_logits.double()  # [T, E]
    weights = (logits - logits.detach().topk(top_k).values.mean(dim=-1, keepdim=True)).exp()  # [T, E]
    # Over all sets of j of the experts seen so far: their weight, and their weight times their cost.
    weight_of_size = F.pad(torch.ones_like(weights[:, :1]), (0, top_k))  # [T, K + 1]
    cost_of_size = torch.zeros_like(weight_of_size)  # [T, K + 1]
    for weight, cost in zip(weights.split(1, dim=-1), expert_cost.double(), strict=True):
        with_expert = cost_of_size + cost * weight_of_size
        cost_of_size = cost_of_size + weight * F.pad(with_expert[:, :-1], (1, 0))
        weight_of_size = weight_of_size + weight * F.pad(weight_of_size[:, :-1], (1, 0))
    per_slot = (cost_of_size[:, -1] / weight_of_size[:, -1]).mean() / top_k
    return (per_slot / expert_cost.mean()).to(routing.router_logits.dtype)


def chosen_energy(counts: Tensor, expert_cost: Tensor) -> Tensor:
    """Return the mean cost of a chosen slot, on the scale of `expected_energy`: 1 for an even load.

    Args:
        counts: Tokens per expert.  # [..., E]
        expert_cost: Cost per routed token of each expert in any unit, not all 0.  # [E]
    """
    return (counts * expert_cost).sum(dim=-1) / counts.sum(dim=-1) / expert_cost.mean()


@torch.no_grad()
def step_balance_bias(
    balance_bias: Tensor, counts: Tensor, rate: float, groups: Tensor | None = None
) -> Tensor:
    """Return the bias after a step of loss-free balancing (arXiv 2408.15664, algorithm 1), [E].

    Experts below the mean load of their group gain ``rate``, those above lose it. The mean of each group is
    then taken out, so that the bias moves no load between groups.

    Args:
        balance_bias: The bias before.  # [E]
        counts: Tokens sent to each expert in the step.  # [E]
        rate: Size of the step, in units of the logits.
        groups: Group of each expert, 0 to E - 1; None means one group.  # [E]
    """
    alike = _alike(torch.zeros_like(counts) if groups is None else groups)  # [E, E]
    size = alike.sum(dim=-1)  # [E]
    missing = (alike * counts).sum(dim=-1) - size * counts  # [E], in whole tokens: at balance exactly 0
    stepped = balance_bias + rate * missing.sign()
    return stepped - (alike * stepped).sum(dim=-1) / size


def _alike(groups: Tensor) -> Tensor:
    """Whether two experts are of one group, [E, E]."""
    return groups.unsqueeze(-1) == groups
