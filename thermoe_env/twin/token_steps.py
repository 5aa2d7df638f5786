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
    filled: float
    """Share of the rows that are left which prompts take in a step that reads some."""
    mixed_share: float
    """Of those that read prompts."""
    mixed_s: float
    """Time of these."""
    pure_s: float
    rows: float
    """Of answers, at least 1."""


@inlined
def _node(x):
    """Which node of a table `x` (at least 1) lies behind, and how far towards the next."""
    bits = np.float64(x).view(np.int64) - _ONE
    return bits >> _BITS, (bits & _IN_NODE) * _PER_NODE


@inlined
def _pure(pure, i, w, d, part, clocked):
    """Time (part 0) or energy (2) of a step of answers alone on a device.

    Args:
        pure: float [N, D, 4], of `TokenTables`.
        i: node of the rows.
        w: how far towards the next.
        d: the device.
        part: which.
        clocked: what its clock makes of a second, or a joule, that follows it.
    """
    low, high = pure[i, d], pure[i + 1, d]
    return clocked * (low[part] + w * (high[part] - low[part])) + (
        low[part + 1] + w * (high[part + 1] - low[part + 1])
    )


@inlined
def _mixed(mixed, i, w, j, x, d, part, clocked):
    """The same of a step that reads prompts, whose share has the node `j` and lies `x` beyond."""
    m0, m1, m2, m3 = mixed[i, j, d], mixed[i, j + 1, d], mixed[i + 1, j, d], mixed[i + 1, j + 1, d]
    a, c, e, f = (1.0 - w) * (1.0 - x), (1.0 - w) * x, w * (1.0 - x), w * x
    return clocked * (a * m0[part] + c * m1[part] + e * m2[part] + f * m3[part]) + (
        a * m0[part + 1] + c * m1[part + 1] + e * m2[part + 1] + f * m3[part + 1]
    )


@inlined
def _filled_node(filled):
    """Which node of the prompts' share `filled` lies behind, and how far towards the next."""
    j = min(int(filled * SHARES), SHARES - 1)
    return j, filled * SHARES - j


@inlined
def steps_of(fixed, draw, shift, k, b, rows, filled, share, clocks, pace):
    """Steps with `rows` of answers, of which a share reads prompts; each lasts as long as its slowest device.

    Args:
        fixed: `Generate`.
        draw: of what steps cost.
        shift: domain of the text.
        k: level of the experts per token.
        b: level of the routing bias, which steps that read prompts do not have.
        rows: at least 1.
        filled: share of the rows that are left which prompts take in such a step, 0 to 1.
        share: of these steps.
        clocks: float [D], clock fractions of the devices.
        pace: cap on the devices' busy share.
    """
    i, w = _node(rows)
    j, x = _filled_node(filled)
    pure, mixed = fixed.pure[draw, shift, k, b], fixed.mixed[draw, shift, k]
    pure_s = mixed_s = 0.0
    for d in range(clocks.shape[0]):
        compute = 1.0 / clocks[d]
        pure_s = max(pure_s, _pure(pure, i, w, d, 0, compute))
        if share > 0.0:
            mixed_s = max(mixed_s, _mixed(mixed, i, w, j, x, d, 0, compute))
    busy = pure_s + share * (mixed_s - pure_s)
    return Steps(busy / pace, busy, filled, share, mixed_s, pure_s, rows)


@inlined
def fill_energy(fixed, draw, shift, k, b, steps, count, clocks, energy):
    """Fill the energy above idle, float [D], that so many steps take on each device."""
    i, w = _node(steps.rows)
    j, x = _filled_node(steps.filled)
    pure, mixed = fixed.pure[draw, shift, k, b], fixed.mixed[draw, shift, k]
    for d in range(clocks.shape[0]):
        factor = 1.0 / clocks[d] * clock_power_factor(clocks[d])
        pure_j = _pure(pure, i, w, d, 2, factor)
        mixed_j = 0.0
        if steps.mixed_share > 0.0:
            mixed_j = _mixed(mixed, i, w, j, x, d, 2, factor)
        energy[d] = count * (pure_j + steps.mixed_share * (mixed_j - pure_j))


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
