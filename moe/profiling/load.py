"""A load of known shape for calibration: a stack of Mixture-of-Experts feed-forward layers, back to back.

No attention, no embedding: what draws power is what a Mixture-of-Experts model spends its power on, and its
two numbers, tokens per forward pass and experts per token, sweep a card from idle to its power cap.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from moe.errors import ThermoeError
from moe.model.experts import Experts, ExpertSlice
from moe.model.router import route

D_MODEL, N_EXPERTS, EXPERT_WIDTH, N_LAYERS = 2048, 64, 1024, 16
LOAD_NAME = f"moe-stack-{N_LAYERS}x{N_EXPERTS}x{EXPERT_WIDTH}"
"""Names the load in a trace's segments: energies of one load say nothing of another."""
LAYERS_NEED_BYTES = 3 * D_MODEL * EXPERT_WIDTH * N_EXPERTS * 2 * N_LAYERS


class LoadTooLargeError(ThermoeError):
    """The card's memory does not hold the load."""


class Work(NamedTuple):
    """What a stretch of load did."""

    steps: int
    """Forward passes done."""
    mean_latency_s: float
    """Mean time of one, launch to end; 0 without any."""


class LoadStack:
    """The stack on one CUDA device, weights random: their values do not matter, their traffic does."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        """Fill the layers.

        Raises:
            LoadTooLargeError: not enough free memory.
        """
        self.device = torch.device(device)
        generator = torch.Generator(self.device).manual_seed(0)
        try:
            with self.device:
                self._layers = [Experts(D_MODEL, (EXPERT_WIDTH,) * N_EXPERTS) for _ in range(N_LAYERS)]
            for layer in self._layers:
                layer.requires_grad_(False)
                for module in layer.modules():
                    if isinstance(module, ExpertSlice):
                        module.to(torch.bfloat16)
                        module.gate_up.normal_(std=D_MODEL**-0.5, generator=generator)
                        module.down.normal_(std=EXPERT_WIDTH**-0.5, generator=generator)
        except torch.OutOfMemoryError as error:
            raise LoadTooLargeError(
                f"the calibration load needs {LAYERS_NEED_BYTES / 2**30:.0f} GiB on the card and what its "
                "tokens take; free the card of other processes, or record under a load of your own"
            ) from error
        self._generator = generator
        self._inputs: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, tokens: int, top_k: int) -> None:
        """Launch one forward pass; returns before the device is done."""
        if tokens not in self._inputs:
            x = torch.randn(tokens, D_MODEL, device=self.device, generator=self._generator)
            self._inputs[tokens] = x.to(torch.bfloat16)
        x = self._inputs[tokens]  # [T, D]
        logits = torch.randn(tokens, N_EXPERTS, device=self.device, generator=self._generator)  # [T, E]
        routing = route(logits, top_k)
        for layer in self._layers:
            x = x + layer(x, routing)

    def warm_up(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Run every (tokens, experts per token) once, so that no measurement pays for loading kernels."""
        for tokens, top_k in sorted(shapes):
            self.forward(tokens, top_k)
        torch.cuda.synchronize(self.device)

    def run(self, tokens: int, top_k: int, duty: float, seconds: float) -> Work:
        """Load the device for `seconds`, busy for the share `duty` of the time.

        Args:
            tokens: tokens per forward pass; 0 idles.
            top_k: experts per token.
            duty: busy share; after each forward pass the device idles to keep it.
            seconds: length; the last forward pass may end a little later.
        """
        begin = time.perf_counter()
        if tokens == 0:
            time.sleep(seconds)
            return Work(0, 0.0)
        steps, busy_s = 0, 0.0
        while (start := time.perf_counter()) < begin + seconds:
            self.forward(tokens, top_k)
            torch.cuda.synchronize(self.device)
            latency_s = time.perf_counter() - start
            steps, busy_s = steps + 1, busy_s + latency_s
            time.sleep(max(0.0, min(latency_s * (1.0 / duty - 1.0), begin + seconds - time.perf_counter())))
        return Work(steps, busy_s / steps)
