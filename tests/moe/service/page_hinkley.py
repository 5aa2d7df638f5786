"""The Page-Hinkley test by its definition, summed anew over all values since the last alarm."""

from __future__ import annotations

from collections.abc import Sequence


def rise(values: Sequence[float], tolerance: float) -> float:
    """How far a sum of deviations is above its lowest so far, 0 at first; the larger of both sides."""
    means = [sum(values[: n + 1]) / (n + 1) for n in range(len(values))]
    rises = []
    for sign in (-1.0, 1.0):
        deviations = [sign * (value - mean) - tolerance for value, mean in zip(values, means, strict=True)]
        sums = [sum(deviations[: n + 1]) for n in range(len(values))]
        rises.append(sums[-1] - min(0.0, *sums))
    return max(rises)
