"""The account of a live service's interval: what its batches gave, summed up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe.service.queueing import late_count, record_latencies
from moe.service.score.runner import Batch, BatchResult
from moe.workload import LATENCY_EDGES_S, Knobs


@dataclass
class InFlight:
    """A launched batch and the requests [first, last) of each class in it."""

    batch: Batch
    ranges: list[tuple[int, int]]
    heads: list[int]
    """Per class, a slot not later than the first request's."""
    knobs: Knobs
    """As asked for."""

    @property
    def size(self) -> int:
        """Requests in it."""
        return sum(last - first for first, last in self.ranges)


@dataclass
class Tally:
    """Sums of one interval."""

    answered: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    late: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    expired: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, np.int64))
    tokens_per_expert: np.ndarray | None = None
    correct: int = 0
    good: int = 0
    batches: int = 0
    fill: float = 0.0
    busy_s: float = 0.0
    ttt_busy_s: float = 0.0
    ttt_steps: int = 0
    ttt_refused: int = 0
    ttt_left_out: int = 0
    ttt_rolled_back: int = 0
    confidence: float = 0.0
    entropy: float = 0.0

    def add(
        self,
        flight: InFlight,
        result: BatchResult,
        completion: float,
        arrivals: np.ndarray,
        deadline_s: np.ndarray,
    ) -> None:
        """Account for a batch that is done.

        Args:
            flight: the batch.
            result: what it gave.
            completion: when its answers were there, on the service's clock.
            arrivals: int32 [2, slots + 1], cumulative arrivals.
            deadline_s: [2], per class.
        """
        position = 0
        for c, (first, last) in enumerate(flight.ranges):
            if last == first:
                continue
            late = late_count(arrivals, c, first, last, completion, deadline_s[c])
            record_latencies(arrivals, c, first, last, flight.heads[c], completion, self.histogram)
            self.answered[c] += last - first
            self.late[c] += late
            # A class's requests lie in order of arrival: the late ones are its first.
            self.good += int(result.correct[position + late : position + last - first].sum())
            position += last - first
        self.correct += int(result.correct.sum())
        self.confidence += result.confidence_sum
        self.entropy += result.entropy_sum
        self.batches += 1
        self.fill += flight.size / flight.knobs.batch_size
        self.busy_s += result.answer_s + result.ttt_s
        self.ttt_busy_s += result.ttt_s
        self.ttt_steps += result.ttt_steps
        self.ttt_left_out += result.ttt_left_out
        self.ttt_rolled_back += result.ttt_rolled_back
        load = result.tokens_per_expert
        self.tokens_per_expert = load if self.tokens_per_expert is None else self.tokens_per_expert + load

    def stats(self) -> dict[str, Any]:
        """The fields of `WorkStats` that these sums make."""
        answered, load = max(1, int(self.answered.sum())), self.tokens_per_expert
        return {
            "answered": tuple(self.answered.astype(float).tolist()),
            "late": tuple(self.late.astype(float).tolist()),
            "expired": tuple(self.expired.astype(float).tolist()),
            "correct": float(self.correct),
            "good": float(self.good),
            "batches": float(self.batches),
            "batch_fill": self.fill / max(1, self.batches),
            "busy_s": self.busy_s,
            "ttt_busy_s": self.ttt_busy_s,
            "ttt_steps": float(self.ttt_steps),
            "ttt_refused": float(self.ttt_refused),
            "ttt_left_out": float(self.ttt_left_out),
            "ttt_rolled_back": float(self.ttt_rolled_back),
            "confidence": self.confidence / answered,
            "entropy": self.entropy / answered,
            "load_imbalance": 0.0 if load is None else float((load.std(axis=-1) / load.mean(axis=-1)).mean()),
            "latency_histogram": self.histogram,
            "tokens_per_expert": load,
        }
