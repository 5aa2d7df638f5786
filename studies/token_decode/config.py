"""Shapes, recipes and sizes: what `python -m studies.token_decode --size NAME` trains and measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe.device.torch_device import pick_device
from moe.errors import GpuUnavailableError

Gate = Literal["softmax", "sigmoid"]
"""How strongly an expert is wanted, before the weights of the chosen are normalised."""
SizeName = Literal["base", "small", "mini", "smoke"]


@dataclass(frozen=True)
class LmConfig:
    """Shape of a language model; `n_experts` 0 means one dense layer of width `expert_width`."""

    vocabulary: int = 8192
    d_model: int = 1024
    n_layers: int = 8
    n_heads: int = 16
    n_kv_heads: int = 4
    head_dim: int = 64
    n_experts: int = 128
    expert_width: int = 512
    top_k: int = 8
    tied: bool = False
    """Whether the embedding is the head as well."""
    gate: Gate = "sigmoid"

    def dense(self) -> LmConfig:
        """The dense model of the same active width."""
        return replace(self, n_experts=0, expert_width=self.top_k * self.expert_width, top_k=1)


@dataclass(frozen=True)
class Recipe:
    """How to train: a warm-up, a plateau, a linear decay to zero."""

    steps: int = 1100
    batch: int = 64
    """Windows per step."""
    context: int = 1024
    """Tokens of a window that are predicted."""
    lr: float = 4e-3
    """Of Muon, for matrices."""
    adam_lr: float = 4e-3
    """Of AdamW, for the head and the norms."""
    router_lr: float = 4e-3
    embed_lr: float = 2e-2
    warmup: int = 20
    """Steps."""
    decay_share: float = 0.6
    """Share of the steps in which the rates fall."""
    muon: bool = True
    """False trains matrices by AdamW too, at `adam_lr`."""


@dataclass(frozen=True)
class Size:
    """What is trained and measured at one size; the first model is the standard one."""

    models: dict[str, tuple[LmConfig, Recipe]]
    needs_cuda: bool
    max_bytes: int
    """Most text."""
    sample_bytes: int
    """Text that the tokenizer is learned from."""
    held_out_percent: int
    windows: int
    """Held-out windows that quality is measured on."""
    groups: tuple[int, ...] = ()
    """Running sequences that share a budget of experts, in quality; none: quality over top_k alone."""
    running: tuple[int, ...] = ()
    """Running sequences whose decode step is measured; none: no cost."""
    prefill: tuple[tuple[int, int], ...] = ()
    """(tokens of a prompt, prompts at once) whose prefill is measured."""
    heat_s: float = 0.0
    """Length of the runs under sustained load, on a card."""

    @property
    def standard(self) -> str:
        """Name of the model whose cost is measured."""
        return next(iter(self.models))

    @property
    def vocabulary(self) -> int:
        """Tokens, the same for all models."""
        return self.models[self.standard][0].vocabulary

    @property
    def context(self) -> int:
        """Tokens of a window that are predicted, the same for all models."""
        return self.models[self.standard][1].context

    @property
    def held_out_windows(self) -> int:
        """Windows that must not overlap: those of the quality, and one per running sequence."""
        return max(self.windows, *self.running, 1)


_BASE = LmConfig()
_MINI = replace(_BASE, d_model=512, n_layers=6, n_heads=8, n_kv_heads=2, n_experts=64, expert_width=256)
_SMALL = replace(
    _BASE, d_model=160, n_layers=4, n_heads=5, n_kv_heads=1, head_dim=32, n_experts=16, expert_width=72,
    top_k=4, tied=True,
)  # fmt: skip
_SMOKE = replace(
    _BASE, vocabulary=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8,
    expert_width=32, top_k=4,
)  # fmt: skip
_LONG, _SHORT = Recipe(), Recipe(steps=400, batch=32)
_ADAM = replace(_SHORT, muon=False, adam_lr=1e-3, router_lr=1e-3)
_BRIEF = Recipe(steps=30, batch=8, context=32, warmup=5)
_SOFT = replace(_MINI, gate="softmax")


def _compared(config: LmConfig, recipe: Recipe) -> dict[str, tuple[LmConfig, Recipe]]:
    return {
        "sigmoid": (config, recipe),
        "softmax": (replace(config, gate="softmax"), recipe),
        "sigmoid-top2": (replace(config, top_k=2), recipe),
        "dense": (config.dense(), recipe),
    }


SIZES: dict[SizeName, Size] = {
    "base": Size(
        models=_compared(_BASE, _LONG), needs_cuda=True,
        max_bytes=400_000_000, sample_bytes=24_000_000, held_out_percent=2,
        windows=256, groups=(8, 32, 128), running=(32, 128, 8, 512, 1, 16, 64, 256),
        prefill=((512, 1), (2048, 1), (512, 16), (2048, 8)), heat_s=60.0,
    ),
    "small": Size(
        models={"sigmoid": (_SMALL, replace(_LONG, steps=2000, lr=6e-3))}, needs_cuda=False,
        max_bytes=400_000_000, sample_bytes=24_000_000, held_out_percent=2,
        windows=256, groups=(8, 32, 128),
    ),
    # Which recipes give the expert count a price.
    "mini": Size(
        models={
            "sigmoid": (_MINI, _SHORT),
            "sigmoid-slow-router": (_MINI, replace(_SHORT, router_lr=4e-4)),
            "sigmoid-32-experts": (replace(_MINI, n_experts=32), _SHORT),
            "sigmoid-128-experts": (replace(_MINI, n_experts=128), _SHORT),
            "sigmoid-adamw": (_MINI, _ADAM),
            "softmax": (_SOFT, _SHORT),
            "softmax-slow-router": (_SOFT, replace(_SHORT, router_lr=4e-4)),
            "softmax-adamw": (_SOFT, _ADAM),
        },
        needs_cuda=True, max_bytes=200_000_000, sample_bytes=12_000_000, held_out_percent=2, windows=256,
    ),
    "smoke": Size(
        models=_compared(_SMOKE, _BRIEF), needs_cuda=False,
        max_bytes=1_000_000, sample_bytes=500_000, held_out_percent=20,
        windows=16, groups=(2, 8), running=(8, 1), prefill=((32, 2),),
    ),
}  # fmt: skip


def study_device(name: SizeName) -> torch.device:
    """The device that a size runs on: a card where there is one.

    Raises:
        GpuUnavailableError: the size needs a card and there is none.
    """
    if SIZES[name].needs_cuda and not torch.cuda.is_available():
        raise GpuUnavailableError(
            f"--size {name} needs an NVIDIA GPU and a CUDA build of torch; --size smoke runs on a CPU"
        )
    return pick_device("auto")
