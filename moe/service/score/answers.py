"""One pass over a micro-batch: what the model answers, and what the host wants of it.

Shapes: B requests of a batch, C classes, L layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from moe.model.transformer import ModelOutput, MoEModel


@dataclass(frozen=True)
class Answers:
    """An answered batch, on the device."""

    inputs: Tensor
    """[B, ...] what was asked."""
    logits: Tensor
    """[B, C] what was answered."""
    packed: Tensor
    """[2 + L * E + B] as `pack` gives it."""
    n_layers: int

    @classmethod
    def of(
        cls, inputs: Tensor, targets: Tensor, output: ModelOutput, n_samples: Tensor | None = None
    ) -> Self:
        """Sum an output up; the arguments are those of `pack`."""
        return cls(inputs, output.logits, pack(output, targets, n_samples), len(output.routing))

    def first(self, n: int) -> Answers:
        """Those of the first `n` requests, where the others fill the batch up; views, no copies."""
        behind = len(self.inputs) - n
        packed = self.packed[: len(self.packed) - behind]
        return replace(self, inputs=self.inputs[:n], logits=self.logits[:n], packed=packed)


def answer(
    model: MoEModel,
    inputs: Tensor,
    top_k: int,
    routing_bias: float | Tensor,
    n_samples: Tensor | None = None,
) -> ModelOutput:
    """Answer requests: one row of logits each, for language those of the byte after the chunk.

    Args:
        model: What answers; its arguments are the others.
        inputs: Images, or chunks of which it reads the end.  # [B, ...]
        top_k: Experts per token.
        routing_bias: Pull to cheap experts.
        n_samples: Requests of the batch, the rest fills it up; None means all.
    """
    if model.config.task == "vision":
        return model(inputs, top_k, routing_bias, n_samples=n_samples)
    output = model(in_context(model, inputs), top_k, routing_bias, n_samples=n_samples)
    # [B, S, C] -> [B, C]; as a view it would keep the other positions' logits for as long as its own.
    return replace(output, logits=output.logits[:, -1].contiguous())


def in_context(model: MoEModel, inputs: Tensor) -> Tensor:
    """The last bytes of chunks, as many as the model looks at."""
    return inputs[:, -model.config.context_length :]


def pack(output: ModelOutput, targets: Tensor, n_samples: Tensor | None = None) -> Tensor:
    """Join what the host wants of a batch in one array, in few launches: they are a small batch's time.

    Args:
        output: Answers, one row of logits each.
        targets: Right answers.  # [B]
        n_samples: Requests of the batch, the rest fills it up and is in no sum; None means all.

    Returns:
        Sums of confidence and entropy, tokens per expert of each layer, flags of right answers, all in
        float64, which holds flags and counts exactly.  # [2 + L * E + B]
    """
    log_p = output.logits.log_softmax(dim=-1)  # [B, C]
    confidence = log_p.amax(dim=-1).exp()  # [B]
    surprise = log_p.exp() * log_p  # [B, C]
    if n_samples is not None:
        padding = torch.arange(len(targets), device=targets.device) >= n_samples  # [B]
        confidence = confidence.masked_fill(padding, 0.0)
        surprise = surprise.masked_fill(padding[:, None], 0.0)
    sums = torch.stack([confidence.sum(), surprise.sum() / -math.log(log_p.shape[-1])]).double()
    return torch.cat([sums, output.tokens_per_expert.flatten(), output.predictions == targets])
