"""Images changed at random while training, in ways that no corruption of `moe.data.corruptions` does.

In the way of AugMix (Hendrycks et al., ICLR 2020, arXiv 1912.02781): sheared, moved, stretched and
posterised, twice in a row, and some of them mixed with another version of themselves. What the corruptions
hold is left out, so that they stay unseen: noise, blur, contrast, brightness, gamma, fog, pixels, rotation,
elastic, occlusion, dead lines and solarisation. Shapes: B images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SHEAR = 0.6  # largest, of the image's height
MOVE = 0.3  # largest, of half a side
STRETCH = (0.7, 1.4)
POSTERISED = 0.2  # share of the images
MIXED = 0.3  # share of the images


def augment(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Change a share of the images, uint8 [B, 28, 28], each in its own way."""
    clean = images.float() / 255
    changed = _change(_change(clean, generator), generator)
    weight = 0.5 * _uniform(images, generator) * (_uniform(images, generator) < MIXED)
    changed = torch.lerp(changed, _change(clean, generator), weight)
    changed = torch.where(_uniform(images, generator) < share, changed, clean)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


def _change(x: Tensor, generator: Generator) -> Tensor:
    """Shear, move or stretch each image of [B, 28, 28], and posterise some."""
    draw = torch.rand((7, len(x)), generator=generator, device=x.device)
    kind = (3 * draw[0]).long()  # [B]
    either_way = 2 * draw[1:5] - 1
    low, high = STRETCH
    stretch = torch.where(kind == 2, low + (high - low) * draw[1:3], 1.0)  # [2, B]
    shear = SHEAR * either_way[:2] * (kind == 0)
    move = MOVE * either_way[2:] * (kind == 1)
    rows = [stretch[0], shear[0], move[0], shear[1], stretch[1], move[1]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), [len(x), 1, 28, 28], align_corners=False)
    x = F.grid_sample(x[:, None], grid, align_corners=False, padding_mode="border")[:, 0]
    levels = 2.0 ** (1 + (3 * draw[5]).floor())[:, None, None]  # 2, 4 or 8
    posterised = (x * levels).floor().clamp(max=levels - 1) / (levels - 1)
    return torch.where((draw[6] < POSTERISED)[:, None, None], posterised, x)


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    return torch.rand((len(images), 1, 1), generator=generator, device=images.device)
