"""How tokens choose experts: all tokens at once, in training, and under the knobs of a decode step.

Shapes: B sequences, S positions, T = B * S tokens, E experts, K choices per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.model.dispatch import Dispatch
from studies.token_decode.config import Gate, LmConfig


@dataclass(frozen=True)
class RoutingKnobs:
    """How tokens are routed when a trained model is judged.

    Attributes:
        top_k: Experts per token.
        renormalise: 1: the chosen weights sum to one. 0: they keep the value that they have under the
            training's top_k, so that the rest of the mix is simply missing. Between: a power of the sum.
        budget: Experts that one layer may use in one decode step of a group; None means all.
        group: Sequences that decode together: tokens of one position of `group` neighbours share a budget.
        decode_from: Earlier positions are prompt, served with `prompt_top_k` and no budget.
        prompt_top_k: Experts per prompt token; None means `top_k`.
    """

    top_k: int
    renormalise: float = 1.0
    budget: int | None = None
    group: int = 1
    decode_from: int = 0
    prompt_top_k: int | None = None


@dataclass(frozen=True)
class RoutingDecision:
    """What one layer decided.

    Attributes:
        logits: Float32.  # [T, E]
        experts: int64; E in null slots.  # [T, K]
        weights: Float32, 0 in null slots.  # [T, K]
        dispatch: Where the rows of each expert are.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor
    dispatch: Dispatch


def normalised(logits: Tensor, gate: Gate) -> Tensor:
    """How strongly experts are wanted, summing to one over the last dimension."""
    if gate == "softmax":
        return logits.softmax(dim=-1)
    wanted = logits.sigmoid()
    return wanted / wanted.sum(dim=-1, keepdim=True)


def choose(logits: Tensor, knobs: RoutingKnobs, config: LmConfig) -> tuple[Tensor, Tensor]:
    """Choose experts under knobs.

    Args:
        logits: Unbiased router logits, float32.  # [B, S, E]
        knobs: See `RoutingKnobs`; B is a multiple of `group` where there is a budget.
        config: Its `top_k` is the training's, whose normaliser is kept where weights are not renormalised.

    Returns:
        Experts and weights.  # [T, K] each
    """
    n, s, e = logits.shape
    if knobs.renormalise == 1 and knobs.budget is None and not knobs.decode_from:
        top = logits.topk(knobs.top_k, dim=-1)
        return top.indices.flatten(0, 1), normalised(top.values, config.gate).flatten(0, 1)
    want = torch.sigmoid if config.gate == "sigmoid" else torch.exp
    best = logits.amax(dim=-1, keepdim=True) if config.gate == "softmax" else logits.new_zeros(())
    reference = want(logits.topk(config.top_k, dim=-1).values - best).sum(dim=-1, keepdim=True)  # [B, S, 1]
    scores = logits
    if knobs.budget is not None and knobs.budget < e:
        allowed = allowed_experts(logits, knobs, config.gate)  # [B / group, 1, S, E]
        prompt = (torch.arange(s, device=logits.device) < knobs.decode_from).view(1, 1, s, 1)
        grouped = logits.view(-1, knobs.group, s, e)
        scores = grouped.masked_fill(~(allowed | prompt), -math.inf).view(n, s, e)
    prompt_top_k = knobs.prompt_top_k or knobs.top_k
    slots = max(knobs.top_k, prompt_top_k) if knobs.decode_from else knobs.top_k
    experts = scores.topk(slots, dim=-1).indices  # [B, S, K]
    used = torch.full((s,), knobs.top_k, device=logits.device)
    used[: knobs.decode_from] = prompt_top_k
    null = torch.arange(slots, device=logits.device) >= used[:, None]  # [S, K]
    weights = (want(logits.gather(-1, experts) - best) / reference).masked_fill(null, 0)  # [B, S, K]
    weights = weights / weights.sum(dim=-1, keepdim=True) ** knobs.renormalise
    return experts.masked_fill(null, e).flatten(0, 1), weights.flatten(0, 1)


def allowed_experts(logits: Tensor, knobs: RoutingKnobs, gate: Gate) -> Tensor:
    """Which experts each decode step may use: those in most demand, the lower number first among equals.

    Demand is the sum over the step's group of the probabilities inside each token's own top k.

    Returns:
        bool, the same for all of a group.  # [B / group, 1, S, E]
    """
    own = logits.topk(knobs.top_k, dim=-1).indices  # [B, S, K]
    p = normalised(logits, gate)
    inside = torch.zeros_like(p).scatter_(-1, own, p.gather(-1, own))  # [B, S, E]
    demand = inside.view(-1, knobs.group, *inside.shape[1:]).sum(dim=1, keepdim=True)  # [B / group, 1, S, E]
    best = demand.sort(dim=-1, descending=True, stable=True).indices[..., : knobs.budget]
    return torch.zeros_like(demand, dtype=torch.bool).scatter_(-1, best, True)


def experts_read(experts: Tensor, n: int, decode_from: int, group: int, n_experts: int) -> Tensor:
    """Mean number of distinct experts of a decode step, per group.

    Args:
        experts: A layer's choices.  # [T, K]
        n: Sequences.
        decode_from: First position that counts.
        group: Sequences that decode together.
        n_experts: E, the id of null slots.

    Returns:
        Float32.  # [B / group]
    """
    choices = experts.view(n // group, group, -1, experts.shape[-1])[:, :, decode_from:]  # [., g, S', K]
    seen = torch.zeros(len(choices), choices.shape[2], n_experts + 1, device=experts.device)
    seen.scatter_(-1, choices.movedim(1, 2).flatten(2), 1.0)
    return seen[..., :n_experts].sum(dim=-1).mean(dim=-1)
