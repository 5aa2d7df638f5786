"""The account of an interval of the token service: who was answered, how soon, which tokens were right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe.lm.adapt import HeadCounters
from moe.service.generate.sequences import Counts, Finished
from moe.workload import LATENCY_EDGES_S, TPOT_EDGES_S, Knobs

_EDGES = LATENCY_EDGES_S, TPOT_EDGES_S, LATENCY_EDGES_S
"""Of the histograms of a tally."""


def _histogram() -> np.ndarray:
    return np.zeros(len(LATENCY_EDGES_S) + 1, np.int64)


@dataclass
class Tally:
    """Sums of one interval.

    Attributes:
        promises: Most time to first token, per output token, and to the last token, per class.  # [3, 2]
    """

    knobs: Knobs
    promises: np.ndarray
    answered: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    late: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    expired: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    histograms: list[np.ndarray] = field(default_factory=lambda: [_histogram() for _ in range(3)])
    """By time to first token, per output token, and to the last token."""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    several: int = 0
    """Answers of more than one token, which have a time per output token."""
    correct: float = 0.0
    good: float = 0.0
    good_tokens: int = 0
    steps: int = 0
    fill: float = 0.0
    busy_s: float = 0.0
    lessons: int = 0
    """Batches of prompts' rows that the model adapted to."""
    refused: int = 0
    """Steps of lessons that the budget could not pay."""
    ttt_busy_s: float = 0.0
    adapted: HeadCounters = field(default_factory=HeadCounters)

    def add(self, done: Finished) -> None:
        """Account for requests that are done."""
        times = np.stack([done.ttft_s, done.tpot_s, done.latency_s])  # [3, n]
        late = (times > self.promises[:, done.request_class]).any(axis=0)
        np.add.at(self.answered, done.request_class, 1)
        np.add.at(self.late, done.request_class, late)
        several = done.output > 1  # what one token takes is its time to first token
        counted = times[0], times[1, several], times[2]
        for histogram, edges, values in zip(self.histograms, _EDGES, counted, strict=True):
            np.add.at(histogram, np.searchsorted(edges, values, side="right"), 1)
        self.ttft_s += float(times[0].sum())
        self.tpot_s += float(times[1, several].sum())
        self.several += int(several.sum())
        share = done.right / done.output
        self.correct += float(share.sum())
        self.good += float(share[~late].sum())
        self.good_tokens += int(done.right[~late].sum())

    def stats(self, counts: Counts, tokens_per_expert: np.ndarray) -> dict[str, Any]:
        """The fields of `WorkStats` that these sums make.

        Args:
            counts: of the interval's tokens.
            tokens_per_expert: int64.  # [L, E]
        """
        tokens, load = max(1, counts.output_tokens), tokens_per_expert
        ttft, tpot, latency = self.histograms
        return {
            "answered": tuple(self.answered.astype(float).tolist()),
            "late": tuple(self.late.astype(float).tolist()),
            "expired": tuple(self.expired.astype(float).tolist()),
            "correct": self.correct,
            "good": self.good,
            "batches": float(self.steps),
            "batch_fill": self.fill / max(1, self.steps),
            "busy_s": self.busy_s,
            "ttt_busy_s": self.ttt_busy_s,
            "ttt_steps": float(self.adapted.steps),
            "ttt_refused": float(self.refused),
            "ttt_left_out": float(self.adapted.left_out),
            "ttt_rolled_back": float(self.adapted.rolled_back),
            "confidence": counts.confidence / tokens,
            "entropy": counts.entropy / tokens,
            "prefill_tokens": float(counts.prefill_tokens),
            "output_tokens": float(counts.output_tokens),
            "right_tokens": float(counts.right),
            "reference_tokens": float(counts.reference),
            "good_tokens": float(self.good_tokens),
            "ttft_s": self.ttft_s / max(1, self.answered.sum()),
            "tpot_s": self.tpot_s / max(1, self.several),
            "load_imbalance": float((load.std(axis=-1) / load.mean(axis=-1)).mean()) if load.any() else 0.0,
            "latency_histogram": latency,
            "ttft_histogram": ttft,
            "tpot_histogram": tpot,
            "tokens_per_expert": load,
        }
