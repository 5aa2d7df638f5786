"""Adaptation at test time: the head learns from prompts that were read.

Behind each token of a prompt a step leaves the normed stream, and the token that follows it is known. So the
gradient of the head needs no further pass through the layers: softmax(logits) less the token that came, times
the stream. It is taken in lessons of as many rows, preconditioned by the stream's second moment (as a natural
gradient is, with the softmax's part left out), and the change of a lesson is bounded.

The documents that are served are few and come again and again. So that none is answered by what was learned
from itself, there are two heads: each answers one half of the documents and learns from the other.

A guard holds each head against the unadapted one on the newest rows that it answers, which it never learns
from. Where it is worse it goes back to the unadapted head and takes smaller steps from then on, where it is
better larger ones. A head that is far worse, as where the text has changed, goes back before the lesson is
whole. All of it is decided on the device: the host waits for nothing.

Shapes: T rows of a step, R rows of a lesson, V tokens, D model.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import ThermoeError
from moe.lm.config import FALLS_TO, FIRST_TRUST, HALVES, LEAST_TRUST, RISES_TO
from moe.lm.model import LanguageModel

_MOMENT_DECAY = 0.95
"""Of the second moment, per lesson."""
_REFRESH = 8
"""Lessons after which the second moment is inverted anew."""


class NothingToLearnError(ThermoeError):
    """A step of adaptation was asked for before a lesson was whole."""


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the head learns.

    Attributes:
        lesson_rows: Rows of a lesson, R.
        rate: Step along the preconditioned gradient of the mean loss in nats.
        damping: Added to the second moment's diagonal, in units of its mean.
        most_change: Bound of what a step does to the logits of a row: root of the mean, over the lesson's
            rows, of the squared length of the change.
        margin: Share by which the loss of an adapted head on a lesson must be above the unadapted one's to
            be worse, or below it to be better.
        check_rows: Rows of a lesson after which a head is held against the unadapted one already.
        alarm: The margin above which it is far worse there.
    """

    lesson_rows: int = 512
    rate: float = 3.0
    damping: float = 0.03
    most_change: float = 2.0
    margin: float = 0.005
    check_rows: int = 128
    alarm: float = 0.03

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("lesson_rows", "check_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "damping", "most_change"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("margin", "alarm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class HeadCounters:
    """What became of the steps since the last reset.

    Attributes:
        steps: Taken and kept.
        left_out: Not taken, as their change was not finite.
        rolled_back: Returns of a head to the unadapted one.
    """

    steps: int = 0
    left_out: int = 0
    rolled_back: int = 0

    def __sub__(self, before: HeadCounters) -> HeadCounters:
        """What came since."""
        return HeadCounters(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True)
class Saved:
    """A copy of all that adaptation changes; see `HeadAdapter.snapshot`."""

    tensors: tuple[Tensor, ...]
    filled: tuple[int, ...]
    checked: tuple[int, ...]
    lessons: int


class HeadAdapter:
    """Two heads of one model, and what they learn from.

    Attributes:
        settings: How they learn.
        heads: In the model's type; changed in place, where captured steps read them.  # [2, V, D]
    """

    def __init__(self, model: LanguageModel, settings: HeadSettings | None = None) -> None:
        """Start unadapted; a tied head becomes one of its own, the embedding stays."""
        self.settings = settings = HeadSettings() if settings is None else settings
        source = model.embed if model.head is None else model.head.weight
        self._source = source.detach()
        (v, d), rows, device = source.shape, settings.lesson_rows, source.device
        self.heads = torch.empty(HALVES, v, d, dtype=model.dtype, device=device)
        self._change = torch.zeros(HALVES, v, d, device=device)
        self._moment, self._inverse = torch.zeros(2, d, d, device=device)
        self._trust = torch.zeros(HALVES, device=device)  # share of a whole step
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # as in `HeadCounters`
        self._stream = torch.zeros(HALVES, rows, d, dtype=model.dtype, device=device)
        self._target = torch.zeros(HALVES, rows, dtype=torch.int64, device=device)
        self.reset()

    def logits(self, stream: Tensor, document: Tensor) -> Tensor:
        """Logits of rows, each by the head of its document.

        Args:
            stream: Normed.  # [T, D]
            document: Of each row.  # [T]

        Returns:
            # [T, V]
        """
        odd = document % HALVES == 1
        if stream.is_cuda:
            even, other = (F.linear(stream, head) for head in self.heads)
            return torch.where(odd[:, None], other, even)
        logits = stream.new_empty(len(stream), self.heads.shape[1])
        for rows, head in zip((~odd, odd), self.heads, strict=True):
            logits[rows] = F.linear(stream[rows], head)
        return logits

    def collect(self, stream: Tensor, rows: np.ndarray, document: np.ndarray, target: np.ndarray) -> bool:
        """Keep rows of a step for a lesson, as many as it still lacks.

        Args:
            stream: The step's; before the next launch.  # [T, D]
            rows: Of the step, which are prompts' and followed by a known token.  # [n]
            document: Whose they are.  # [n]
            target: Tokens that follow.  # [n]

        Returns:
            Whether there is something for `learn` to do.
        """
        for half in range(HALVES):
            own = document % HALVES == half
            at = self._filled[half]
            taken = np.stack([rows[own], target[own]])[:, : self.settings.lesson_rows - at].astype(np.int64)
            index, follows = torch.from_numpy(taken).to(stream.device, non_blocking=True)
            end = self._filled[half] = at + len(index)
            self._stream[half, at:end] = stream[index]
            self._target[half, at:end] = follows
        return bool(self._whole or self._due)

    @torch.no_grad()
    def learn(self, steps: int) -> int:
        """Take steps on each lesson that is whole, whose rows are then gone; check what is due.

        Args:
            steps: On each, at least 1.

        Returns:
            Steps asked for in all; `counters` say what became of them.

        Raises:
            NothingToLearnError: no lesson is whole and no check due.
        """
        whole, due = self._whole, self._due
        if not whole and not due:
            raise NothingToLearnError(
                f"a lesson has {self.settings.lesson_rows} rows of prompts, and at most "
                f"{max(self._filled)} were collected: serve more before adapting"
            )
        for half in due:
            rows = slice(self._checked[half], self._filled[half])
            stream, target = self._stream[half, rows].float(), self._target[half, rows]
            self._judge(half, stream, target, self.settings.alarm)
            self._checked[half] = self._filled[half]
        for half in whole:
            stream, target = self._stream[half].float(), self._target[half]
            self._judge(half, stream, target, self.settings.margin, RISES_TO)
            self._measure(stream)
            for _ in range(steps):
                self._step(1 - half, stream, target)
            self._forget(half)
            self._lessons += 1
        return steps * len(whole)

    def rehearse(self) -> None:
        """Take a step on nothing and undo it, so that no later one loads or allocates."""
        self._filled = [self.settings.lesson_rows] * HALVES
        self.learn(1)
        self.reset()

    def skip(self) -> int:
        """Forget the lessons that are whole, not learned; returns how many."""
        whole = self._whole
        for half in whole:
            self._forget(half)
        return len(whole)

    @property
    def lessons(self) -> int:
        """Lessons taken since the last reset, of both heads."""
        return self._lessons

    @property
    def whole(self) -> int:
        """Lessons that are whole."""
        return len(self._whole)

    @property
    def _whole(self) -> list[int]:
        return [half for half, n in enumerate(self._filled) if n == self.settings.lesson_rows]

    @property
    def _due(self) -> list[int]:
        """Halves of which enough rows wait to be checked."""
        least, whole = self.settings.check_rows, self._whole
        gone = enumerate(zip(self._filled, self._checked, strict=True))
        return [half for half, (filled, checked) in gone if filled - checked >= least and half not in whole]

    def _forget(self, half: int) -> None:
        self._filled[half] = self._checked[half] = 0

    @property
    def counters(self) -> HeadCounters:
        """What became of the steps since the last reset; waits for the device."""
        return HeadCounters(*self._counts.tolist())

    def snapshot(self) -> Saved:
        """Copy all that adaptation changes, rows that wait for their lesson too."""
        return Saved(
            tuple(t.clone() for t in self._state), tuple(self._filled), tuple(self._checked), self._lessons
        )

    def restore(self, saved: Saved) -> None:
        """Put a snapshot back, bit for bit."""
        for tensor, value in zip(self._state, saved.tensors, strict=True):
            tensor.copy_(value)
        self._filled, self._checked, self._lessons = list(saved.filled), list(saved.checked), saved.lessons

    def reset(self) -> None:
        """Undo all adaptation and forget all rows: as if made anew, bit for bit."""
        for tensor in self._state:
            tensor.zero_()
        self.heads.copy_(self._source.expand_as(self.heads))
        self._trust.fill_(FIRST_TRUST)
        self._filled, self._checked, self._lessons = [0] * HALVES, [0] * HALVES, 0

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return (
            self.heads, self._change, self._moment, self._inverse, self._trust, self._counts, self._stream,
            self._target,
        )  # fmt: skip

    def _judge(self, half: int, stream: Tensor, target: Tensor, margin: float, rises_to: float = 1.0) -> None:
        """Send the head that answers these rows back where the unadapted one answers better by the margin."""
        adapted, unadapted = (self._loss(head, stream, target) for head in (self.heads[half], self._source))
        worse = ~(adapted <= unadapted * (1 + margin))  # not a number is worse as well
        better = adapted < unadapted * (1 - margin)
        self._trust[half] *= torch.where(worse, FALLS_TO, torch.where(better, rises_to, 1.0))
        self._trust.clamp_(LEAST_TRUST, 1.0)
        self._change[half] = torch.where(worse, 0.0, self._change[half])
        self._write(half)
        self._counts[2] += worse

    def _loss(self, head: Tensor, stream: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(stream.to(head.dtype), head).float(), target)

    def _measure(self, stream: Tensor) -> None:
        """Follow the second moment of the stream, and invert it now and then."""
        moment = stream.T @ stream / len(stream)
        followed = self._moment.lerp(moment, 1 - _MOMENT_DECAY) if self._lessons else moment
        self._moment.copy_(torch.where(moment.isfinite().all(), followed, self._moment))
        if self._lessons % _REFRESH == 0:
            damping = self.settings.damping * self._moment.diagonal().mean()
            damped = self._moment + damping * torch.eye(len(moment), device=moment.device)
            self._inverse.copy_(torch.linalg.inv_ex(damped).inverse)

    def _step(self, half: int, stream: Tensor, target: Tensor) -> None:
        """Move a head along the preconditioned gradient of the mean loss."""
        logits = F.linear(stream.to(self.heads.dtype), self.heads[half]).float()
        error = logits.softmax(dim=-1)  # [R, V]
        error[torch.arange(len(target), device=target.device), target] -= 1
        update = error.T @ (stream @ self._inverse) * (-self.settings.rate / len(target))  # [V, D]
        size = ((update @ self._moment) * update).sum().sqrt()
        finite = size.isfinite()
        most = self.settings.most_change
        bounded = update * (self._trust[half] * most / size.clamp(min=most))
        self._change[half] += torch.where(finite, bounded, 0.0)
        self._write(half)
        self._counts[:2] += torch.stack([finite, ~finite])

    def _write(self, half: int) -> None:
        self.heads[half] = self._source.float() + self._change[half]
