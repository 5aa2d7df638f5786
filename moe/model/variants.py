"""Models to compare a shipped one with: pure functions from config to config, which may be combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moe.model.config import ALIGNMENT, ModelConfig, Norm, ZeroComputation


def even(config: ModelConfig) -> ModelConfig:
    """Return the model with experts of one width, a standard Mixture-of-Experts, of as many parameters.

    Zero-computation experts stay. The width is rounded to the alignment, so the parameters of an expert
    differ from the mean before by those of ``ALIGNMENT / 2`` hidden units at most.
    """
    widths = [width for width in config.expert_widths if width]
    width = max(1, round(sum(widths) / len(widths) / ALIGNMENT)) * ALIGNMENT
    idle = (0,) * len(config.zero_computation)
    return dataclasses.replace(config, expert_widths=(width,) * len(widths) + idle)


def with_zero_computation(config: ModelConfig, kinds: Sequence[ZeroComputation]) -> ModelConfig:
    """Return the model with further experts that compute next to nothing (MoE++, arXiv 2410.07348, 3.1).

    The other experts stay: a router row and, for ``"constant"``, three vectors per layer are all it adds.
    """
    return dataclasses.replace(
        config,
        expert_widths=config.expert_widths + (0,) * len(kinds),
        zero_computation=(*config.zero_computation, *kinds),
    )


def fixed_k(config: ModelConfig, k: int) -> ModelConfig:
    """Return the model trained for ``k`` experts per token alone, rather than elastic.

    Raises:
        ValueError: ``k`` is not within 1..E.
    """
    return dataclasses.replace(config, top_k=k, top_k_choices=(k,))


def with_balance_bias(config: ModelConfig) -> ModelConfig:
    """Return the model whose routers balance their load by a bias instead of a loss (arXiv 2408.15664)."""
    return dataclasses.replace(config, balance_bias=True)


def with_rotation_head(config: ModelConfig) -> ModelConfig:
    """Return the model with a second head that tells how far an image is turned (arXiv 1909.13231).

    Raises:
        ValueError: The model is not for images.
    """
    return dataclasses.replace(config, rotation_head=True)


def with_norm(config: ModelConfig, norm: Norm) -> ModelConfig:
    """Return the model with another normalisation.

    Raises:
        ValueError: The norm is unknown or not for the task.
    """
    return dataclasses.replace(config, norm=norm)


def with_stem(config: ModelConfig) -> ModelConfig:
    """Return the model with a convolutional stem of three stages, up to an eighth of the model's width or 64.

    Raises:
        ValueError: The model is not for images.
    """
    widest = max(64, config.d_model // 8)
    return dataclasses.replace(config, stem=(widest // 4, widest // 2, widest))
