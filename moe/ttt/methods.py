"""Methods of test-time training, as functions of one shape: model, state, inputs, settings.

All take one step on inputs that were already answered; `answers` are the logits that they got, where the
model is still as it was then, and only methods without a pass of their own read them. A step that is skipped
(nothing selected) builds no graph and leaves parameters, statistics, optimizer and averages as they were; so
does a step that raises. On a model with batch norms the adapting pass normalises by its batch, and the
running statistics follow once.

The host waits once per step to see that the loss is a number, and once more for each selection (its size).
Shapes: B samples, C classes, S bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.model.transformer import ModelOutput, MoEModel
from moe.ttt.groups import batch_statistics_in_force
from moe.ttt.service import adapt
from moe.ttt.settings import BatchStatistics, DynamicEvaluation, Eata, RmsDynamicEvaluation, Sar, Tent
from moe.ttt.state import AdaptationState, require_batch_norms
from moe.ttt.steps import (
    SKIPPED,
    Step,
    check_batch,
    check_finite,
    descend,
    look,
    set_statistics,
    smallest_batch,
    statistics_held,
    statistics_undone_on_error,
)


def batch_statistics(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: BatchStatistics,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Move the running statistics toward the batch's, without a gradient (arXiv 2006.16971).

    Raises:
        ValueError: The model has no batch norms, or the batch is a single sample.
        AdaptationDiverged: An answer is not a number.
    """
    require_batch_norms(model)
    check_batch(model, inputs)
    with torch.no_grad(), statistics_undone_on_error(model), batch_statistics_in_force(model):
        check_finite(model(inputs, top_k, routing_bias).entropy.mean())
    return Step(selected=len(inputs))


def tent(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Tent,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Descend the mean entropy of the answers (TENT, arXiv 2006.10726), as the service does (`adapt`).

    Raises:
        ValueError: The task is not vision, or the batch is a single sample and the model has batch norms.
        AdaptationDiverged: The loss is not a number.
    """
    check_batch(model, inputs)
    top_k = model.config.top_k if top_k is None else top_k
    with statistics_undone_on_error(model):
        loss = adapt(model, state.descent, inputs, top_k, routing_bias)
    return Step(selected=len(inputs), loss=loss)


def eata(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Eata,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Descend the entropy of reliable, not redundant samples (EATA, arXiv 2204.02610, section 4).

    Two passes: one without a graph selects, the adapting pass sees the selected samples only. So a step costs
    1 + 2k forward passes where a share k is selected. Each sample weighs exp(E0 - H), in nats. On a model
    with batch norms fewer than two selected samples count as none.

    Raises:
        ValueError: The task is not vision, or the batch is a single sample and the model has batch norms.
        AdaptationDiverged: The loss is not a number.
    """
    check_batch(model, inputs)
    with torch.no_grad():
        output, moved = look(model, inputs, top_k, routing_bias)
        probabilities = output.logits.softmax(dim=-1)  # [B, C]
        keep = _reliable(output, settings)  # [B]
        if "probabilities" in state.averages:
            cosine = F.cosine_similarity(state.averages["probabilities"][None], probabilities)  # [B]
            keep &= ~(cosine.abs() >= settings.redundancy_margin)
    kept = inputs[keep]
    if len(kept) < smallest_batch(model):
        return SKIPPED
    log_c = math.log(model.config.n_classes)

    def objective(output: ModelOutput) -> Tensor:
        entropy = output.entropy
        weights = ((settings.entropy_margin - entropy.detach()) * log_c).exp()
        loss = (weights * entropy).mean()
        return loss if state.fisher is None else loss + settings.anchor_strength * _distance(state)

    with statistics_held(model):
        loss = descend(model, state, kept, objective, top_k, routing_bias)
    state.descent.step()
    set_statistics(model, moved)
    state.average("probabilities", probabilities[keep].mean(dim=0), settings.average_decay)
    return Step(selected=len(kept), loss=loss)


def fisher_anchor(
    model: MoEModel,
    state: AdaptationState,
    clean: Iterable[Tensor],
    top_k: int | None = None,
    routing_bias: float = 0.0,
) -> None:
    """Measure on clean batches how much the answers depend on each parameter, for `eata` to keep it by.

    Mean over the batches of the squared gradient of the cross-entropy to the model's own answers (EATA,
    section 4.2), in eval mode; the model is left as it is, only ``state.fisher`` is set.

    Raises:
        ValueError: There is no batch.
    """

    def loss(inputs: Tensor) -> Tensor:
        output = model(inputs, top_k, routing_bias)
        return F.cross_entropy(output.logits, output.predictions)

    state.fisher = _mean_squared_gradient(state, clean, loss)


def sar(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Sar,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Descend the entropy of reliable samples toward flat minima (SAR, arXiv 2302.12400, section 4).

    The gradient is taken where an ascent step of length rho leads (SAM, arXiv 2010.01412), among the samples
    still reliable there, and applied where the step began. Unlike the original, a pass without a graph
    selects first, so that nothing selected costs no graph. When nothing stays reliable after
    the ascent, everything is put back. When the moving average of the entropy falls under the limit, all
    adaptation is undone, the average included; this waits for the host once more.

    Raises:
        ValueError: The task is not vision, or the batch is a single sample and the model has batch norms.
        AdaptationDiverged: A loss is not a number.
    """
    check_batch(model, inputs)
    output, moved = look(model, inputs, top_k, routing_bias)
    kept = inputs[_reliable(output, settings)]
    if len(kept) < smallest_batch(model):
        return SKIPPED
    with statistics_held(model):
        descend(model, state, kept, lambda output: output.entropy.mean(), top_k, routing_bias)
        with _ascended(state.parameters, settings.rho):
            with torch.enable_grad(), batch_statistics_in_force(model):
                output = model(kept, top_k, routing_bias)
                entropy = output.entropy[_reliable(output, settings)]
            state.descent.zero_grad(set_to_none=True)
            if len(entropy):
                loss = entropy.mean()
                check_finite(loss)
                loss.backward()
    if not len(entropy):
        return SKIPPED
    state.descent.step()
    set_statistics(model, moved)
    loss = entropy.detach().mean()
    average = state.average("entropy", loss, settings.average_decay)
    recovered = bool(average * math.log(model.config.n_classes) < settings.recover_below_nats)
    if recovered:
        state.reset(model)
    return Step(selected=len(entropy), loss=loss, recovered=recovered)


def dynamic_evaluation(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: DynamicEvaluation,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Learn from bytes already scored (dynamic evaluation: Krause et al., ICML 2018, arXiv 1709.07432).

    One SGD step on the mean cross-entropy of the next byte, in nats, with a decay to the first parameters:
    theta <- theta - lr * gradient + decay * (theta_0 - theta). The caller scores the bytes before the step.

    With `RmsDynamicEvaluation` each gradient is divided by rms + epsilon * mean(rms), and each decay is
    multiplied by rms / mean(rms) but stays at most 1 (section 4; there epsilon is absolute). The best
    learning rate then depends less on the size of the batches, as the measured rms shrinks when they grow.

    Args:
        model: Language model.
        state: Of `start`.
        inputs: Bytes, each row in order, S at least 2.  # [B, S]
        settings: Of the method.
        top_k: Experts per token; None means the config's.
        routing_bias: Pull to cheap experts.
        answers: Not read.

    Raises:
        ValueError: The model is no language model, there is no next byte, or the rms was not measured.
        AdaptationDiverged: The loss is not a number.
    """
    if model.config.task != "language":
        raise ValueError(f"dynamic_evaluation needs a model of task 'language', got {model.config.task!r}")
    if inputs.ndim != 2 or not len(inputs) or inputs.shape[1] < 2:
        raise ValueError(
            f"dynamic_evaluation needs rows of at least 2 bytes, got shape {tuple(inputs.shape)}"
        )

    pulls: list[float | Tensor] = [settings.decay] * len(state.parameters)
    scales: list[float | Tensor] = [1.0] * len(state.parameters)
    if isinstance(settings, RmsDynamicEvaluation):
        if state.rms is None:
            raise ValueError("the size of the gradients is unknown: call gradient_rms on training text first")
        mean = torch.cat([rms.flatten() for rms in state.rms]).mean()
        pulls = [(settings.decay * rms / mean).clamp(max=1) for rms in state.rms]
        scales = [rms + settings.epsilon * mean for rms in state.rms]
    loss = descend(model, state, inputs, lambda output: _next_byte_loss(output, inputs), top_k, routing_bias)
    with torch.no_grad():  # before the step, which does not depend on where it begins
        rows = zip(state.parameters, state.source.parameters, pulls, scales, strict=True)
        for parameter, first, pull, scale in rows:
            parameter.lerp_(first, pull)
            if parameter.grad is not None:
                parameter.grad.div_(scale)
    state.descent.step()
    return Step(selected=len(inputs), loss=loss)


def gradient_rms(
    model: MoEModel,
    state: AdaptationState,
    texts: Iterable[Tensor],
    top_k: int | None = None,
    routing_bias: float = 0.0,
) -> None:
    """Measure on training text how large each parameter's gradient is, for `RmsDynamicEvaluation`.

    Root of the mean over the batches of the squared gradient (arXiv 1709.07432, section 4); the model is
    left as it is, only ``state.rms`` is set.

    Args:
        model: Language model.
        state: Of `start`.
        texts: Bytes, in batches shaped like those to adapt to: noise shrinks with their size.  # [B, S] each
        top_k: Experts per token; None means the config's.
        routing_bias: Pull to cheap experts.

    Raises:
        ValueError: There is no batch.
    """

    def loss(inputs: Tensor) -> Tensor:
        return _next_byte_loss(model(inputs, top_k, routing_bias), inputs)

    state.rms = [square.sqrt() for square in _mean_squared_gradient(state, texts, loss)]


def _next_byte_loss(output: ModelOutput, inputs: Tensor) -> Tensor:
    """Return the mean cross-entropy of the bytes that follow in the inputs, [B, S], in nats."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten().long())


def _mean_squared_gradient(
    state: AdaptationState, batches: Iterable[Tensor], loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the mean over the batches of the squared gradient of a loss, shaped as the parameters."""
    total = [torch.zeros_like(parameter) for parameter in state.parameters]
    n_batches = 0
    for inputs in batches:
        with torch.enable_grad():
            value = loss(inputs)
        gradients = torch.autograd.grad(value, state.parameters, allow_unused=True, materialize_grads=True)
        total = [sum_ + gradient.square() for sum_, gradient in zip(total, gradients, strict=True)]
        n_batches += 1
    if not n_batches:
        raise ValueError("gradients are measured on at least one batch of source data, got none")
    return [sum_ / n_batches for sum_ in total]


def _reliable(output: ModelOutput, settings: Eata | Sar) -> Tensor:
    """Return whose entropy is low, or no number at all, which the loss then tells, [B]."""
    return ~(output.entropy.detach() >= settings.entropy_margin)


def _distance(state: AdaptationState) -> Tensor:
    """Return the squared distance to the start, each parameter weighed by its Fisher information."""
    assert state.fisher is not None
    rows = zip(state.fisher, state.parameters, state.source.parameters, strict=True)
    return torch.stack([(weight * (now - first).square()).sum() for weight, now, first in rows]).sum()


@contextmanager
def _ascended(parameters: list[nn.Parameter], rho: float) -> Iterator[None]:
    """Move parameters by rho along their gradient while the context lasts; back exactly, from copies."""
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    first = [parameter.detach().clone() for parameter in moving]
    gradients = [parameter.grad for parameter in moving if parameter.grad is not None]
    scale = rho / (torch.stack([gradient.norm() for gradient in gradients]).norm() + 1e-12)
    with torch.no_grad():
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.add_(gradient * scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moving, first, strict=True):
                parameter.copy_(value)
