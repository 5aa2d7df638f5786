"""Shapes and recipes of the token service's models."""

from __future__ import annotations

import math
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
    balance_weight: float = 0.01
    """Of the load balance loss, as in Switch (arXiv 2101.03961, equation 4)."""
    read_weight: float = 0.0
    """Of the share of the experts that a decode step reads (`moe.lm.routing_loss`); 0 leaves it out."""
    read_budget: float | None = None
    """Experts of a layer that a step of 32 sequences may read, mean over layers: it finds its own weight."""

    def __post_init__(self) -> None:
        """Refuse a term of the loss that means nothing.

        Raises:
            ValueError: a weight or a budget is out of range, or reads are both weighed and budgeted.
        """
        for name in ("balance_weight", "read_weight"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.read_budget is not None and not (math.isfinite(self.read_budget) and self.read_budget > 0):
            raise ValueError(f"read_budget must be above 0 experts, got {self.read_budget}")
        if self.read_budget is not None and self.read_weight:
            raise ValueError(
                f"read_weight={self.read_weight} and read_budget={self.read_budget} exclude each other: a "
                "budget finds its own weight; give one of them"
            )


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

ENGINE: dict[str, dict[str, int]] = {
    "cuda": {"slots": 544, "max_rows": 1024},
    "cpu": {"slots": 64, "max_rows": 128},
}
"""Room of the engine that is measured and served with; slots are freed a few steps behind the last token."""
BLOCK = 64
"""Positions of a block of keys and values."""
AHEAD = 4
"""Most steps that are launched before the first of them is done."""
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of rows that have a graph on CUDA; a step runs the next larger one."""


def readable_experts(routing_bias: float, n_experts: int, top_k: int) -> int:
    """Experts of a layer that one step may read: all without bias, a quarter at a bias of 1.

    Sets are nested: experts are ranked by the step's demand, so more bias never reads another one.
    """
    return max(top_k, math.ceil(n_experts * (1 - 0.75 * routing_bias)))


HALVES = 2
"""Heads of an engine that adapts: each answers its part of the documents (`moe.lm.adapt`)."""
FIRST_TRUST, LEAST_TRUST = 0.25, 1 / 64
"""Share of a whole step that a head takes at the start, and at least."""
FALLS_TO, RISES_TO = 0.25, 2.0
"""What becomes of that share where a head was worse than the unadapted one, and where it was better."""
