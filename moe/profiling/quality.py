"""What a model answers here: quality under every shift, and how adaptation changes it.

Adaptation sees no labels. It looks at images of the same pool that is scored, as in service. Mixtures of two
states need no adaptation: the norms of both are mixed. What that misses is the error of
`moe.service.adaptation` on sequences in which the model really adapts.
Index letters as in `moe.profiles`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe import ttt
from moe.service.adaptation import adapt, answer_quality, second_share, start_unadapted, tabulate
from moe.service.score.runner import Runner
from moe.workload import Knobs

SCORE_BATCH = 1000
ADAPTED_STEPS = 64
"""Steps after which the model counts as adapted: less than a millionth of the old statistics is left."""
LONG_STEPS = 256
"""Steps after which it is scored again, for what the gradients do in the long run."""
MIXTURES = 6
"""Mixtures of each two states, evenly spaced in `moe.service.adaptation.mixture_position`."""
SEQUENCES = 4
SEGMENTS = 6
SEGMENT_STEPS = (0, 1, 2, 3, 5, 8, 12, 24, 48)
"""Sequences that the adaptation model is validated on: shifts in them, and steps that a shift may last."""


class Score(NamedTuple):
    """Means over samples of one shift."""

    accuracy: float
    confidence: float
    entropy: float
    tokens_per_expert: np.ndarray  # [L, E]


class Point(NamedTuple):
    """One measurement of a sequence: `steps` more adaptation steps on `shift`, then a score."""

    shift: int
    steps: int
    k: int
    """Index of the expert count of the score."""
    r: int
    """Index of its routing bias in `probed_biases`."""
    quality: tuple[float, float, float]


@dataclass(frozen=True)
class Quality:
    """Quality tables of a profile; the last axis of tables is accuracy, confidence, entropy."""

    pure: np.ndarray  # [S, Q, K, R, 3]
    mixed: np.ndarray | None  # [S, M, P, 3]
    expert_share: np.ndarray  # [K, R, L, E]
    long: np.ndarray | None
    """[S, 3] quality of each adapted state under its shift after `LONG_STEPS` instead."""
    sequences: list[list[Point]]


class Examiner:
    """Scores a runner's model and adapts it; every step sees the next images of the pool."""

    def __init__(self, runner: Runner, samples: int, seed: int, total: int, batch: int) -> None:
        """Start unadapted. Each of `total` scores is of the first `samples` of the pool `seed` shuffled."""
        runner.reset(seed)
        self._runner, self._samples, self._batch, self._taken = runner, samples, batch, 0
        self._own_k = runner.top_k
        self.bar = tqdm(total=total, desc="quality", unit="score", mininterval=1.0)

    def score(self, shift: int, expert_count: int | None = None, routing_bias: float = 0.0) -> Score:
        """Answer every sample once with the model as it is; the expert count defaults to its own."""
        runner, n = self._runner, self._samples
        knobs = Knobs(expert_count=expert_count or self._own_k, routing_bias=routing_bias)
        starts = range(0, n, self._batch)
        batches = [runner.launch([(first, min(first + self._batch, n))], shift, knobs) for first in starts]
        runner.synchronize()
        results = [batch.result() for batch in batches]
        self.bar.update()
        return Score(
            sum(int(r.correct.sum()) for r in results) / n,
            sum(r.confidence_sum for r in results) / n,
            sum(r.entropy_sum for r in results) / n,
            np.sum([r.tokens_per_expert for r in results], axis=0),
        )

    def adapt(self, shift: int, steps: int) -> None:
        """Take adaptation steps, unguarded, at the model's own expert count and without bias."""
        runner, adapter = self._runner, _adapter_of(self._runner)
        for _ in range(steps):
            index = (torch.arange(runner.adapt_batch, device=runner.device) + self._taken) % len(
                runner.samples
            )
            images, _ = runner.samples.take(shift, runner.order[index])
            adapter.method(runner.model, adapter.state, images, adapter.settings, self._own_k)
            self._taken += runner.adapt_batch

    def save(self) -> ttt.Saved:
        """Copy the state of the adaptation."""
        return _adapter_of(self._runner).snapshot()

    def restore(self, saved: ttt.Saved) -> None:
        """Put a state back."""
        _adapter_of(self._runner).restore(saved)


def measure_quality(
    runner: Runner,
    expert_counts: Sequence[int],
    routing_biases: Sequence[float],
    samples: int,
    seed: int,
    batch: int = SCORE_BATCH,
) -> Quality:
    """Score all states of the model under all shifts, and the mixtures of each two states.

    The model adapts at its own expert count and without bias. One that cannot adapt has one state.

    Args:
        runner: Model and pool; left unadapted.
        expert_counts: K expert counts.
        routing_biases: R biases.
        samples: Samples per score, drawn from the pool.
        seed: Draws them, and the sequences.
        batch: Samples answered at once.
    """
    shifts = range(len(runner.samples.shifts))
    n, cells = len(shifts), len(expert_counts) * len(routing_biases)
    total = n * cells
    if runner.adapts:
        total += n * (n * cells + 1) + n * (n + 1) // 2 * MIXTURES * n + (n > 1) * SEQUENCES * SEGMENTS * 3
    examiner = Examiner(runner, samples, seed, total, batch)

    def scores() -> list[list[list[Score]]]:
        return [
            [[examiner.score(shift, k, bias) for bias in routing_biases] for k in expert_counts]
            for shift in shifts
        ]  # [S][K][R]

    try:
        pure, mixed, long, sequences = [scores()], [], [], []  # [Q][S][K][R], [M][P][S], [S]
        if runner.adapts:
            states = [examiner.save()]
            for shift in shifts:
                examiner.restore(states[0])
                examiner.adapt(shift, ADAPTED_STEPS)
                states.append(examiner.save())
                pure.append(scores())
                examiner.adapt(shift, LONG_STEPS - ADAPTED_STEPS)
                long.append(examiner.score(shift)[:3])
            share = second_share(np.linspace(0.0, 1.0, MIXTURES + 2)[1:-1])  # [P]
            for first, second in itertools.combinations(states, 2):
                mixed.append([])
                for part in share:
                    examiner.restore(mix(first, second, float(part)))
                    mixed[-1].append([examiner.score(shift)[:3] for shift in shifts])
            rng = np.random.default_rng(seed)
            for _ in range(SEQUENCES if n > 1 else 0):
                examiner.restore(states[0])
                sequences.append(_play_sequence(examiner, rng, n, expert_counts, routing_biases))
    finally:
        examiner.bar.close()
        runner.reset(0)
    table = np.array([[[[s[:3] for s in row] for row in under] for under in state] for state in pure])
    load = np.array([[s.tokens_per_expert for s in row] for row in pure[0][0]])  # [K, R, L, E]
    return Quality(
        pure=np.swapaxes(table, 0, 1),
        mixed=np.moveaxis(np.array(mixed), 2, 0) if mixed else None,
        expert_share=load / load.sum(axis=-1, keepdims=True),
        long=np.array(long) if long else None,
        sequences=sequences,
    )


def mix(first: ttt.Saved, second: ttt.Saved, second_share: float) -> ttt.Saved:
    """State with the weighted mean of the parameters and statistics of two, and the rest of the first."""

    def mean(ours: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        return [
            torch.lerp(our, other, second_share) if our.is_floating_point() else our
            for our, other in zip(ours, others, strict=True)
        ]

    return replace(
        first,
        parameters=mean(first.parameters, second.parameters),
        statistics=mean(first.statistics, second.statistics),
    )


def _adapter_of(runner: Runner) -> ttt.Adapter:
    """Its adapter; `measure_quality` asks only where there is one."""
    assert runner.adapter is not None
    return runner.adapter


def _play_sequence(
    examiner: Examiner,
    rng: np.random.Generator,
    n_shifts: int,
    expert_counts: Sequence[int],
    routing_biases: Sequence[float],
) -> list[Point]:
    """Change the shift at random, adapt for a random time, and score before, midway and after."""
    biases = probed_biases(routing_biases)
    points, shift = [], -1
    for _ in range(SEGMENTS):
        shift = int(rng.choice([other for other in range(n_shifts) if other != shift]))
        steps = int(rng.choice(SEGMENT_STEPS))
        for more in (0, steps // 2, steps - steps // 2):
            examiner.adapt(shift, more)
            k, r = int(rng.integers(len(expert_counts))), int(rng.integers(len(biases)))
            quality = examiner.score(shift, expert_counts[k], biases[r])[:3]
            points.append(Point(shift, more, k, r, quality))
    return points


def probed_biases(routing_biases: Sequence[float]) -> list[float]:
    """Biases of sequences: those of the tables, and those midway between them."""
    return sorted([*routing_biases, *((low + high) / 2 for low, high in itertools.pairwise(routing_biases))])


def adaptation_error(
    quality: Quality, routing_biases: Sequence[float], own_k: int, rate: float | None
) -> dict[str, float] | None:
    """Error of `moe.service.adaptation` on the sequences that were played; None where nothing adapts.

    Args:
        quality: what was measured.
        routing_biases: R biases of the tables.
        own_k: index of the model's own expert count.
        rate: share of the state that one step replaces, see `moe.ttt.step_share`; None where nothing adapts.

    Returns:
        Root mean square and largest error of accuracy and confidence, and the number of points.
    """
    if quality.mixed is None or rate is None:
        return None
    probed = probed_biases(routing_biases)
    pure = np.apply_along_axis(lambda row: np.interp(probed, routing_biases, row), 3, quality.pure)
    tables = tabulate(pure, quality.mixed, own_k)
    weights = np.zeros(quality.pure.shape[1])
    errors = []
    for points in quality.sequences:
        start_unadapted(weights)
        for point in points:
            adapt(weights, point.shift, point.steps, rate)
            predicted = answer_quality(tables, weights, point.shift, point.k, point.r)
            errors.append(np.array(predicted) - point.quality)
    error = np.abs(np.array(errors).reshape(-1, 3))
    summary = {"points": float(len(error))}
    for column, name in enumerate(("accuracy", "confidence") if len(error) else ()):
        summary[f"{name}_rmse"] = round(float(np.sqrt((error[:, column] ** 2).mean())), 4)
        summary[f"{name}_max"] = round(float(error[:, column].max()), 4)
    return summary
