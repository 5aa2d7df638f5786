"""Layers that cast what they hold: linear maps, convolutions and norms over the channels of tokens.

Shapes: B samples, S tokens or pixels of a sample, D channels, H pixels a side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.model.config import ModelConfig

GROUPS = 8
"""Groups of channels of a group norm: every width is a multiple of it (`moe.model.config.ALIGNMENT`)."""


class Linear(nn.Module):
    """Linear map without offset whose weight is cast to the input's type."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T``."""
        return F.linear(x, self.weight.to(x.dtype))


class Convolution(nn.Module):
    """Convolution of 3 x 3 pixels without offset, channels last; the weight is cast to the input's type."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the pixels of [B, H * H, D] convolved, every ``stride``-th along each side."""
        side = math.isqrt(x.shape[1])
        pixels = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [B, D, H, H]
        out = F.conv2d(pixels, self.weight.to(x.dtype), stride=self.stride, padding=1)
        return out.permute(0, 2, 3, 1).flatten(1, 2)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over samples and tokens, channels last; parameters and statistics in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of [B, S, D]."""
        return super().forward(input.flatten(0, -2)).view_as(input)


class GroupNorm(nn.GroupNorm):
    """Normalisation of groups of a sample's channels (arXiv 1803.08494), channels last; float32 as above."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each group of channels of each sample of [B, S, D]."""
        normal = F.group_norm(input.transpose(1, 2), self.num_groups, eps=self.eps).transpose(1, 2)
        return torch.addcmul(self.bias.to(input.dtype), normal, self.weight.to(input.dtype))


class LayerNorm(nn.LayerNorm):
    """Normalisation of each token (arXiv 1607.06450); gain and offset are float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each token of [B, S, D]."""
        normal = F.layer_norm(input, self.normalized_shape, eps=self.eps)
        return torch.addcmul(self.bias.to(input.dtype), normal, self.weight.to(input.dtype))


class RmsNorm(nn.Module):
    """Root-mean-square normalisation of each token (arXiv 1910.07467); the gain is float32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))  # [D]

    def reset_parameters(self) -> None:
        """Set the gain to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token of [B, S, D]."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.weight.to(x.dtype)


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """Return a new norm of the config's kind, of the model's width unless told otherwise."""
    width = config.d_model if width is None else width
    if config.norm == "group":
        return GroupNorm(GROUPS, width)
    return {"batch": BatchNorm, "layer": LayerNorm, "rms": RmsNorm}[config.norm](width)
