"""Sixteen graded corruptions of 28x28 grey images, as batches, on the device of the images.

The kinds follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019); the severities do not. Theirs are made for 224 or 32 colour pixels a side, these
for 28 grey ones, so accuracies are not comparable with published tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def corrupt(images: Tensor, kind: str, severity: int, generator: Generator) -> Tensor:
    """Corrupt a batch of images; the same generator state gives the same result.

    Args:
        images: uint8 ``[B, 28, 28]``.
        kind: One of `KINDS`.
        severity: 1 (mild) to 5 (severe).
        generator: Source of all randomness. It may live on another device than the images: a CPU generator
            draws the same numbers whatever the images' device.

    Returns:
        uint8 ``[B, 28, 28]`` on the images' device. The input is not changed.

    Raises:
        ValueError: The kind or severity is unknown, or the images have another type or shape.
    """
    if kind not in SEVERITIES:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be an integer from 1 to 5, got {severity!r}")
    if images.dtype != torch.uint8 or images.shape[1:] != (28, 28):
        raise ValueError(f"images must be uint8 [B, 28, 28], got {images.dtype} {list(images.shape)}")
    function, strengths = _CORRUPTIONS[kind], SEVERITIES[kind]
    changed = function(images.float() / 255, strengths[int(severity) - 1], generator)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)  # [B, 28, 28]


def _uniform(size: tuple[int, ...], x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(size, generator=generator, device=generator.device).to(x.device)


def _gaussian_noise(x: Tensor, sigma: float, generator: Generator) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)


def _shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    return torch.poisson((x * photons).to(generator.device), generator=generator).to(x.device) / photons


def _blur(x: Tensor, sigma: float, generator: Generator) -> Tensor:
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    padded = F.pad(x[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights[None, None, None, :]), weights[None, None, :, None])[:, 0]


def _contrast(x: Tensor, factor: float, generator: Generator) -> Tensor:
    mean = x.mean(dim=(1, 2), keepdim=True)
    return mean + factor * (x - mean)


def _brightness(x: Tensor, offset: float, generator: Generator) -> Tensor:
    return x + offset


def _pixelate(x: Tensor, pixels: float, generator: Generator) -> Tensor:
    coarse = F.interpolate(x[:, None], size=int(pixels), mode="area")
    return F.interpolate(coarse, size=28, mode="nearest")[:, 0]


def _rotation(x: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Rotate by exactly ``degrees``, each image to a random side."""
    side = torch.where(_uniform((len(x),), x, generator) < 0.5, -1.0, 1.0)
    cosine = torch.full_like(side, math.cos(math.radians(degrees)))
    sine, zero = side * math.sin(math.radians(degrees)), torch.zeros_like(side)
    matrices = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, [len(x), 1, 28, 28], align_corners=False)
    return F.grid_sample(x[:, None], grid, align_corners=False)[:, 0]


def _occlusion(x: Tensor, side: float, generator: Generator) -> Tensor:
    """Cover a square of ``side`` pixels somewhere inside each image with grey."""
    first = (_uniform((len(x), 2), x, generator) * (29 - side)).floor()  # [B, 2] top row, left column
    place = torch.arange(28, device=x.device)
    inside = (place >= first[..., None]) & (place < first[..., None] + side)  # [B, 2, 28]
    return torch.where(inside[:, 0, :, None] & inside[:, 1, None, :], 0.5, x)


def _impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    """Set a share of the pixels to black or white, evenly."""
    draw = _uniform(tuple(x.shape), x, generator)
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, x))


def _defocus(x: Tensor, radius: float, generator: Generator) -> Tensor:
    """Blur with a disc of ``radius`` pixels, as a lens out of focus does; its edge is half a pixel soft."""
    reach = math.ceil(radius)
    offsets = torch.arange(-reach, reach + 1.0, device=x.device)
    disc = (radius + 0.5 - torch.hypot(*torch.meshgrid(offsets, offsets, indexing="ij"))).clamp(0, 1)
    padded = F.pad(x[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(padded, (disc / disc.sum())[None, None])[:, 0]


def _moved(x: Tensor, shift: Tensor) -> Tensor:
    """Read every pixel ``shift`` pixels (right, down) from its place, [B, 28 or 1, 28 or 1, 2]."""
    identity = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(identity, [len(x), 1, 28, 28], align_corners=False)  # [B, 28, 28, 2], a side is 2
    return F.grid_sample(x[:, None], grid + shift / 14, padding_mode="border", align_corners=False)[:, 0]


def _motion_blur(x: Tensor, length: float, generator: Generator) -> Tensor:
    """Average along a line of ``length`` pixels, of a random direction in each image."""
    angle = math.pi * _uniform((len(x), 1, 1), x, generator)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [B, 1, 1, 2]
    pieces = 2 * math.ceil(length)  # of half a pixel or less, each read at its middle
    total = torch.zeros_like(x)
    for piece in range(pieces):
        total += _moved(x, length * ((piece + 0.5) / pieces - 0.5) * direction)
    return total / pieces


def _smooth_field(size: int, channels: int, x: Tensor, generator: Generator) -> Tensor:
    """Draw from -1..1 on a coarse grid of ``size`` a side and interpolate to [B, channels, 28, 28]."""
    coarse = 2 * _uniform((len(x), channels, size, size), x, generator) - 1
    return F.interpolate(coarse, size=28, mode="bilinear", align_corners=True)


def _elastic(x: Tensor, pixels: float, generator: Generator) -> Tensor:
    """Bend the image: displace by up to ``pixels`` either way, smoothly varying over it."""
    return _moved(x, pixels * _smooth_field(7, 2, x, generator).permute(0, 2, 3, 1))


def _fog(x: Tensor, density: float, generator: Generator) -> Tensor:
    """Mix with a plasma, noise of four sizes whose strength halves with the size, of range 0..1."""
    octaves = [_smooth_field(2**i + 1, 1, x, generator)[:, 0] / 2**i for i in range(1, 5)]
    plasma = torch.stack(octaves).sum(dim=0)  # [B, 28, 28]
    low, high = plasma.amin((1, 2), keepdim=True), plasma.amax((1, 2), keepdim=True)
    return x + density * ((plasma - low) / (high - low) - x)


def _dead_lines(x: Tensor, lines: float, generator: Generator) -> Tensor:
    """Stick a number of random rows of each image at black or white."""
    order, value = _uniform((2, len(x), 28), x, generator)
    dead = order.argsort(dim=1).argsort(dim=1) < lines  # [B, 28], the more severe one holds the milder
    return torch.where(dead[..., None], (value < 0.5).to(x)[..., None], x)


def _solarize(x: Tensor, threshold: float, generator: Generator) -> Tensor:
    """Invert what is brighter than the threshold, as a film that is exposed too long."""
    return torch.where(x > threshold, 1 - x, x)


def _gamma(x: Tensor, exponent: float, generator: Generator) -> Tensor:
    return x**exponent


_CORRUPTIONS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "rotation": _rotation,
    "occlusion": _occlusion,
    "impulse_noise": _impulse_noise,
    "defocus": _defocus,
    "motion_blur": _motion_blur,
    "elastic": _elastic,
    "fog": _fog,
    "dead_lines": _dead_lines,
    "solarize": _solarize,
    "gamma": _gamma,
}
SEVERITIES: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.1, 0.2, 0.3, 0.4, 0.5),  # standard deviation, of a range of 1
    "shot_noise": (16, 6, 3, 1.5, 0.8),  # photons at full white
    "blur": (0.7, 1.1, 1.6, 2.2, 3.0),  # standard deviation, pixels
    "contrast": (0.75, 0.6, 0.45, 0.3, 0.2),  # remaining factor
    "brightness": (0.08, 0.16, 0.24, 0.32, 0.4),  # added, of a range of 1
    "pixelate": (14, 10, 7, 5, 4),  # remaining pixels along a side
    "rotation": (8, 15, 22, 30, 40),  # degrees
    "occlusion": (6, 9, 12, 14, 16),  # side of the square, pixels
    "impulse_noise": (0.05, 0.1, 0.2, 0.3, 0.45),  # share of the pixels
    "defocus": (1, 1.7, 2.4, 3.2, 4),  # radius of the disc, pixels
    "motion_blur": (3, 5, 8, 11, 15),  # length of the line, pixels
    "elastic": (1, 2, 3, 4, 6),  # largest displacement along an axis, pixels
    "fog": (0.2, 0.35, 0.5, 0.6, 0.7),  # share of the fog
    "dead_lines": (2, 4, 7, 10, 14),  # rows
    "solarize": (0.9, 0.8, 0.7, 0.6, 0.5),  # brightness above which pixels are inverted
    "gamma": (1.5, 2, 3, 4.5, 7),  # exponent of the brightness
}
KINDS = tuple(SEVERITIES)
