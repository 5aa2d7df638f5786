"""One micro-batch on the device: gather, answer, score, adapt.

`Runner.launch` returns before a CUDA device is done, so that the next batch can be queued behind; on a CPU it
returns when all is done. Nothing in between makes the host wait, and one small array per batch comes back.
On CUDA the product's own models answer by CUDA graphs once these are captured (`moe.service.score.graphs`).
Shapes: B requests of a batch, L layers, E experts, N samples of the pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.data.pools import SamplePool
from moe.device.torch_device import one_thread_on_cpu
from moe.errors import ThermoeError
from moe.model.graph import Recorder
from moe.model.transformer import ModelOutput, MoEModel
from moe.service.score.answers import Answers, answer, in_context
from moe.service.score.graphs import AnswerGraphs, Rows
from moe.ttt import Adapter
from moe.workload import Knobs

ADAPT_BATCH = {"cpu": 64, "cuda": 256}
"""Most images of a micro-batch that an adaptation step looks at, by type of device.

As the shipped profiles were measured (`batch` of the adaptation in their provenance). Four times as many cost
four times the work on a small device and adapt no further.
"""


class NonFiniteAnswersError(ThermoeError):
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
    ttt_steps: int = 0
    """Adaptation steps taken and kept."""
    ttt_left_out: int = 0
    """Adaptation steps asked for that were not taken, or not kept."""
    ttt_rolled_back: int = 0
    """Returns of the model to an earlier state."""


class Batch:
    """A micro-batch that was launched on a CPU, hence done."""

    def __init__(
        self,
        packed: Tensor,
        size: int,
        n_layers: int,
        marks: list[Any],
        clock: Callable[[], float],
        adaptation: tuple[int, int, int] = (0, 0, 0),
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        """Take in a batch that was launched.

        Args:
            packed: what `pack` gave.
            size: requests.
            n_layers: layers of experts.
            marks: marks at its start, at its answers and behind its adaptation.
            clock: of the runner.
            adaptation: the last three of `BatchResult`.
            again: restores the model and answers the batch again, should its answers be no numbers.
        """
        self._packed, self._size, self._n_layers, self._marks = packed, size, n_layers, marks
        self._clock, self._adaptation, self._again = clock, adaptation, again
        self._redone: tuple[float, float] | None = None  # when the answers were given again, and for how long

    def done(self) -> bool:
        """Whether the device is free of this batch."""
        return True

    @property
    def answered_at(self) -> float:
        """Clock reading at which the answers were there; known when done."""
        return self._redone[0] if self._redone else self._first_answered_at()

    @property
    def freed_at(self) -> float:
        """Clock reading at which the adaptation was over too; known when done."""
        return self._redone[0] if self._redone else self._first_freed_at()

    def result(self) -> BatchResult:
        """Read what came back; only when done, and before the two times are read.

        Raises:
            NonFiniteAnswersError: an answer is not a number, and no adaptation can be undone.
        """
        if self._again is not None and not self._is_finite():
            began, self._packed, self._again = self._clock(), self._again(), None
            ended = self._clock()
            self._redone = ended, ended - began
        n = self._size
        (confidence, entropy), load, correct = np.split(self._packed.numpy(), [2, len(self._packed) - n])
        if not self._is_finite():
            raise NonFiniteAnswersError(
                f"a batch of {n} requests was answered with numbers that are not finite "
                f"(confidence sum {confidence}, entropy sum {entropy}); reset to undo the adaptation, or "
                "restore the weights"
            )
        answer_s, ttt_s = self._durations()
        steps, left_out, rolled_back = self._adaptation
        return BatchResult(
            correct.astype(bool), float(confidence), float(entropy),
            load.astype(np.int64).reshape(self._n_layers, -1),
            answer_s + (self._redone[1] if self._redone else 0.0), ttt_s, steps, left_out,
            rolled_back + (self._redone is not None),
        )  # fmt: skip

    def _is_finite(self) -> bool:
        return bool(torch.isfinite(self._packed[:2]).all())

    def _first_answered_at(self) -> float:
        return self._marks[1]

    def _first_freed_at(self) -> float:
        return self._marks[2]

    def _durations(self) -> tuple[float, float]:
        start, answered, freed = self._marks
        return answered - start, freed - answered


class CudaBatch(Batch):
    """A micro-batch under way on a CUDA device; its marks are events."""

    _answered_seen = _freed_seen = float("inf")

    def done(self) -> bool:
        """Whether the device is free of this batch. Completion is noted when seen: ask often."""
        _, answered, freed = self._marks
        if self._answered_seen == float("inf") and answered.query():
            self._answered_seen = self._clock()
        if self._freed_seen == float("inf") and freed.query():
            self._freed_seen = self._clock()
        return self._freed_seen < float("inf")

    def _first_answered_at(self) -> float:
        # The host may have been held up while the answers came: then the time since tells better.
        return min(self._answered_seen, self._freed_seen - self._durations()[1])

    def _first_freed_at(self) -> float:
        return self._freed_seen

    def _durations(self) -> tuple[float, float]:
        start, answered, freed = self._marks
        return start.elapsed_time(answered) / 1e3, answered.elapsed_time(freed) / 1e3


class Runner:
    """A model, its requests' samples and its adaptation, on one device.

    A runner of other models (`moe.hf.runner`) says itself what it is made of and how it answers.

    Attributes:
        model: What answers.
        samples: What the requests ask.
        device: Where both are.
        adapter: Its adaptation; None where it has none.
        order: Which sample a request asks, by its number modulo N.  # [N]
    """

    def __init__(
        self,
        model: MoEModel,
        samples: SamplePool,
        device: torch.device | str,
        clock: Callable[[], float] = time.perf_counter,
        adapter: Adapter | None = None,
    ) -> None:
        """Prepare to serve `samples` with `model`, both on `device`.

        A model adapts by `adapter`; without one, a model with batch norms by guarded TENT on its norms.
        For the whole process, on CUDA this turns cuDNN's attention off, and on a CPU it keeps torch to one
        thread.
        """
        self.model = model
        one_thread_on_cpu(torch.device(device))
        if adapter is None and model.config.norm == "batch":
            adapter = Adapter(model)
        self.adapter = adapter
        self._start(samples, device, clock)
        if self.device.type == "cuda":
            self._graphs = AnswerGraphs(model, samples, self.order, Recorder(self.device))

    def _start(self, samples: SamplePool, device: torch.device | str, clock: Callable[[], float]) -> None:
        """Take in what does not depend on the model, which is there by now."""
        self.samples, self.device, self._clock = samples, torch.device(device), clock
        if self.device.type == "cuda":
            # cuDNN's attention plans anew for every batch size, which takes longer than the batch, and a
            # service under changing load meets a new size most of the time.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._graphs: AnswerGraphs | None = None
        self.order = torch.empty(len(samples), dtype=torch.int64, device=self.device)  # [N]
        self.reset(0)

    @property
    def captured(self) -> bool:
        """Whether batches are answered by CUDA graphs, once they are captured."""
        return self._graphs is not None

    def replays(self, n: int, expert_count: int) -> bool:
        """Whether `n` requests are answered by a CUDA graph, in one launch."""
        return self._graphs is not None and self._graphs.size_of(n, expert_count) is not None

    @property
    def graph_memory_bytes(self) -> int:
        """Memory of the device that the graphs hold."""
        return 0 if self._graphs is None else self._graphs.memory_bytes

    def capture(self, largest: int, expert_counts: Sequence[int]) -> None:
        """Capture CUDA graphs for batches of up to `largest` requests, where this runner serves by them.

        Takes seconds, and memory of about what the largest of them needs. Batches of which there is no graph
        are launched kernel by kernel: nothing is captured while a service runs.

        Args:
            largest: Most requests of a batch; graphs end at a size of their own (`graphs.LADDER_TOKENS`).
            expert_counts: Experts per token to come.
        """
        if self._graphs is not None:
            self._graphs.capture(largest, expert_counts)

    @property
    def adapts(self) -> bool:
        """Whether the model can adapt."""
        return self.adapter is not None

    @property
    def adapt_batch(self) -> int:
        """Most images of a micro-batch that an adaptation step looks at."""
        return ADAPT_BATCH[self.device.type]

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return self.model.config.n_experts

    @property
    def top_k(self) -> int:
        """Experts per token that the model was made for."""
        return self.model.config.top_k

    @property
    def top_k_choices(self) -> tuple[int, ...]:
        """Numbers of experts per token to measure, ascending."""
        return self.model.config.top_k_choices

    def reset(self, seed: int) -> None:
        """Undo all adaptation and draw anew which request asks which sample."""
        self.synchronize()
        if self.adapter is not None:
            self.adapter.reset()
        # In place: graphs read it.
        self.order.copy_(torch.randperm(len(self.order), generator=torch.Generator().manual_seed(seed)))

    def launch(self, ranges: Sequence[tuple[int, int]], shift: int, knobs: Knobs) -> Batch:
        """Start a micro-batch of the requests numbered [first, last), one range per class.

        Args:
            ranges: request numbers; classes read the shuffled pool from different places.
            shift: input shift in force.
            knobs: `expert_count`, `routing_bias` and `ttt_steps` are used.
        """
        adapter = self.adapter
        rolled_back = 0 if adapter is None else adapter.counters.rollbacks
        can_undo = adapter is not None and adapter.guard is not None and adapter.adapted
        marks = [self._mark()]
        answers, packed = self._answer(ranges, shift, knobs)
        marks.append(self._mark())
        steps = self.adapt(answers.inputs, answers.logits, knobs) if knobs.ttt_steps else 0
        marks.append(self._mark())
        now_rolled_back = 0 if adapter is None else adapter.counters.rollbacks

        def again() -> Tensor:
            """Answer again from a restored model; a step since may have restored it already."""
            assert adapter is not None
            if adapter.counters.rollbacks == rolled_back:
                adapter.rescue()
            packed = self._answer(ranges, shift, knobs)[1]
            self.synchronize()
            return packed

        kind = CudaBatch if self.device.type == "cuda" else Batch
        return kind(
            packed, len(answers.inputs), answers.n_layers, marks, self._clock,
            (steps, knobs.ttt_steps - steps, now_rolled_back - rolled_back), again if can_undo else None,
        )  # fmt: skip

    @torch.no_grad()
    def _answer(self, ranges: Sequence[tuple[int, int]], shift: int, knobs: Knobs) -> tuple[Answers, Tensor]:
        """Answer requests; returns answers, and what the host wants of them, on its way there."""
        rows, graphs, k = self._rows(ranges), self._graphs, knobs.expert_count
        n = sum(count for _, count in rows)
        size = None if graphs is None else graphs.size_of(n, k)
        if graphs is None or size is None:
            inputs, targets = self.samples.take(shift, self._sample_index(rows))
            answers = Answers.of(inputs, targets, self.answer(inputs, k, knobs.routing_bias))
        else:
            graphs.set(rows, shift, knobs.routing_bias)
            answers = graphs.replay(size, k).first(n)
        # A copy in any case: the next replay overwrites the graph's own.
        return answers, answers.packed.to("cpu", non_blocking=True, copy=True)

    def answer(self, inputs: Tensor, expert_count: int, routing_bias: float) -> ModelOutput:
        """Answer requests kernel by kernel, see `moe.service.score.answers.answer`."""
        return answer(self.model, inputs, expert_count, routing_bias)

    def adapt(self, inputs: Tensor, answers: Tensor, knobs: Knobs) -> int:
        """Take `ttt_steps` adaptation steps on the first `adapt_batch` inputs; returns how many were kept.

        Args:
            inputs: inputs already answered.  # [B, ...]
            answers: logits that they got.  # [B, C]
            knobs: `expert_count`, `routing_bias` and `ttt_steps` are used.
        """
        if self.adapter is None:
            raise ValueError(f"this {self.samples.task} model has no adaptation; set ttt_steps to 0")
        inputs = inputs if self.samples.task == "vision" else in_context(self.model, inputs)
        return self.adapter.adapt(
            inputs[: self.adapt_batch], answers[: self.adapt_batch], knobs.ttt_steps, knobs.expert_count,
            knobs.routing_bias,
        )  # fmt: skip

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _rows(self, ranges: Sequence[tuple[int, int]]) -> Rows:
        """Where the requests of each class lie in the order, before it repeats, and how many they are."""
        starts = [c * len(self.samples) // len(ranges) for c in range(len(ranges))]
        return [(first + start, last - first) for (first, last), start in zip(ranges, starts, strict=True)]

    def _sample_index(self, rows: Rows) -> Tensor:
        parts = [torch.arange(first, first + count, device=self.device) for first, count in rows if count]
        return self.order[torch.cat(parts) % len(self.samples)]  # [B]

    def _mark(self) -> Any:
        """Mark this place in the device's work: a clock reading on a CPU, an event on CUDA."""
        if self.device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
