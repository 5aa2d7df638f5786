"""From pixels to tokens by convolutions, with norms where noise, blur and contrast show as statistics.

Shapes: B samples, H pixels a side, W channels, S tokens, D model.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moe.model.config import IMAGE_SIZE, ModelConfig
from moe.model.layers import Convolution, Linear, make_norm


class Stage(nn.Module):
    """Half as many pixels a side: a convolution, then a residual block (arXiv 1512.03385)."""

    def __init__(self, config: ModelConfig, in_channels: int, width: int) -> None:
        super().__init__()
        self.down, self.down_norm = Convolution(in_channels, width, stride=2), make_norm(config, width)
        self.first, self.first_norm = Convolution(width, width), make_norm(config, width)
        self.second, self.second_norm = Convolution(width, width), make_norm(config, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, H * H / 4, width] of [B, H * H, in_channels]."""
        x = F.relu(self.down_norm(self.down(x)))
        return F.relu(x + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))


class Stem(nn.Module):
    """Stages of growing width, and a map to the model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.widths = config.stem
        pairs = itertools.pairwise((1, *config.stem))
        self.stages = nn.ModuleList(Stage(config, before, width) for before, width in pairs)
        self.project = Linear(config.stem[-1], config.d_model)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images, [B, 28, 28], into tokens, [B, S, D]."""
        x = images.flatten(1)[..., None]  # [B, H * H, 1]
        for stage in self.stages:
            x = stage(x)
        return self.project(x)

    def first_features(self, images: Tensor) -> Tensor:
        """Return what the first norm takes in, [B, H * H / 4, W]."""
        first: Any = self.stages[0]
        return first.down(images.flatten(1)[..., None])

    @property
    def products(self) -> int:
        """Multiply-adds of an image."""
        total, side, before = 0, IMAGE_SIZE, 1
        for width in self.widths:
            side = (side + 1) // 2
            total += side**2 * 9 * width * (before + 2 * width)
            before = width
        return total + side**2 * self.project.weight.numel()
