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
classes the other way round. A batch is left out where few classes are named and both signs speak for few. A
batch of one class may move the first norm a little more than the last, but then the doubt is great.
Batches left out are kept, and when several in a row make up for each other's classes, the model learns from a
mixture of them.

Two things are not seen. A model that gets worse while its answers stay spread and in doubt takes labels to
tell: at a learning rate of 20 the shipped model falls from 92% to 27% in forty steps, within the default
limits. Where the requests are known to be balanced, a low `concentration_limit` sees it. And the answers that
are judged are those before the step, so that a collapse shows one batch later.

The host waits twice per guarded step beyond the method's own waits: for five numbers of the batch, packed in
one tensor, before the step, and for one flag after it. On a model with batch norms, a batch whose answers
name few classes costs one more forward pass and wait, and so does a mixture of them.
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
from moe.ttt.neo import uncentred
from moe.ttt.service import AdaptationDiverged
from moe.ttt.settings import Bank, Settings, recentres
from moe.ttt.state import AdaptationState, Saved
from moe.ttt.steps import Step, divergence, look

DEVIATION_OF_MEAN_ABSOLUTE = math.sqrt(math.pi / 2)
"""Standard deviation of a normal variable over its mean absolute deviation."""

_JUDGED = ("input_mean", "input_spread", "entropy")  # what makes a batch an outlier


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """Limits of a guard.

    Attributes:
        concentration_limit: Share of the most frequent class in a moving average of the answers, above which
            they have collapsed; more than a correlated stream gives.
        entropy_limit: Mean entropy over log C, a moving average, below which they have.
        average_decay: Of both moving averages.
        outlier_z: Robust z-score from which a batch is an outlier.
        warm_up: Batches that set the baselines before a batch is judged.
        shift_after: Outliers in a row that are taken for a change of the inputs rather than for poison;
            the last of them becomes the new baseline.
        spread_limit: Effective number of classes among a batch's answers, over the most there can be (classes
            or answers), below which a batch is looked at closer.
        doubt_margin: Mean entropy over log C that the batch's own statistics must add for it to be left out.
        great_doubt: The same from which the last norm need move 0.4 times as far as the first.
        gather: Batches left out for holding few classes that are kept; a batch drawn evenly from them is
            learned from if it holds many.
        probation: Steps that a snapshot must be followed by before it counts as good; at least as many as
            the averages take to tell a collapse, or a collapsed state would count as good.
    """

    concentration_limit: float = 0.9
    entropy_limit: float = 0.01
    average_decay: float = 0.8
    outlier_z: float = 6.0
    warm_up: int = 8
    shift_after: int = 2
    spread_limit: float = 0.55
    doubt_margin: float = 0.05
    great_doubt: float = 0.3
    gather: int = 8
    probation: int = 24

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing."""
        for name in (
            "concentration_limit", "entropy_limit", "average_decay", "spread_limit", "doubt_margin",
            "great_doubt",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be within 0 < {name} < 1, got {getattr(self, name)}")
        if self.great_doubt < self.doubt_margin:
            raise ValueError(
                f"great_doubt must be at least doubt_margin ({self.doubt_margin}), got {self.great_doubt}"
            )
        for name in ("warm_up", "shift_after", "gather", "probation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.outlier_z < math.inf:
            raise ValueError(f"outlier_z must be positive and finite, got {self.outlier_z}")
        if self.probation < self.steps_to_tell:
            raise ValueError(
                f"probation must be at least the {self.steps_to_tell} steps that these limits and this "
                f"average_decay take to tell a collapse, got {self.probation}"
            )

    @property
    def steps_to_tell(self) -> int:
        """Batches until a complete collapse is told, whatever the averages were before."""
        smallest = min(1 - self.concentration_limit, self.entropy_limit)
        return math.floor(math.log(smallest) / math.log(self.average_decay)) + 1


@dataclass(frozen=True)
class GuardCounters:
    """What a guard has seen.

    Attributes:
        steps: Steps taken and kept.
        empty: Steps that selected nothing.
        poisoned: Batches left out as outliers.
        concentrated: Batches left out for holding few classes.
        collapsed: Collapses of the answers.
        non_finite: Answers, losses or parameters that were not finite.
        rollbacks: Returns to a snapshot; one for each of the two above.
    """

    steps: int = 0
    empty: int = 0
    poisoned: int = 0
    concentrated: int = 0
    collapsed: int = 0
    non_finite: int = 0
    rollbacks: int = 0


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
        output, moved = look(self._model, inputs, top_k, routing_bias)
        first, last = _moves(self._model, moved)
        adapted_entropy, first_move, last_move = torch.stack([output.entropy.mean(), first, last]).tolist()
        doubt = adapted_entropy - batch.numbers["entropy"]
        enough = first_move * (0.4 if doubt > self.settings.great_doubt else 1.0)
        return doubt > self.settings.doubt_margin and last_move > enough

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
