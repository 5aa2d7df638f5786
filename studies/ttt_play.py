"""Serving a stream with a model that adapts: every batch is answered and scored before it is learned from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import ttt
from moe.model.transformer import MoEModel
from moe.service.budget import EnergyBudget
from moe.service.gates import Gate, Observed
from studies.ttt_config import METHODS, Adaptation
from studies.ttt_meter import FORWARD, GUARD, HOST, SERVE, UPDATE, PhaseClock


class Batch(NamedTuple):
    """A batch of a stream, on the device."""

    inputs: Tensor
    """uint8 [B, 28, 28] or [B, S]"""
    targets: Tensor
    """Classes, or what follows each piece of text, int64 [B]."""
    shift: str


class Answered(NamedTuple):
    """What serving a batch gave, on the host but for the logits."""

    logits: Tensor
    quality: float
    """Accuracy, 0 to 1; for text bits per byte."""
    entropy: float
    confidence: float


@dataclass(frozen=True)
class Price:
    """What a budget counts with, in one unit: energy where there is a meter, else counted operations."""

    serve: float
    """Of answering a batch; a fraction of it is earned with every batch."""
    adapt: float
    """Of a whole step, charged before it."""


@dataclass(frozen=True)
class Played:
    """What happened along a stream, by batch."""

    quality: list[float]
    adapted: list[bool]
    """Whether a step was taken and kept."""
    selected: int
    """Samples that were learned from."""
    refused: int
    """Steps that the gate wanted and the budget refused."""
    guard: ttt.GuardCounters | None


class Learner:
    """A model, one way to adapt it, and the clock that both run by."""

    def __init__(
        self, model: MoEModel, adaptation: Adaptation | None, clock: PhaseClock, guarded: bool
    ) -> None:
        """Prepare the model to adapt; None leaves it as it was trained."""
        self.model, self.clock, self.guard = model, clock, None
        if adaptation is None:
            return
        self._method, self._settings = METHODS[adaptation.method], adaptation.make_settings()
        self.state = ttt.start(model, self._settings, adaptation.group)
        self.guard = ttt.Guard(model, self.state) if guarded else None

    @torch.no_grad()
    def answer(self, inputs: Tensor, targets: Tensor) -> Answered:
        """Answer and score a batch; the host waits for the result."""
        self.clock.enter(SERVE)
        output = self.model(inputs)
        quality = score(output.logits, inputs, targets)
        numbers = torch.stack([quality, output.entropy.mean().clamp(0, 1), output.confidence.mean()])
        self.clock.enter(HOST)
        return Answered(output.logits, *numbers.tolist())

    def learn(self, inputs: Tensor, logits: Tensor) -> ttt.Step | None:
        """Take a step; None where the guard refused or undid it."""
        if self.guard is None:
            step = self._step(self.model, self.state, inputs, self._settings, None, 0.0, logits)
        else:
            self.clock.enter(GUARD)
            step = self.guard.step(self._step, inputs, logits, self._settings)
        self.clock.enter(HOST)
        return step

    def _step(self, *arguments: Any) -> ttt.Step:
        self.clock.enter(UPDATE)
        with self._timed_passes():
            step = self._method.step(*arguments)
        self.clock.enter(HOST if self.guard is None else GUARD)
        return step

    @contextmanager
    def _timed_passes(self) -> Iterator[None]:
        """Tell the forward passes of a step from the rest of it."""
        hooks = (
            self.model.register_forward_pre_hook(lambda *_: self.clock.enter(FORWARD)),
            self.model.register_forward_hook(lambda *_: self.clock.enter(UPDATE)),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def score(logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of a batch of images, or bits per byte of a batch of text, every byte of it; 0-dim."""
    if logits.ndim == 2:
        return (logits.argmax(dim=-1) == targets).float().mean()
    following = torch.cat([inputs[:, 1:].long(), targets[:, None]], dim=1)  # [B, S]
    return F.cross_entropy(logits.flatten(0, 1), following.flatten()) / math.log(2)


def play(
    learner: Learner,
    batches: Sequence[Batch],
    gate: Gate | None,
    budget: EnergyBudget | None,
    price: Price | None,
) -> Played:
    """Serve a stream.

    A budget earns by the batch, whose time is the unit of its windows, and is charged the price of a whole
    step, so that what it allows does not hang on how fast a step happened to be.

    Args:
        learner: In the state to begin with.
        batches: The stream.
        gate: Asked after every batch; None never adapts.
        budget: Of adaptation; None is no limit.
        price: What the budget counts with.
    """
    quality, adapted, selected = [], [], 0
    learner.clock.enter(HOST)
    for batch in batches:
        answered = learner.answer(batch.inputs, batch.targets)
        quality.append(answered.quality)
        step = None
        if gate is not None:
            wanted = gate.decide(Observed(answered.entropy, answered.confidence))
            if budget is not None and price is not None:
                budget.earn(1.0, price.serve)
                wanted = wanted and budget.charge(price.adapt)
            step = learner.learn(batch.inputs, answered.logits) if wanted else None
        n_selected = 0 if step is None else step.selected
        adapted.append(n_selected > 0)
        selected += n_selected
    return Played(
        quality,
        adapted,
        selected,
        0 if budget is None else budget.refused,
        None if learner.guard is None else learner.guard.counters,
    )
