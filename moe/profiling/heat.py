"""Where tokens go when devices differ in heat: a forecast from a profile that one device measured.

A profile holds the tokens of each expert under routing biases whose cost is the expert's width, on one
device: that is, with all thermal signals at 1. Other signals change the costs, and with them the odds that a
token has an expert among its choices. The logarithm of these odds is taken to fall in proportion to the cost;
how steeply, per expert count, bias and layer, is what gives the profile's mean cost at signals of 1. One
offset for all experts then makes the choices of a token K again. So signals of 0 give the unbiased shares as
measured, signals of 1 the measured cost, and heat on a device never raises its share.

What this does not say is how good the answers are: a profile holds no quality under unequal signals.

Index letters as in `moe.profiles`; D devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe.placement import Placement
from moe.profiles import Profile, ProfileError

_NEVER = 1e-6
"""Odds of an expert that the samples chose never or always: the same to one in a million."""
_FURTHEST, _HALVINGS = 60.0, 50
"""Of a search for a slope or an offset of log-odds."""


def forecast_expert_share(
    profile: Profile, placement: Placement, device_signal: Sequence[float]
) -> np.ndarray:
    """Share of a layer's routed tokens that each expert takes under heat, [K, R, L, E].

    Args:
        profile: Measured on one device.
        placement: Device of each expert.
        device_signal: Thermal signal of each device, 0..1.  # [D]

    Raises:
        PlacementError: The placement is of another model, or a signal is out of range.
        ProfileError: All experts are equally wide, so the profile does not show what cost does.
    """
    widths = np.array(profile.model["config"]["expert_widths"], np.float64)
    placement.check(profile.expert_share.shape[-1])
    cost = np.asarray(placement.thermal_cost(widths.tolist(), device_signal), np.float64)  # [E]
    full_cost = widths / widths.max()
    if full_cost.min() == 1.0:
        raise ProfileError(
            f"all experts of the profile of {profile.device} have width {widths[0]:g}: no bias moved a "
            "token, so it does not show what heat would; measure a model of unequal experts"
        )
    count = profile.expert_count[:, None, None, None]
    chance = np.clip(profile.expert_share * count, _NEVER, 1.0 - _NEVER)  # of being among a token's choices
    odds = np.log(chance / (1.0 - chance))[:, :1]  # [K, 1, L, E], unbiased
    measured = (chance * full_cost).sum(axis=-1, keepdims=True)  # [K, R, L, 1]
    low, high = np.zeros(measured.shape), np.full(measured.shape, _FURTHEST)
    for _ in range(_HALVINGS):
        slope = 0.5 * (low + high)
        above = (_chosen(odds - slope * full_cost, count) * full_cost).sum(axis=-1, keepdims=True) > measured
        low, high = np.where(above, slope, low), np.where(above, high, slope)
    return _chosen(odds - low * cost, count) / count


def _chosen(odds: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Chances of log-odds that are raised alike until they sum to `count` over the last axis (bisection)."""
    low = np.full((*odds.shape[:-1], 1), -2.0 * _FURTHEST)
    high = -low
    for _ in range(_HALVINGS):
        offset = 0.5 * (low + high)
        over = (1.0 / (1.0 + np.exp(-odds - offset))).sum(axis=-1, keepdims=True) > count
        low, high = np.where(over, low, offset), np.where(over, offset, high)
    chance = 1.0 / (1.0 + np.exp(-odds - low))
    return chance * (count / chance.sum(axis=-1, keepdims=True))
