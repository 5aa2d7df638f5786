"""One micro-batch on the device: gather, answer, score, adapt.

`Runner.launch` returns before a CUDA device is done, so that the next batch can be queued behind; on a CPU it
returns when all is done. Nothing in between makes the host wait, and one small array per batch comes back.
Shapes: B requests of a batch, L layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe import ttt
from moe.model import ModelOutput, MoEModel
from moe.samples import SamplePool
from moe.workload import Knobs

# As the shipped profiles were measured: 256 on the H100, 64 on a CPU (`adapt_batch` in their provenance).
ADAPT_BATCH = 256 if torch.cuda.is_available() else 64
"""Most images of a micro-batch that an adaptation step looks at, the size common in the literature.

Four times as many cost four times the work on a small device and adapt no further.
"""


class NonFiniteAnswersError(RuntimeError):
    """The model's answers are not numbers."""


@dataclass(frozen=True)
class BatchResult:
    """What a micro-batch gave."""

    correct: np.ndarray
    """bool [B], in the order of the requests."""
    confidence_sum: float
    entropy_sum: float
    tokens_per_expert: np.ndarray
    """int64 [L, E]"""
    answer_s: float
    """Device time of the answers."""
    ttt_s: float
    """Device time of the adaptation after them."""


class Batch:
    """A micro-batch that was launched on a CPU, hence done."""

    def __init__(self, packed: Tensor, size: int, n_layers: int, marks: list[float]) -> None:
        self._packed, self._size, self._n_layers, self._marks = packed, size, n_layers, marks

    def done(self) -> bool:
        """Whether the device is free of this batch."""
        return True

    @property
    def answered_at(self) -> float:
        """Clock reading at which the answers were there; known when done."""
        return self._marks[1]

    @property
    def freed_at(self) -> float:
        """Clock reading at which the adaptation was over too; known when done."""
        return self._marks[2]

    def result(self) -> BatchResult:
        """Read what came back; only when done.

        Raises:
            NonFiniteAnswersError: an answer is not a number.
        """
        packed, n = self._packed.numpy(), self._size
        correct, (confidence, entropy), load = np.split(packed, [n, n + 2])
        if not np.isfinite(confidence + entropy):
            raise NonFiniteAnswersError(
                f"a batch of {n} requests was answered with numbers that are not finite "
                f"(confidence sum {confidence}, entropy sum {entropy}); reset to undo the adaptation, or "
                "restore the weights"
            )
        return BatchResult(
            correct.astype(bool), float(confidence), float(entropy),
            load.astype(np.int64).reshape(self._n_layers, -1), *self._durations(),
        )  # fmt: skip

    def _durations(self) -> tuple[float, float]:
        start, answered, freed = self._marks
        return answered - start, freed - answered


class CudaBatch(Batch):
    """A micro-batch under way on a CUDA device."""

    def __init__(
        self,
        packed: Tensor,
        size: int,
        n_layers: int,
        events: list[torch.cuda.Event],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(packed, size, n_layers, [])
        self._events, self._clock = events, clock
        self._answered_seen = self._freed_seen = float("inf")

    def done(self) -> bool:
        """Whether the device is free of this batch. Completion is noted when seen: ask often."""
        _, answered, freed = self._events
        if self._answered_seen == float("inf") and answered.query():
            self._answered_seen = self._clock()
        if self._freed_seen == float("inf") and freed.query():
            self._freed_seen = self._clock()
        return self._freed_seen < float("inf")

    @property
    def answered_at(self) -> float:
        """Clock reading at which the answers were there; known when done."""
        # The host may have been held up while the answers came: then the time since tells better.
        return min(self._answered_seen, self._freed_seen - self._durations()[1])

    @property
    def freed_at(self) -> float:
        """Clock reading at which the adaptation was over too; known when done."""
        return self._freed_seen

    def _durations(self) -> tuple[float, float]:
        start, answered, freed = self._events
        return start.elapsed_time(answered) / 1e3, answered.elapsed_time(freed) / 1e3


class Runner:
    """A model, its requests' samples and its adaptation, on one device.

    Attributes:
        model: What answers.
        samples: What the requests ask.
        device: Where both are.
        adapts: Whether the model has batch norms to adapt.
        optimizer: Of the adaptation, where there is one.
        order: Which sample a request asks, by its number modulo N.  # [N]
    """

    def __init__(
        self,
        model: MoEModel,
        samples: SamplePool,
        device: torch.device | str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare to serve `samples` with `model`, both on `device`; a model with batch norms can adapt.

        For the whole process, on CUDA this turns cuDNN's attention off, and on a CPU it sets torch to one
        thread: the models for a CPU are so small that more threads gain nothing, and cost a thousandfold
        where another process holds one of the cores.
        """
        self.model, self.samples, self.device = model, samples, torch.device(device)
        self._clock = clock
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        else:
            # cuDNN's attention plans anew for every batch size, which takes longer than the batch, and a
            # service under changing load meets a new size most of the time.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.adapts = model.config.norm == "batch"
        if self.adapts:
            self.optimizer = ttt.make_optimizer(ttt.configure(model))
            self._unadapted = ttt.snapshot(model, self.optimizer)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Undo all adaptation and draw anew which request asks which sample."""
        self.synchronize()
        if self.adapts:
            ttt.restore(self.model, self.optimizer, self._unadapted)
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(seed))
        self.order = order.to(self.device)  # [N]

    def launch(self, ranges: Sequence[tuple[int, int]], shift: int, knobs: Knobs) -> Batch:
        """Start a micro-batch of the requests numbered [first, last), one range per class.

        Args:
            ranges: request numbers; classes read the shuffled pool from different places.
            shift: input shift in force.
            knobs: `expert_count`, `routing_bias` and `ttt_steps` are used; one image is too few to adapt to.
        """
        marks = [self._mark()]
        with torch.no_grad():
            inputs, targets = self.samples.take(shift, self._sample_index(ranges))
            output = self.answer(inputs, knobs.expert_count, knobs.routing_bias)
            packed = pack(output, targets).to("cpu", non_blocking=True)
        marks.append(self._mark())
        if knobs.ttt_steps and len(inputs) > 1:
            self.adapt(inputs[:ADAPT_BATCH], knobs)
        marks.append(self._mark())
        if self.device.type == "cuda":
            return CudaBatch(packed, len(inputs), len(output.routing), marks, self._clock)
        return Batch(packed, len(inputs), len(output.routing), marks)

    def answer(self, inputs: Tensor, expert_count: int, routing_bias: float) -> ModelOutput:
        """Answer requests: one row of logits each, for language those of the byte after the chunk."""
        if self.samples.task == "vision":
            return self.model(inputs, expert_count, routing_bias)
        output = self.model(inputs[:, -self.model.config.context_length :], expert_count, routing_bias)
        return replace(output, logits=output.logits[:, -1])  # [B, S, C] -> [B, C]

    def adapt(self, images: Tensor, knobs: Knobs) -> None:
        """Take `ttt_steps` adaptation steps on images already answered."""
        for _ in range(knobs.ttt_steps):
            ttt.adapt(self.model, self.optimizer, images, knobs.expert_count, knobs.routing_bias)

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _sample_index(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        n = len(self.samples)
        starts = [c * n // len(ranges) for c in range(len(ranges))]
        parts = [
            torch.arange(first + start, last + start, device=self.device)
            for (first, last), start in zip(ranges, starts, strict=True)
            if last > first
        ]
        return self.order[torch.cat(parts) % n]  # [B]

    def _mark(self) -> Any:
        """Mark this place in the device's work: a clock reading on a CPU, an event on CUDA."""
        if self.device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def pack(output: ModelOutput, targets: Tensor) -> Tensor:
    """Join what the host wants of a batch in one array, in few launches: they are a small batch's time.

    Args:
        output: Answers, one row of logits each.
        targets: Right answers.  # [B]

    Returns:
        Flags of right answers, sums of confidence and entropy, tokens per expert of each layer, all in
        float64, which holds flags and counts exactly.  # [B + 2 + L * E]
    """
    log_p = output.logits.log_softmax(dim=-1)  # [B, C]
    confidence = log_p.amax(dim=-1).exp().sum()
    entropy = (log_p.exp() * log_p).sum() / -math.log(log_p.shape[-1])
    sums = torch.stack([confidence, entropy]).double()
    return torch.cat([output.predictions == targets, sums, output.tokens_per_expert.flatten()])
