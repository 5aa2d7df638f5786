"""Adaptation by forward passes alone: two of them, with gains and offsets of norms perturbed either way.

After Chen et al., "EVA-0: Test-Time Model Evolution with Only Two Forward Passes per Sample", arXiv
2605.18867: a loss that does not hang on the scale of the logits, a perturbation of its own for every sample,
and an anchor at the first parameters. Here the two passes follow the answer, which is the unperturbed
model's. Shapes: B samples, S tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe.model.transformer import ModelOutput, MoEModel
from moe.ttt.groups import NORMS, batch_statistics_in_force, running_statistics
from moe.ttt.settings import Eva
from moe.ttt.state import AdaptationState
from moe.ttt.steps import Step, check_batch, check_finite, set_statistics, statistics_held

Noise = dict[Any, tuple[Tensor | None, Tensor | None]]
"""Signs of each norm's gain and offset, [B, D] each; None without an offset."""


@torch.no_grad()
def eva(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Eva,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Step along the two-sided differences of each sample's loss, without a graph.

    The signs of a step's perturbations follow from its number, so that a stream gives the same each time. On
    a model with batch norms the running statistics follow the first pass.

    Raises:
        ValueError: The task is not vision, or the batch is a single sample and the model has batch norms.
        AdaptationDiverged: A loss is not a number.
    """
    check_batch(model, inputs)
    number = state.averages.get("steps", torch.zeros((), dtype=torch.int64))
    noise = _draw(model, len(inputs), int(number))
    losses, moved = [], []
    with statistics_held(model):
        for sign in (1, -1):
            with _perturbed(noise, sign * settings.perturbation), batch_statistics_in_force(model):
                losses.append(_loss(model(inputs, top_k, routing_bias)))  # [B]
            moved = moved or [buffer.clone() for buffer in running_statistics(model)]
    loss = torch.stack(losses).mean()
    check_finite(loss)
    slope = (losses[0] - losses[1]) / (2 * settings.perturbation)  # [B]
    state.descent.zero_grad(set_to_none=True)
    for norm, signs in noise.items():
        for parameter, sign in zip(norm.parameters(recurse=False), signs, strict=False):
            if sign is not None:
                parameter.grad = (slope[:, None] * sign).mean(dim=0)  # [D]
    state.descent.step()
    state.pull_back(settings.source_share)
    set_statistics(model, moved)
    state.averages["steps"] = number + 1
    return Step(selected=len(inputs), loss=loss)


def _loss(output: ModelOutput) -> Tensor:
    """Return each answer's entropy over log C at logits of length one, [B].

    Larger logits alone lower an entropy, which no answer gains by.
    """
    logits = output.logits - output.logits.mean(dim=-1, keepdim=True)
    size = logits.norm(dim=-1, keepdim=True)  # [B, 1]
    return ModelOutput(logits / size.clamp(min=1e-12), ()).entropy


def _draw(model: MoEModel, n: int, seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)

    def signs(parameter: Any) -> Tensor | None:
        if parameter is None:
            return None
        drawn = torch.randint(2, (n, len(parameter)), generator=generator)
        return (2.0 * drawn - 1).to(parameter.device)

    norms: list[Any] = [module for module in model.modules() if isinstance(module, NORMS)]
    return {norm: (signs(norm.weight), signs(getattr(norm, "bias", None))) for norm in norms}


@contextmanager
def _perturbed(noise: Noise, size: float) -> Iterator[None]:
    """Add to what each norm gives what a change of its gain and offset by `size` would, sample by sample."""

    def hook(norm: Any, args: Any, output: Tensor) -> Tensor:
        gain, offset = noise[norm]
        bias = 0.0 if offset is None else norm.bias.to(output.dtype)
        assert gain is not None
        change = (output - bias) / norm.weight.to(output.dtype) * gain[:, None].to(output.dtype)
        if offset is not None:
            change = change + offset[:, None].to(output.dtype)
        return output + size * change

    hooks = [norm.register_forward_hook(hook) for norm in noise]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
