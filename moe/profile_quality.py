"""What a model answers here: quality under every shift, before and after adaptation, and its speed.

Adaptation sees no labels. It looks at images of the same pool that is scored, as in service.
Index letters as in `moe.profiles`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import curve_fit
from tqdm import tqdm

from moe import ttt
from moe.runner import ADAPT_BATCH, Runner
from moe.workload import Knobs

SCORE_BATCH = 1000
CURVE_STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Adaptation steps after which accuracy is measured; the last are taken as adapted."""
LEAST_GAIN = 0.01
"""Gain of accuracy below which a shift's adaptation has no rate: noise would set it."""


@dataclass(frozen=True)
class Quality:
    """Quality tables of a profile."""

    accuracy: np.ndarray  # [S, K, R, 2]
    confidence: np.ndarray  # [S, K, R, 2]
    entropy: np.ndarray  # [S, K, R, 2]
    expert_share: np.ndarray  # [K, R, L, E]
    adapt_rate: np.ndarray  # [S]
    carry_over: float
    curve: np.ndarray
    """[S, steps] accuracy after `CURVE_STEPS` at the model's own expert count; empty without adaptation."""


@dataclass(frozen=True)
class Score:
    """Means over samples of one shift."""

    accuracy: float
    confidence: float
    entropy: float
    tokens_per_expert: np.ndarray  # [L, E]


def score(runner: Runner, shift: int, expert_count: int, routing_bias: float, samples: int) -> Score:
    """Answer the first `samples` of the shuffled pool once each, with the model as it is."""
    knobs = Knobs(expert_count=expert_count, routing_bias=routing_bias)
    starts = range(0, samples, SCORE_BATCH)
    batches = [runner.launch([(first, min(first + SCORE_BATCH, samples))], shift, knobs) for first in starts]
    runner.synchronize()
    results = [batch.result() for batch in batches]
    return Score(
        sum(int(r.correct.sum()) for r in results) / samples,
        sum(r.confidence_sum for r in results) / samples,
        sum(r.entropy_sum for r in results) / samples,
        np.sum([r.tokens_per_expert for r in results], axis=0),
    )


def measure_quality(
    runner: Runner, expert_counts: Sequence[int], routing_biases: Sequence[float], samples: int, seed: int
) -> Quality:
    """Score every shift, expert count and bias, before and after adaptation to the shift.

    The model adapts at its own expert count and without bias. A model that cannot adapt is scored once.

    Args:
        runner: Model and pool; left unadapted.
        expert_counts: K expert counts.
        routing_biases: R biases.
        samples: Samples per score, drawn from the pool.
        seed: Draws them.
    """
    shifts, own_k = range(len(runner.samples.shifts)), runner.model.config.top_k
    n_cells = len(shifts) * len(expert_counts) * len(routing_biases)
    n_adapted = n_cells + len(shifts) * (len(CURVE_STEPS) + len(shifts)) if runner.adapts else 0
    with tqdm(total=n_cells + n_adapted, desc="quality", unit="score", mininterval=1.0) as bar:

        def scored(shift: int, k: int = own_k, bias: float = 0.0) -> Score:
            bar.update()
            return score(runner, shift, k, bias, samples)

        def table(shift: int) -> list[list[Score]]:
            return [[scored(shift, k, bias) for bias in routing_biases] for k in expert_counts]  # [K][R]

        runner.reset(seed)
        before = [table(shift) for shift in shifts]  # [S][K][R]
        after, curve, transfer = before, [], []
        if runner.adapts:
            after = []
            for shift in shifts:
                runner.reset(seed)
                accuracy = []
                for taken, steps in itertools.pairwise((0, *CURVE_STEPS)):
                    adapt(runner, shift, own_k, taken, steps)
                    accuracy.append(scored(shift).accuracy)
                curve.append(accuracy)
                after.append(table(shift))
                transfer.append([scored(other).accuracy for other in shifts])
    runner.reset(0)
    curve = np.array(curve).reshape(-1, len(CURVE_STEPS))  # [S, steps]

    def tables(name: str) -> np.ndarray:
        sides = [[[[getattr(s, name) for s in row] for row in t] for t in side] for side in (before, after)]
        return np.moveaxis(np.array(sides), 0, -1)  # [S, K, R, 2]

    load = np.array([[s.tokens_per_expert for s in row] for row in before[0]])  # [K, R, L, E]
    return Quality(
        accuracy=tables("accuracy"),
        confidence=tables("confidence"),
        entropy=tables("entropy"),
        expert_share=load / load.sum(axis=-1, keepdims=True),
        adapt_rate=np.array([adapt_rate(row) for row in curve]) if runner.adapts else np.zeros(len(shifts)),
        carry_over=carry_over(curve[:, 0], np.array(transfer)) if runner.adapts else 0.0,
        curve=curve,
    )


def adapt(runner: Runner, shift: int, expert_count: int, taken: int, steps: int) -> None:
    """Take adaptation steps number `taken` to `steps`, each on the next images of the pool."""
    n = len(runner.samples)
    for step in range(taken, steps):
        index = (torch.arange(ADAPT_BATCH, device=runner.device) + step * ADAPT_BATCH) % n
        images, _ = runner.samples.take(shift, runner.order[index])
        ttt.adapt(runner.model, runner.optimizer, images, expert_count)


def adapt_rate(curve: np.ndarray) -> float:
    """Fit the share of the remaining gain that one step brings: gain(n) = total * (1 - (1 - rate)^n).

    Args:
        curve: accuracy after `CURVE_STEPS`.  # [steps]

    Returns:
        The rate, 0 where adaptation gains less than `LEAST_GAIN`.
    """
    gain = curve - curve[0]
    if gain[-1] < LEAST_GAIN:
        return 0.0
    steps = np.array(CURVE_STEPS, np.float64)

    def remaining(n: np.ndarray, total: float, rate: float) -> np.ndarray:
        return total * (1.0 - (1.0 - rate) ** n)

    fitted, _ = curve_fit(remaining, steps, gain, p0=(gain[-1], 0.1), bounds=((0.0, 1e-4), (1.0, 1.0)))
    return float(fitted[1])


def carry_over(unadapted: np.ndarray, adapted: np.ndarray) -> float:
    """Share of a shift's gain that adaptation to another shift already brings, over all pairs.

    Args:
        unadapted: accuracy under each shift.  # [S]
        adapted: accuracy under shift j of the model adapted to shift i.  # [S, S]

    Returns:
        Gains under other shifts over gains under one's own; 0 where no shift gains `LEAST_GAIN`.
    """
    gain = adapted - unadapted  # [S, S]
    own = np.diag(gain)
    counted = own >= LEAST_GAIN
    if not counted.any():
        return 0.0
    others = gain.sum(axis=0) - own  # [S]
    return float(others[counted].sum() / (own[counted].sum() * (len(own) - 1)))
