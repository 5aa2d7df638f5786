"""How experts are used: how evenly, and by which inputs; computed where the routing lives.

Shapes: T tokens, E experts, K experts per token, L layers, C classes of input.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.model.router import Routing

BYTE_CLASSES = ("letter", "digit", "space", "punctuation", "newline", "other")
"""Classes of an input byte; ``other`` is control characters and what UTF-8 needs beyond ASCII."""


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


def byte_classes(inputs: Tensor) -> Tensor:
    """Return the class of each byte, an index into `BYTE_CLASSES`, int64, of the same shape."""
    members = (string.ascii_letters, string.digits, " \t", string.punctuation, "\n\r")
    class_of_byte = torch.full((256,), len(members))
    for number, characters in enumerate(members):
        class_of_byte[list(characters.encode())] = number
    return class_of_byte.to(inputs.device)[inputs.long()]


class RoutingCounts:
    """Tokens sent to each expert, by layer and class of input, summed over batches where the routing lives.

    Adding a batch makes no host wait; `counts` is read once, at the end.
    """

    def __init__(self, n_layers: int, n_classes: int, n_experts: int, device: torch.device | str) -> None:
        """Start at 0. A token has one of ``n_classes`` classes: its image's label, or what byte it is."""
        self._n_experts = n_experts
        # One more column, for null slots.
        self._cells = torch.zeros(
            n_layers, n_classes * (n_experts + 1), dtype=torch.int64, device=device
        )  # [L, C * (E + 1)]
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def add(self, routing: Sequence[Routing], classes: Tensor) -> None:
        """Count a batch.

        Args:
            routing: One decision per layer.
            classes: Class of each token, int64.  # [T]
        """
        for cells, decision in zip(self._cells, routing, strict=True):
            index = (classes[:, None] * (self._n_experts + 1) + decision.experts).flatten()  # [T * K]
            cells.scatter_add_(0, index, self._one.expand_as(index))

    @property
    def counts(self) -> Tensor:
        """Tokens by layer, class and expert, int64, without null slots, [L, C, E]."""
        return self._cells.unflatten(1, (-1, self._n_experts + 1))[..., : self._n_experts]


def class_entropy(counts: Tensor) -> Tensor:
    """Return the entropy of the input's class in bits: the most that `specialisation` can be.

    Args:
        counts: Tokens by class and expert.  # [..., C, E]
    """
    return _entropy_bits(counts.double().sum(dim=-1))


def specialisation(counts: Tensor) -> Tensor:
    """Return the mutual information of expert and input class in bits: 0 when neither tells of the other.

    Plug-in estimate from the table of counts; `specialisation_bias` says how much of it is chance. An
    observation is one token in one of its experts.

    Args:
        counts: Tokens by class and expert, at least one.  # [..., C, E]
    """
    counts = counts.double()
    of_class, of_expert = _entropy_bits(counts.sum(dim=-1)), _entropy_bits(counts.sum(dim=-2))
    return of_class + of_expert - _entropy_bits(counts.flatten(-2))


def specialisation_bias(counts: Tensor) -> Tensor:
    """Return what `specialisation` is on average too high by, in bits.

    To first order an entropy from n observations is (m - 1) / 2n nats too low, with m outcomes seen (Miller,
    1955), and mutual information is a sum of three. Observations count as independent: tokens of one image
    are not, so the bias of an image model is larger by up to the tokens of an image.

    Args:
        counts: Tokens by class and expert, at least one.  # [..., C, E]
    """
    of_class, of_expert = ((counts.sum(dim=dim) > 0).sum(dim=-1) for dim in (-1, -2))
    of_both = (counts.flatten(-2) > 0).sum(dim=-1)
    observations = counts.sum(dim=(-2, -1))
    return (of_both - of_class - of_expert + 1).double() / (2 * observations * math.log(2))


def _entropy_bits(counts: Tensor) -> Tensor:
    """Entropy of the last axis in bits."""
    share = counts / counts.sum(dim=-1, keepdim=True)
    return -torch.xlogy(share, share).sum(dim=-1) / math.log(2)
