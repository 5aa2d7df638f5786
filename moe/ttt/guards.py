"""Guards of test-time training: they see a step going wrong, undo it exactly, and count.

A batch passes four gates. Its inputs and answers may be outliers (a poisoned batch): it is left out. The
answers so far may have collapsed, to one class or to no doubt at all: the model goes back. The batch may hold
few classes: it is left out, because running statistics that follow it would fit those classes alone. The step
may end in numbers that are not finite: the model goes back as well. It goes back to the newest snapshot that
has proven itself, which is one that was followed by `probation` steps without complaint; at first that is the
start.

That a batch holds few classes does not show in its answers alone. Under a shift the unadapted model names few
classes, whatever comes, and the batch's own statistics spread any batch over all of them. Two signs tell them
apart. Normalised by its own statistics the model gets surer of a shifted batch, and less sure of a batch of
few classes. And a shift of the inputs moves the statistics of the first norm more than those of the last, few
classes hardly or the other way round. Both are read off the model before adaptation: against the state of
another shift they say nothing of classes. A batch is left out where few classes are named and both signs
speak for few, the one the louder the less the other does. Batches left out are kept, and when several in a
row make up for each other's classes, the model learns from a mixture of them.

Three things are not seen. Few classes under a strong shift look like the shift. A model that gets worse while
its answers stay spread and in doubt takes labels to tell: at a learning rate of 20 the shipped model falls
from 92% to 27% in forty steps, within the default limits. Where the requests are known to be balanced, a low
`concentration_limit` sees it. And the answers that are judged are those before the step, so that a collapse
shows one batch later.

The host waits twice per guarded step beyond the method's own waits: for five numbers of the batch, packed in
one tensor, before the step, and for one flag after it. On a model with batch norms, a batch whose answers
name few classes costs two more forward passes and a wait, and so does a mixture of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe.model.layers import BatchNorm
from moe.model.transformer import MoEModel
from moe.ttt.bank import recognises
from moe.ttt.groups import batch_norms
from moe.ttt.guard_settings import GuardCounters, GuardSettings
from moe.ttt.neo import uncentred
from moe.ttt.service import AdaptationDiverged
from moe.ttt.settings import Bank, Settings, recentres
from moe.ttt.state import AdaptationState, Saved
from moe.ttt.steps import Step, divergence, look

DEVIATION_OF_MEAN_ABSOLUTE = math.sqrt(math.pi / 2)
"""Standard deviation of a normal variable over its mean absolute deviation."""

_JUDGED = ("input_mean", "input_spread", "entropy")  # what makes a batch an outlier


@dataclass
class _Baseline:
    """Moving mean and mean absolute deviation of a number, over about 20 batches."""

    mean: float = 0.0
    deviation: float = 0.0
    n: int = 0

    def z(self, value: float) -> float:
        floor = 1e-3 * max(abs(self.mean), 1e-3)  # equal batches would make any other an outlier
        return abs(value - self.mean) / (DEVIATION_OF_MEAN_ABSOLUTE * max(self.deviation, floor))

    def update(self, value: float) -> None:
        self.n += 1
        rate = max(1 / self.n, 0.05)  # plain means until the memory is full
        if self.n > 1:
            self.deviation += max(1 / (self.n - 1), 0.05) * (abs(value - self.mean) - self.deviation)
        self.mean += rate * (value - self.mean)


@dataclass(frozen=True)
class _Batch:
    """What a batch is judged by: numbers on the host, and the moving shares of the classes, [C]."""

    numbers: dict[str, float]
    shares: Tensor


class Guard:
    """Watches over the steps of one model and state.

    Attributes:
        settings: Its limits.
        counters: What it has seen.
        good: Snapshot that a rollback restores.
    """

    def __init__(
        self, model: MoEModel, state: AdaptationState, settings: GuardSettings | None = None
    ) -> None:
        self.settings = GuardSettings() if settings is None else settings
        self.counters = GuardCounters()
        self._model, self._state = model, state
        self.reset()

    def reset(self) -> None:
        """Take the present state for good and forget all baselines; the counters go on."""
        self.good: Saved = self._state.snapshot(self._model)
        self._forget()

    def step(
        self,
        method: Callable[..., Step],
        inputs: Tensor,
        answers: Tensor,
        settings: Any,
        top_k: int | None = None,
        routing_bias: float = 0.0,
        *,
        served: bool = True,
    ) -> Step | None:
        """Take a guarded step.

        Args:
            method: One of `moe.ttt.methods`.
            inputs: Inputs to learn from.  # [B, ...]
            answers: Logits that the model gave them.  # [B, C] or [B, S, C]
            settings: Of the method.
            top_k: Experts per token; None means the config's.
            routing_bias: Pull to cheap experts.
            served: Whether the model is still as it was at these answers.

        Returns:
            What the step did, or None where it was refused or undone; the counters say why.
        """
        batch = self._describe(inputs, answers)
        if not all(math.isfinite(value) for value in batch.numbers.values()):
            return self._roll_back("non_finite")
        if self._is_poisoned(batch, inputs, settings):
            return self._count("poisoned")
        if self._is_collapsed(batch):
            return self._roll_back("collapsed")
        if self._is_concentrated(batch, inputs, settings, top_k, routing_bias):
            self._count("concentrated")
            mixed = self._gather(inputs, answers, settings, top_k, routing_bias)
            if mixed is None:
                return None
            inputs, served = mixed, False
        self._left_out.clear()
        given = answers if served else None
        try:
            step = method(self._model, self._state, inputs, settings, top_k, routing_bias, given)
        except AdaptationDiverged:
            return self._roll_back("non_finite")
        if not step.selected:
            self._count("empty")
            return step
        if not self._is_finite():
            return self._roll_back("non_finite")
        self._count("steps")
        self._promote()
        return step

    def _describe(self, inputs: Tensor, answers: Tensor) -> _Batch:
        recentred = self._state.centring is not None
        plain = uncentred(self._model, self._state, answers) if recentred else answers
        return _describe(inputs, answers, plain, self._shares, self.settings.average_decay)

    def _is_poisoned(self, batch: _Batch, inputs: Tensor, method_settings: Any) -> bool:
        """Judge a batch by its inputs and its entropy; outliers leave the baselines as they are.

        A shift that a bank knows is no poison: one batch of it is enough for a change.
        """
        settings = self.settings
        ready = self._baselines["entropy"].n >= settings.warm_up
        if ready and any(
            line.z(batch.numbers[name]) > settings.outlier_z for name, line in self._baselines.items()
        ):
            self._outliers += 1
            known = isinstance(method_settings, Bank) and recognises(
                self._model, self._state, inputs, method_settings
            )
            if self._outliers < settings.shift_after and not known:
                return True
            self._baselines = _baselines()
            self._left_out.clear()
        self._outliers = 0
        for name, baseline in self._baselines.items():
            baseline.update(batch.numbers[name])
        return False

    def _is_collapsed(self, batch: _Batch) -> bool:
        settings, entropy = self.settings, batch.numbers["entropy"]
        self._shares = batch.shares
        old = entropy if self._entropy is None else self._entropy
        self._entropy = settings.average_decay * old + (1 - settings.average_decay) * entropy
        return (
            batch.numbers["concentration"] > settings.concentration_limit
            or self._entropy < settings.entropy_limit
        )

    def _is_concentrated(
        self, batch: _Batch, inputs: Tensor, method_settings: Any, top_k: int | None, routing_bias: float
    ) -> bool:
        """Judge whether a batch holds few classes, by the three signs of the module's head.

        Without batch norms there is one sign, the classes that are named, and one thing to fit to them: the
        mean that is taken away.
        """
        if batch.numbers["spread"] >= self.settings.spread_limit:
            return False
        if self._model.config.norm != "batch":
            return isinstance(method_settings, Settings) and recentres(method_settings)
        with torch.no_grad(), self._state.unadapted(self._model):
            plain = self._model(inputs, top_k, routing_bias)
            own, moved = look(self._model, inputs, top_k, routing_bias)
            moves = _moves(self._model, moved)
        doubt, first, last = torch.stack([(own.entropy - plain.entropy).mean(), *moves]).tolist()
        return doubt > self.settings.doubt_margin and last > (1 - 2 * doubt) * first

    def _gather(
        self,
        inputs: Tensor,
        answers: Tensor,
        method_settings: Any,
        top_k: int | None,
        routing_bias: float,
    ) -> Tensor | None:
        """Keep a batch of few classes; return a batch drawn evenly from those kept once it holds many."""
        self._left_out.append((inputs.clone(), answers.clone()))  # callers may reuse their buffers
        n = self.settings.gather
        if len(self._left_out) < n:
            return None
        inputs, answers = (torch.cat(part)[::n] for part in zip(*self._left_out, strict=True))
        mixed = self._describe(inputs, answers)
        return None if self._is_concentrated(mixed, inputs, method_settings, top_k, routing_bias) else inputs

    def _is_finite(self) -> bool:
        """Whether parameters and statistics are numbers; decided on the device, read once."""
        tensors = [*self._state.parameters, *self._state.moved(self._model)]
        return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())

    def _promote(self) -> None:
        """Take the waiting snapshot for good when its probation is over, and a new one in its place."""
        if self._waiting is None:
            self._waiting, self._waited = self._state.snapshot(self._model), 0
            return
        self._waited += 1
        if self._waited >= self.settings.probation:
            self.good, self._waiting = self._waiting, None

    def _roll_back(self, why: str) -> None:
        self._state.restore(self._model, self.good)
        self._count(why)
        self._count("rollbacks")
        self._forget()

    def _forget(self) -> None:
        self._shares: Tensor | None = None
        self._entropy: float | None = None
        self._baselines = _baselines()
        self._outliers = 0
        self._left_out: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.settings.gather)
        self._waiting: Saved | None = None
        self._waited = 0

    def _count(self, what: str) -> None:
        self.counters = replace(self.counters, **{what: getattr(self.counters, what) + 1})


def _baselines() -> dict[str, _Baseline]:
    return {name: _Baseline() for name in _JUDGED}


@torch.no_grad()
def _describe(
    inputs: Tensor, answers: Tensor, uncentred: Tensor, shares: Tensor | None, decay: float
) -> _Batch:
    """Return what a batch is judged by; the host waits once.

    The moving average of the classes' shares starts at even shares: the first answers are no collapse. How
    many classes are named is told from answers before `neo`, which spreads those to any batch over all
    classes.
    """
    x = inputs.float()
    log_p = answers.float().log_softmax(dim=-1).flatten(0, -2)  # [N, C]
    n_classes = log_p.shape[-1]
    entropy = -(log_p.exp() * log_p).sum(dim=-1).mean() / math.log(n_classes)
    now = _shares(answers)
    old = torch.full_like(now, 1 / n_classes) if shares is None else shares
    shares = decay * old + (1 - decay) * now
    spread = _spread(_shares(uncentred), len(log_p))
    values = torch.stack([x.mean(), x.std(correction=0), entropy, shares.max(), spread]).tolist()
    return _Batch(dict(zip((*_JUDGED, "concentration", "spread"), values, strict=True)), shares)


def _shares(answers: Tensor) -> Tensor:
    """Return the share of each class among the answers, [C]."""
    classes = torch.arange(answers.shape[-1], device=answers.device)
    return (answers.flatten(0, -2).argmax(dim=-1, keepdim=True) == classes).float().mean(dim=0)


def _spread(shares: Tensor, n_answers: int) -> Tensor:
    """Return the effective number of classes in shares [C] over the most there can be; 0-dim.

    The exponential of the entropy, with the correction of Miller and Madow (1955) for few answers.
    """
    entropy = torch.special.entr(shares).sum() + ((shares > 0).sum() - 1) / (2 * n_answers)
    return entropy.exp() / min(len(shares), n_answers)


@torch.no_grad()
def _moves(model: MoEModel, moved: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return how far the first and the last batch norm's statistics would move (`divergence`), 0-dim.

    Args:
        model: Model with batch norms.
        moved: The running statistics after the move, in the order of `running_statistics`.
    """
    norms = [norm for _, norm in batch_norms(model)]
    per_norm = len(moved) // len(norms)

    def move(norm: BatchNorm, mean: Tensor, variance: Tensor) -> Tensor:
        assert norm.running_mean is not None and norm.running_var is not None
        return divergence(mean, variance, norm.running_mean, norm.running_var)

    return move(norms[0], *moved[:2]), move(norms[-1], *moved[-per_norm:][:2])
