"""How evenly experts are used; computed where the routing lives, in training and in serving alike.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.router import Routing


def tokens_per_expert(routing: Routing) -> Tensor:
    """Count the tokens sent to each expert, int32, without null slots, [E].

    It reads what the experts were sorted by: no pass over the tokens and no host synchronisation.
    """
    return routing.dispatch.tokens_per_expert


def load_entropy(counts: Tensor) -> Tensor:
    """Return the entropy of the load over experts divided by log E: 1 is uniform, 0 a single expert.

    Args:
        counts: Tokens per expert, at least two experts and one token.  # [..., E]
    """
    share = counts.double() / counts.sum(dim=-1, keepdim=True)  # [..., E]
    return -torch.xlogy(share, share).sum(dim=-1) / math.log(counts.shape[-1])


def load_imbalance(counts: Tensor) -> Tensor:
    """Return the coefficient of variation of the load: 0 is uniform, sqrt(E - 1) a single expert.

    Args:
        counts: Tokens per expert, at least one token.  # [..., E]
    """
    counts = counts.double()
    return counts.std(dim=-1, correction=0) / counts.mean(dim=-1)


def mean_expert_cost(routing: Routing, expert_cost: Tensor) -> Tensor:
    """Return the cost of the chosen experts averaged over tokens and choices, without null slots; 0-dim.

    Args:
        routing: The decision.
        expert_cost: Cost per expert.  # [E]
    """
    counts = tokens_per_expert(routing)  # [E]
    return (counts * expert_cost).sum() / counts.sum()
