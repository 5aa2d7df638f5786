"""Steps of the token service on the mean, compiled: looked up in `thermoe_env.problem.token_tables`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe.compiled import inlined
from thermoe_env.device.physics import clock_power_factor
from thermoe_env.problem.token_tables import PER_OCTAVE, SHARES

_BITS = 52 - int(math.log2(PER_OCTAVE))
_ONE = int(np.float64(1.0).view(np.int64))
_IN_NODE, _PER_NODE = 2**_BITS - 1, 2.0**-_BITS


class Steps(NamedTuple):
    """Steps of a slot, on the mean."""

    period_s: float
    """From step to step while the device works; with the pause of the pace."""
    busy_s: float
    """Of a step."""
    energy_j: float
    mixed_share: float
    """Of those that read prompts."""
    mixed_s: float
    """Time of these."""
    pure_s: float
    rows: float
    """Of answers."""


@inlined
def _node(x):
    """Which node of a table `x` (at least 1) lies behind, and how far towards the next."""
    bits = np.float64(x).view(np.int64) - _ONE
    return bits >> _BITS, (bits & _IN_NODE) * _PER_NODE


@inlined
def steps_of(fixed, draw, shift, k, b, rows, filled, share, compute, pace):
    """Steps with `rows` of answers, of which a share reads prompts.

    Args:
        fixed: `Generate`.
        draw: of what steps cost.
        shift: domain of the text.
        k: level of the experts per token.
        b: level of the routing bias, which steps that read prompts do not have.
        rows: at least 1.
        filled: share of the rows that are left which prompts take in such a step, 0 to 1.
        share: of these steps.
        compute: one over the clock.
        pace: cap on the device's busy share.
    """
    i, w = _node(rows)
    j = min(int(filled * SHARES), SHARES - 1)
    x = filled * SHARES - j
    pure, mixed = fixed.pure[draw, shift, k, b], fixed.mixed[draw, shift, k]
    pure_s = compute * (pure[i, 0] + w * (pure[i + 1, 0] - pure[i, 0])) + (
        pure[i, 1] + w * (pure[i + 1, 1] - pure[i, 1])
    )
    factor = compute * clock_power_factor(1.0 / compute)
    pure_j = factor * (pure[i, 2] + w * (pure[i + 1, 2] - pure[i, 2])) + (
        pure[i, 3] + w * (pure[i + 1, 3] - pure[i, 3])
    )
    mixed_s = mixed_j = 0.0
    if share > 0.0:
        a, c = (1.0 - w) * (1.0 - x), (1.0 - w) * x
        d, e = w * (1.0 - x), w * x
        m0, m1, m2, m3 = mixed[i, j], mixed[i, j + 1], mixed[i + 1, j], mixed[i + 1, j + 1]
        mixed_s = compute * (a * m0[0] + c * m1[0] + d * m2[0] + e * m3[0]) + (
            a * m0[1] + c * m1[1] + d * m2[1] + e * m3[1]
        )
        mixed_j = factor * (a * m0[2] + c * m1[2] + d * m2[2] + e * m3[2]) + (
            a * m0[3] + c * m1[3] + d * m2[3] + e * m3[3]
        )
    busy = pure_s + share * (mixed_s - pure_s)
    return Steps(busy / pace, busy, pure_j + share * (mixed_j - pure_j), share, mixed_s, pure_s, rows)


@inlined
def add_answers(fixed, shift, k, b, steps, tokens, work):
    """Add what so many tokens of a slot were worth."""
    i, w = _node(steps.rows)
    own, plain, mixed = fixed.answers[shift, k, b], fixed.answers[shift, k, 0], steps.mixed_share
    a, c = (1.0 - mixed) * (1.0 - w), (1.0 - mixed) * w
    d, e = mixed * (1.0 - w), mixed * w
    work.right_tokens += tokens * (a * own[i, 0] + c * own[i + 1, 0] + d * plain[i, 0] + e * plain[i + 1, 0])
    work.confidence += tokens * (a * own[i, 1] + c * own[i + 1, 1] + d * plain[i, 1] + e * plain[i + 1, 1])
    work.entropy += tokens * (a * own[i, 2] + c * own[i + 1, 2] + d * plain[i, 2] + e * plain[i + 1, 2])


@inlined
def either_class(u, v):
    """Share of steps that read a prompt of either class, which come evenly: so many per step."""
    return 1.0 - (1.0 - min(1.0, u)) * (1.0 - min(1.0, v))


@inlined
def own_prompts(u, rows):
    """Prompts per step that an answer meets of its own class, whose next comes 1 / u steps behind its own.

    Args:
        u: prompts per step.
        rows: of answers, mean; numbers of them are taken as exponentially distributed.
    """
    within = rows * u
    return 1.0 / (rows * (math.exp(1.0 / within) - 1.0)) if within > 0.02 else 0.0
