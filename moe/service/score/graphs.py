"""Micro-batches as CUDA graphs: gathering, pass and sums in one launch, at sizes of a ladder.

A pass is hundreds of kernels. On an H200 the host takes 6 to 14 ms to launch them, by its mood, and the
device 11.5 ms to work off those of 2,048 images at one expert per token, 21 ms at four: the time of smaller
batches was the host's. A replay is one launch, with a copy of six numbers before it and one of the answers
behind it. A batch takes the graph of the next size on the ladder. The rows that fill it up reach no expert
and no sum.

* The ladder has four sizes per octave from 1,024 tokens (64 images, 8 chunks of 128 bytes) to 40,960, so that
  a batch fills up by a quarter at most. That costs the dense part of the pass: about 0.7 of the device's time
  at one expert per token, 0.4 at four and 0.25 at eight.
* Above the ladder the device takes 14 ms and more even at one expert per token: launches hide behind its
  work, and a graph would hold memory for nothing.
* There is one graph per size and number of experts per token k. A graph for all k would have room for the
  largest, eight rows per token. At k = 1 and 2,048 images of the base model (width 2,048) these are 262,144
  rows per layer to sort, and 1.1 GB for the tokens copied to them, where a graph of its own has 32,768 rows
  and 0.13 GB. The rows of no expert would not be computed, but they are launched: half a million blocks per
  layer that read where the rows end, and stop.
* The routing bias is a number that the graphs read.

All graphs share the memory of the largest (of the base model about 6 GB at k = 8, reckoned from its tensors)
and a stream: they run one after another, and a replay overwrites what the one before of the same graph gave.
Work on those answers that is launched before the next replay is safe.

Shapes: B rows of a graph, N samples of the pool.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.data.pools import SamplePool
from moe.model.transformer import MoEModel
from moe.service.score.answers import Answers, answer

LADDER_TOKENS = tuple(tokens for p in range(8, 14) for q in range(4, 8) if (tokens := q << p) <= 40_960)
"""Four sizes per octave, in tokens."""

Rows = Sequence[tuple[int, int]]
"""First request and number of requests of each part of a batch."""


class Records(Protocol):
    """Makes graphs, as `moe.model.graph.Recorder`."""

    def record(self, call: Any) -> tuple[Any, Answers]:
        """Record a call; returns what can `replay` it, and what it fills."""
        ...

    def reserved_bytes(self) -> int:
        """Memory taken so far."""
        ...


def ladder(tokens_per_sample: int) -> tuple[int, ...]:
    """Batch sizes of graphs, ascending, for requests of so many tokens."""
    return tuple(sorted({-(-tokens // tokens_per_sample) for tokens in LADDER_TOKENS}))


class AnswerGraphs:
    """Graphs of one model over one pool of samples.

    Attributes:
        sizes: The ladder, in requests.
        memory_bytes: What all graphs take, as torch counts it.
    """

    def __init__(self, model: MoEModel, samples: SamplePool, order: Tensor, recorder: Records) -> None:
        """Prepare to record; `capture` does.

        Args:
            model: In eval mode; its weights may change in place.
            samples: What the requests ask.
            order: Which sample a request asks, by its number modulo N; may change in place.  # [N]
            recorder: Makes the graphs.
        """
        self._model, self._samples, self._order, self._recorder = model, samples, order, recorder
        self.sizes = ladder(model.config.tokens_per_sample)
        self.memory_bytes = 0
        self._control = torch.zeros(6, dtype=torch.float64, device=order.device)  # of all graphs
        self._graphs: dict[tuple[int, int], tuple[Any, Answers]] = {}

    def capture(self, largest: int, expert_counts: Sequence[int]) -> None:
        """Record what batches of up to `largest` requests need that is not there yet, the largest first.

        Raises:
            OutOfMemoryError: What was recorded before stays.
        """
        sizes = self.sizes[: bisect_left(self.sizes, largest) + 1]
        wanted = {(size, k) for size in sizes for k in expert_counts} - self._graphs.keys()
        before = self._recorder.reserved_bytes()
        self.set([(0, largest)], 0, 0.0)
        for size, k in sorted(wanted, key=lambda form: (form[0] * form[1], form), reverse=True):
            self._graphs[size, k] = self._recorder.record(lambda size=size, k=k: self.step(size, k))
        self.memory_bytes += self._recorder.reserved_bytes() - before

    def size_of(self, n: int, expert_count: int) -> int | None:
        """Size of the graph for `n` requests; None where there is none."""
        place = bisect_left(self.sizes, n)
        size = self.sizes[place] if place < len(self.sizes) else None
        return size if (size, expert_count) in self._graphs else None

    def replay(self, size: int, expert_count: int) -> Answers:
        """Answer the batch that was `set`, in the memory of its graph: its next replay overwrites it."""
        graph, answers = self._graphs[size, expert_count]
        graph.replay()
        return answers

    def set(self, rows: Rows, shift: int, routing_bias: float) -> None:
        """Say what the next step answers; the device learns of it in the order of its stream.

        Args:
            rows: At most two parts, one per class.
            shift: Input shift.
            routing_bias: Pull to cheap experts.
        """
        (first, count), (second, more) = [*rows, *[(0, 0)] * (2 - len(rows))]
        control = [routing_bias, shift, first, count, second, count + more]
        host = torch.tensor(control, dtype=torch.float64)  # which holds numbers of requests exactly
        if self._control.is_cuda:
            host = host.pin_memory()  # or the host would wait for the copy
        self._control.copy_(host, non_blocking=True)

    def step(self, size: int, expert_count: int) -> Answers:
        """Gather, answer and sum up what was `set`, filled up to `size` rows; waits for no device."""
        routing_bias = self._control[0].float()
        shift, first, count, second, n = self._control[1:].long().unbind()
        row = torch.arange(size, device=self._control.device)  # [B]
        number = row + torch.where(row < count, first, second - count)
        index = self._order[number % len(self._order)]
        inputs, targets = self._samples.take(shift, index)
        return Answers.of(inputs, targets, answer(self._model, inputs, expert_count, routing_bias, n), n)
