"""Shapes and recipes of the token service's models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Size = Literal["small", "base"]


@dataclass(frozen=True)
class LmConfig:
    """Shape of a language model; `n_experts` 0 means one dense layer of width `expert_width`."""

    vocabulary: int = 8192
    d_model: int = 1024
    n_layers: int = 8
    n_heads: int = 16
    n_kv_heads: int = 4
    head_dim: int = 64
    n_experts: int = 64
    expert_width: int = 768
    top_k: int = 8
    """Experts per token in training."""
    tied: bool = False
    """Whether the embedding is the head as well."""
    context: int = 1024
    """Most positions of a sequence."""

    def dense(self) -> LmConfig:
        """The dense model of the same active width."""
        return replace(self, n_experts=0, expert_width=self.top_k * self.expert_width, top_k=1)


@dataclass(frozen=True)
class Recipe:
    """How to train: a warm-up, a plateau, a linear decay to zero."""

    steps: int = 900
    batch: int = 64
    """Windows of `context` tokens per step."""
    lr: float = 4e-3
    """Of Muon, for matrices."""
    adam_lr: float = 4e-3
    """Of AdamW, for the head and the norms."""
    router_lr: float = 4e-4
    """Of AdamW. A router as fast as the rest lets a few experts answer alone: the model is worse, and experts
    per token have no price (docs/results/token_decode.md)."""
    embed_lr: float = 2e-2
    warmup: int = 20
    """Steps."""
    decay_share: float = 0.6
    """Share of the steps in which the rates fall."""


SIZES: dict[Size, tuple[LmConfig, Recipe]] = {
    "small": (
        LmConfig(
            d_model=160, n_layers=4, n_heads=5, n_kv_heads=1, head_dim=32, n_experts=16, expert_width=72,
            top_k=4, tied=True,
        ),
        Recipe(steps=2000, lr=6e-3),
    ),
    "base": (LmConfig(), Recipe()),
}  # fmt: skip
