"""Quality on test data: top-1 accuracy for vision, next-byte accuracy and bits per byte for language."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.data import datasets as data
from moe.model.transformer import MoEModel
from moe.model.usage import RoutingCounts, byte_classes

TEXT_LIMIT = 1 << 18
"""Bytes of each test text that are scored: a standard error of 0.1 points of accuracy."""


@torch.no_grad()
def evaluate_vision(
    model: MoEModel,
    images: Tensor,
    labels: Tensor,
    top_k: int,
    routing_bias: float = 0.0,
    batch_size: int = 500,
    counts: RoutingCounts | None = None,
) -> float:
    """Return top-1 accuracy, 0 to 1.

    Args:
        model: Vision model in eval mode.
        images: uint8, on the model's device.  # [N, 28, 28]
        labels: Classes.  # [N]
        top_k: Experts per token.
        routing_bias: Pull to cheap experts.
        batch_size: Images per forward pass.
        counts: Where to count the routing, by the image's label.
    """
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for batch, answers in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        output = model(batch, top_k, routing_bias)
        correct += (output.predictions == answers).sum()
        if counts is not None:
            counts.add(output.routing, answers.repeat_interleave(model.config.tokens_per_sample))
    return correct.item() / len(labels)


@torch.no_grad()
def evaluate_language(
    model: MoEModel,
    text: Tensor,
    top_k: int,
    routing_bias: float = 0.0,
    batch_size: int = 128,
    counts: RoutingCounts | None = None,
) -> tuple[float, float]:
    """Return next-byte accuracy (0 to 1) and bits per byte over disjoint windows of a context's length.

    Args:
        model: Language model in eval mode.
        text: Bytes, on the model's device, more than a context.  # [n_bytes]
        top_k: Experts per token.
        routing_bias: Pull to cheap experts.
        batch_size: Windows per forward pass.
        counts: Where to count the routing, by the class of the input byte.
    """
    context = model.config.context_length
    windows = (len(text) - 1) // context
    inputs = text[: windows * context].view(windows, context)
    targets = text[1 : windows * context + 1].view(windows, context).long()
    correct = torch.zeros((), dtype=torch.int64, device=text.device)
    nats = torch.zeros((), dtype=torch.float64, device=text.device)
    for batch, answers in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        output = model(batch, top_k, routing_bias)
        correct += (output.predictions == answers).sum()
        nats += F.cross_entropy(output.logits.flatten(0, 1), answers.flatten(), reduction="sum")
        if counts is not None:
            counts.add(output.routing, byte_classes(batch.flatten()))
    return correct.item() / targets.numel(), nats.item() / targets.numel() / math.log(2)


def quality_by_top_k(
    model: MoEModel, device: torch.device, top_ks: Iterable[int] | None = None
) -> dict[str, dict[str, float]]:
    """Measure a model on its test split; language also on the shifted domain.

    Args:
        model: Model in eval mode.
        device: Where it is.
        top_ks: Experts per token to measure at; None means those it is trained for.
    """
    top_ks = model.config.top_k_choices if top_ks is None else tuple(top_ks)
    quality: dict[str, dict[str, float]] = {}
    if model.config.task == "vision":
        images, labels = (tensor.to(device) for tensor in data.load_vision("test"))
        for top_k in top_ks:
            quality[str(top_k)] = {"accuracy": evaluate_vision(model, images, labels, top_k)}
        return quality
    texts = {
        domain: data.load_language(domain, "test")[:TEXT_LIMIT].to(device) for domain in ("prose", "code")
    }
    for top_k in top_ks:
        quality[str(top_k)] = {}
        for domain, text in texts.items():
            accuracy, bits_per_byte = evaluate_language(model, text, top_k)
            quality[str(top_k)] |= {f"{domain}_accuracy": accuracy, f"{domain}_bits_per_byte": bits_per_byte}
    return quality
