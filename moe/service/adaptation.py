"""What test-time training does to answers, as measured: a state of a few weights, and the quality it gives.

An adapting pass normalises by the batch's own statistics, so what a step adds to the running statistics
depends on its batch alone. The running statistics are therefore a weighted mean of those of the unadapted
model and of every shift it adapted to, and the weights are the state. A step on shift j replaces a share
`rate` (`moe.ttt.step_share`) of them by those of j:

    w_j -> 1 - (1 - w_j) (1 - rate),    w_i -> w_i (1 - rate) for all others.

So it is with the centre of `neo`, whose step moves the last norm's offset a share of the way to where it
takes the mean of the batch away. A bank puts the state of j in force and leaves the others behind: its rate
is 1. That the first batches of a shift tell little of its statistics is left out.

Quality under a shift is measured at every pure state and along the mixtures of any two. States between are
interpolated as in the study of mixtures (Scheffe, J. R. Stat. Soc. B 20, 1958): the mean of the pure
states, and for each pair what its mixture deviates from that, times the square of the pair's weight. This is
exact wherever at most two weights are not zero.

A mixture of i and l is placed at sqrt(w_l) / (sqrt(w_i) + sqrt(w_l)), in which its quality is smooth at both
ends: the larger variance rules until little of it is left.

Index letters: S shifts, Q = S + 1 pure states (unadapted, then adapted to each shift), M pairs of them in the
order of `itertools.combinations`, P measured and G tabulated points of a mixture, K expert counts, R routing
biases. The three qualities are accuracy, confidence and entropy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from moe.compiled import jit

GRID_POINTS = 17
NEGLIGIBLE = 1e-6
"""Weight below which a pure state is left out."""


@jit
def start_unadapted(weights):
    """Set the state, float [Q], to that of the unadapted model."""
    weights[:] = 0.0
    weights[0] = 1.0


@jit
def adapt(weights, shift, steps, rate):
    """Take `steps` adaptation steps on `shift`: updates the state, float [Q], in place."""
    kept = (1.0 - rate) ** steps
    for state in range(weights.shape[0]):
        weights[state] *= kept
    weights[shift + 1] += 1.0 - kept


@jit
def answer_quality(tables, weights, shift, k_index, b_index):
    """Quality of answers under `shift`.

    Args:
        tables: anything with `answer_pure` [S, Q, K, R, 3] and `answer_mixed` [S, M, G, 3], see `tabulate`.
        weights: the state, float [Q].
        shift: input shift in force.
        k_index: index of the expert count.
        b_index: index of the routing bias.

    Returns:
        (accuracy, confidence, entropy), each in [0, 1].
    """
    pure, mixed = tables.answer_pure, tables.answer_mixed
    states, last = weights.shape[0], mixed.shape[2] - 1
    accuracy, confidence, entropy = 0.0, 0.0, 0.0
    for i in range(states):
        weight = weights[i]
        if weight < NEGLIGIBLE:
            continue
        accuracy += weight * pure[shift, i, k_index, b_index, 0]
        confidence += weight * pure[shift, i, k_index, b_index, 1]
        entropy += weight * pure[shift, i, k_index, b_index, 2]
        for j in range(i + 1, states):
            if weights[j] < NEGLIGIBLE:
                continue
            pair = i * states - i * (i + 1) // 2 + j - i - 1
            position = last * mixture_position(weights[j] / weight)
            low = min(int(position), last - 1)
            scale = (weight + weights[j]) ** 2
            high = scale * (position - low)
            rest = scale - high
            accuracy += rest * mixed[shift, pair, low, 0] + high * mixed[shift, pair, low + 1, 0]
            confidence += rest * mixed[shift, pair, low, 1] + high * mixed[shift, pair, low + 1, 1]
            entropy += rest * mixed[shift, pair, low, 2] + high * mixed[shift, pair, low + 1, 2]
    return _unit(accuracy), _unit(confidence), _unit(entropy)


@jit
def mixture_position(ratio):
    """Place in [0, 1] of the mixture of two states with weights 1 : `ratio`."""
    return 1.0 - 1.0 / (1.0 + math.sqrt(ratio))


@jit
def _unit(value):
    return min(max(value, 0.0), 1.0)


class AnswerTables(NamedTuple):
    """What `answer_quality` reads."""

    answer_pure: np.ndarray
    """[S, Q, K, R, 3] quality of the pure states."""
    answer_mixed: np.ndarray
    """[S, M, G, 3] deviation of mixtures from the mean of their two states, by place."""


def second_share(position: np.ndarray) -> np.ndarray:
    """Weight of the second of two states in their mixture at a place, the inverse of `mixture_position`."""
    return position**2 / (position**2 + (1.0 - position) ** 2)


def tabulate(pure: np.ndarray, mixed: np.ndarray | None, own_k: int) -> AnswerTables:
    """Make tables of what was measured.

    Args:
        pure: quality of the pure states; Q is 1 where nothing adapts.  # [S, Q, K, R, 3]
        mixed: quality of their mixtures at P places evenly spaced inside of (0, 1), at expert count `own_k`
            and without bias; None where nothing adapts.  # [S, M, P, 3]
        own_k: index of that expert count.
    """
    if mixed is None:
        return AnswerTables(np.ascontiguousarray(pure), np.zeros((len(pure), 0, 2, 3)))
    first, second = np.triu_indices(pure.shape[1], 1)  # [M], in the order of itertools.combinations
    place = np.linspace(0.0, 1.0, mixed.shape[2] + 2)[1:-1]  # [P]
    own = pure[:, :, own_k, 0]  # [S, Q, 3]
    ends = own[:, first, None], own[:, second, None]  # [S, M, 1, 3] each
    measured = np.concatenate([ends[0], mixed, ends[1]], axis=2)
    grid = np.linspace(0.0, 1.0, GRID_POINTS)  # [G]
    share = second_share(grid)[:, None]  # [G, 1]
    # Of the quality and not of its deviation: it is monotone, mostly, and the interpolant then is too.
    curve = PchipInterpolator(np.r_[0.0, place, 1.0], measured, axis=2)(grid)  # [S, M, G, 3]
    deviation = curve - (1.0 - share) * ends[0] - share * ends[1]
    return AnswerTables(np.ascontiguousarray(pure), np.ascontiguousarray(deviation))
