"""A bank of states: a shift that returns finds the model as it was when the shift was last in force.

After PACE, arXiv 2603.28678. A shift is known by how its inputs look to the first norm: mean and variance of
each channel, which no adaptation changes. A batch is of the nearest shift that is near enough, else of a new
one, which starts from the unadapted model. The statistics of a shift are the plain mean of its batches until
they are many, so that one batch is enough to leave another shift behind. Shapes: S shifts, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from moe.model.transformer import MoEModel
from moe.ttt.groups import batch_norms
from moe.ttt.neo import PLAIN, neo
from moe.ttt.settings import Bank, Neo
from moe.ttt.state import AdaptationState, Shift
from moe.ttt.steps import SKIPPED, Step, check_batch, divergence

SMALLEST_VARIANCE = 1e-5
"""As batch norms add: a channel that never changes tells nothing."""


def bank(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Bank,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Put the state of the batch's shift in force and take a step of the base method in it.

    A base that selects nothing is no step, and leaves all as it was, unless the shift returned: its state is
    then in force. The host waits once more, for the nearest shift.

    Raises:
        ValueError: The task is not vision, or the base refuses.
        AdaptationDiverged: A loss is not a number; all is as before.
    """
    check_batch(model, inputs)
    mean, variance = features(model, inputs)
    place = _nearest(state, mean, variance, settings)
    before = state.snapshot(model)
    stays = place is not None and place == len(state.shifts) - 1
    if not stays:
        _change(model, state, place, settings.room, mean, variance)
        answers = None  # those of another state
    shift = state.shifts[-1]
    try:
        with _shares(model, shift.batches):
            step = _base(settings)(model, state, inputs, settings.base, top_k, routing_bias, answers)
    except BaseException:
        state.restore(model, before)
        raise
    if not step.selected and (stays or place is None):
        state.restore(model, before)
        return SKIPPED
    if step.selected:
        share = 1 / (shift.batches + 1)
        looks = (shift.mean.lerp(mean, share), shift.variance.lerp(variance, share))
        shift = replace(shift, mean=looks[0], variance=looks[1], batches=shift.batches + 1)
        state.shifts = (*state.shifts[:-1], shift)
    return replace(step, changed=not stays) if step.selected else Step(selected=len(inputs), changed=True)


@torch.no_grad()
def features(model: MoEModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel that the first norm takes in, [D] each."""
    taken = model.first_features(inputs).flatten(0, 1)  # [B * P, D]
    variance, mean = torch.var_mean(taken, dim=0)
    return mean, variance


def recognises(model: MoEModel, state: AdaptationState, inputs: Tensor, settings: Bank) -> bool:
    """Whether a batch is of a shift that the bank knows; the host waits."""
    return _nearest(state, *features(model, inputs), settings) is not None


def _nearest(state: AdaptationState, mean: Tensor, variance: Tensor, settings: Bank) -> int | None:
    """Return which of the shifts a batch is of, or None."""
    if not state.shifts:
        return None
    here = mean, variance + SMALLEST_VARIANCE
    far = [divergence(*here, shift.mean, shift.variance + SMALLEST_VARIANCE) for shift in state.shifts]
    distances = torch.stack(far).tolist()  # [S]
    place = min(range(len(distances)), key=distances.__getitem__)
    return place if distances[place] < settings.same_below else None


def _change(
    model: MoEModel,
    state: AdaptationState,
    place: int | None,
    room: int,
    mean: Tensor,
    variance: Tensor,
) -> None:
    """Leave the shift in force, and put the state of another in force, or that of a new one (None)."""
    shifts = list(state.shifts)
    if shifts:
        shifts[-1] = replace(shifts[-1], saved=replace(state.snapshot(model), shifts=()))
    source = replace(state.source, shifts=())
    shift = Shift(mean, variance, 0, source) if place is None else shifts.pop(place)
    state.restore(model, shift.saved)
    state.shifts = (*shifts[-(room - 1) :], shift)


@contextmanager
def _shares(model: MoEModel, batches: int) -> Iterator[None]:
    """Let the next batch count in the running statistics as one of all of its shift."""
    norms = [norm for _, norm in batch_norms(model)]
    least = norms[0].momentum if norms else None  # as `start` set it
    for norm in norms:
        norm.momentum = max(least or 0.0, 1 / (batches + 1))
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = least


def _base(settings: Bank) -> Callable[..., Step]:
    return neo if isinstance(settings.base, Neo) else PLAIN[type(settings.base)]
