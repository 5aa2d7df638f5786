"""A forward pass captured once as a CUDA graph and replayed under other knobs.

Launching the hundreds of kernels of a small batch takes the host longer than the device needs for them; a
replay is one launch. What a policy changes between batches (routing bias, experts per token, cost per expert)
lives in device tensors that the graph reads, so no knob needs a capture of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from moe.model.router import check_bias, check_cost_shape
from moe.model.transformer import ModelOutput, MoEModel

Result = TypeVar("Result")


class Recorder:
    """Records calls as CUDA graphs that share their memory, so that they must not run at the same time.

    Recorded from the largest to the smallest they take little more than the largest alone.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Make an empty pool of memory.

        Raises:
            ValueError: The device is none of CUDA's.
        """
        self._device = torch.device(device)
        if self._device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, got {self._device}")
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def reserved_bytes(self) -> int:
        """Memory that torch has taken on the device, without what it could give back."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def record(self, call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Record a call, which is made twice; returns the graph and what it fills at each replay.

        Args:
            call: Launches work and never waits for it. What it reads may change in place afterwards. It is
                run without gradients; the first time eagerly, which compiles and chooses kernels.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            call()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = call()
        return graph, result


class RoutingControls:
    """The knobs of routing as tensors on the model's device, checked on the host when they are set.

    Attributes:
        routing_bias: Float32, 0-dim.
        top_k: int64, 0-dim.
        expert_cost: Float32.  # [E]
    """

    def __init__(self, model: MoEModel) -> None:
        device = model.expert_cost.device
        self._max_top_k = model.config.top_k_choices[-1]
        self.routing_bias = torch.zeros((), device=device)
        self.top_k = torch.tensor(model.config.top_k, device=device)
        self.expert_cost = model.expert_cost.clone()

    def set(
        self, top_k: int | None = None, routing_bias: float | None = None, expert_cost: Tensor | None = None
    ) -> None:
        """Change what is given; a CUDA device sees it in the order of its stream.

        Raises:
            ValueError: A value is not a number, out of range, or a cost table is of another model.
        """
        if top_k is not None and not 1 <= top_k <= self._max_top_k:
            raise ValueError(f"top_k must be within 1..{self._max_top_k}, got {top_k}")
        if routing_bias is not None:
            check_bias(routing_bias)
        if expert_cost is not None:
            check_cost_shape(expert_cost, self.expert_cost.numel())
            if not ((expert_cost >= 0) & (expert_cost <= 1)).all():  # NaN too
                raise ValueError(f"expert_cost must lie in [0, 1], got {expert_cost.tolist()}")
        if top_k is not None:
            self.top_k.fill_(top_k)
        if routing_bias is not None:
            self.routing_bias.fill_(routing_bias)
        if expert_cost is not None:
            self.expert_cost.copy_(expert_cost)


class CapturedModel:
    """A model's forward pass over one batch size, as a CUDA graph."""

    def __init__(self, model: MoEModel, inputs: Tensor) -> None:
        """Capture the pass over batches shaped as ``inputs``; the model must be in eval mode.

        Args:
            model: On a CUDA device; its weights may change in place afterwards, not its shape.
            inputs: An example batch.  # [B, ...]

        Raises:
            ValueError: The inputs are not on a CUDA device.
        """
        recorder = Recorder(inputs.device)
        self.controls = RoutingControls(model)
        self._inputs = inputs.clone()
        self._graph, self._output = recorder.record(lambda: self._run(model))

    def __call__(self, inputs: Tensor) -> ModelOutput:
        """Answer a batch under the controls as they stand.

        The output is the graph's own memory: the next call overwrites it.

        Raises:
            ValueError: The batch has another shape than the captured one.
        """
        if inputs.shape != self._inputs.shape:
            raise ValueError(
                f"captured for inputs of shape {tuple(self._inputs.shape)}, got {tuple(inputs.shape)}; "
                "capture one graph per shape"
            )
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._output

    def _run(self, model: MoEModel) -> ModelOutput:
        controls = self.controls
        return model(self._inputs, controls.top_k, controls.routing_bias, controls.expert_cost)
