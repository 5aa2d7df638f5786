"""How the families of Hugging Face Mixture-of-Experts models choose and weigh experts.

Each function follows the gate of its family in transformers, except that the choice may be biased. Without a
pull it gives what the gate gives, bit for bit.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HfModelError(ValueError):
    """A Hugging Face model, or a knob of it, cannot be used; the message names the remedy."""


def _softmax_top_k(gate: Any, logits: Tensor, top_k: int, pull: Tensor | None) -> tuple[Tensor, Tensor]:
    """OLMoE, Qwen3-MoE, Mixtral: the largest of the probabilities, which Mixtral always makes sum to 1."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)  # [T, E]
    for_choice = probabilities if pull is None else logits.float() - _charge(logits.float(), pull)
    experts = for_choice.topk(top_k).indices
    weights = probabilities.gather(-1, experts)
    if getattr(gate, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def _top_k_softmax(gate: Any, logits: Tensor, top_k: int, pull: Tensor | None) -> tuple[Tensor, Tensor]:
    """GPT-OSS: probabilities among the chosen."""
    for_choice = logits if pull is None else logits.float() - _charge(logits.float(), pull)
    experts = for_choice.topk(top_k).indices
    return logits.gather(-1, experts).softmax(dim=-1), experts


def _sigmoid_groups(gate: Any, logits: Tensor, top_k: int, pull: Tensor | None) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid, chosen with its own load correction."""
    scores = logits.sigmoid()  # [T, E]
    for_choice = scores + gate.e_score_correction_bias
    outside = _outside(_grouped(for_choice, gate).topk(2, dim=-1).values.sum(dim=-1), gate)
    if pull is not None:
        for_choice = for_choice - _charge(scores, pull)
    experts = for_choice.masked_fill(outside, -math.inf).topk(top_k, sorted=False).indices
    weights = scores.gather(-1, experts)
    if gate.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * gate.routed_scaling_factor, experts


def _softmax_groups(gate: Any, logits: Tensor, top_k: int, pull: Tensor | None) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2 (arXiv 2405.04434, section 2.1.2): probabilities, from the best groups if gates say so."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)  # [T, E]
    for_choice = probabilities if pull is None else logits - _charge(logits, pull)
    if limits_groups(gate):
        outside = _outside(_grouped(probabilities, gate).amax(dim=-1), gate)
        for_choice = for_choice.masked_fill(outside, -math.inf)
    experts = for_choice.topk(top_k, sorted=False).indices
    return probabilities.gather(-1, experts) * gate.routed_scaling_factor, experts


def _charge(scores: Tensor, pull: Tensor) -> Tensor:
    """What an expert's cost takes off its score, in the token's own spread of scores, [T, E].

    As in `router.route`. It is taken off the score, not off what a squashed score is made of: only so
    does more bias never raise the cost of the chosen.
    """
    return pull * scores.std(dim=-1, keepdim=True, correction=0)


def _grouped(scores: Tensor, gate: Any) -> Tensor:
    return scores.unflatten(-1, (gate.num_group, -1))  # [T, groups, E / groups]


def _outside(group_scores: Tensor, gate: Any) -> Tensor:
    """Experts that are not in the token's best groups, bool [T, E].

    The groups are chosen without the bias, which acts within them. Chosen with it, a group could win by its
    few cheap experts and make the choice dearer.
    """
    best = group_scores.topk(gate.topk_group, dim=-1, sorted=False).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
    return outside.repeat_interleave(gate.num_experts // gate.num_group, dim=-1)


def limits_groups(gate: Any) -> bool:
    """Whether a token may use the experts of some groups only."""
    return hasattr(gate, "topk_group") and getattr(gate, "topk_method", None) != "greedy"


class Family(NamedTuple):
    """What differs between the models."""

    gate: str
    """End of the names of its gates."""
    select: Callable[[Any, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
    """Gate, logits [T, E], K and pull [E] (None for none) to combine weights and experts, [T, K] each."""


FAMILIES: dict[str, Family] = {
    "olmoe": Family(".mlp.gate", _softmax_top_k),
    "mixtral": Family(".mlp.gate", _softmax_top_k),
    "qwen3_moe": Family(".mlp.gate", _softmax_top_k),
    "deepseek_v2": Family(".mlp.gate", _softmax_groups),
    "deepseek_v3": Family(".mlp.gate", _sigmoid_groups),
    "gpt_oss": Family(".mlp.router", _top_k_softmax),
}
"""By `model_type` of the config."""
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def family_of(config: Any) -> Family:
    """Look a model's config up.

    Raises:
        HfModelError: it is not of a Mixture-of-Experts model, or of a family that is not known.
    """
    name = config.model_type
    if name in FAMILIES:
        return FAMILIES[name]
    if any(getattr(config, key, None) for key in _EXPERT_KEYS):
        raise HfModelError(
            f"model_type {name!r} is a family whose router is not known here; known are {sorted(FAMILIES)}"
        )
    raise HfModelError(
        f"model_type {name!r} is not a Mixture-of-Experts model: it has no router; take one of "
        f"{sorted(FAMILIES)}"
    )
