"""What the head of the token service learns from prompts here, domain by domain, and what a lesson costs.

Documents are read by an engine that adapts, eight side by side. Between lessons all of a domain's documents
are answered by the heads as they are, half by each, so what is scored was never learned by who answers it.
Shapes: D domains, n tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from moe.device.meter import EnergyMeter
from moe.lm.adapt import HALVES, HeadAdapter
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows
from moe.service.adaptation import learn, start_unadapted
from moe.token_profile import Learned, TokenAdaptation

TOGETHER = 8
"""Documents that are read side by side."""
DOCUMENTS = {"cuda": 24, "cpu": 8}
"""Of each domain, a multiple of `TOGETHER`."""
MARKS = (1, 2, 4, 8)
"""Lessons of each head after which it is scored, besides the end."""
SEQUENCES = ((0, 3, 1, 4, 3, 2), (4, 0, 4, 2, 3, 0))
"""Domains that take turns, by number, to judge `moe.service.adaptation`."""
WINDOW_S = 2.0
"""For which the cost of a lesson is measured."""


@dataclass(frozen=True)
class Reading:
    """How each of the tokens behind rows was answered."""

    loss: np.ndarray
    """Nats.  # [n]"""
    right: np.ndarray
    """Bool.  # [n]"""
    confidence: np.ndarray
    """[n]"""
    entropy: np.ndarray
    """[n]"""
    target: np.ndarray
    """The tokens.  # [n]"""

    def means(self) -> np.ndarray:
        """Accuracy, confidence, entropy and loss.  # [4]."""
        return np.array([of.mean() for of in (self.right, self.confidence, self.entropy, self.loss)])


def adapter_of(engine: Engine) -> HeadAdapter:
    """What learns in an engine that adapts."""
    assert engine.adapter is not None
    return engine.adapter


def read(
    engine: Engine, tokens: np.ndarray, chosen: np.ndarray, steps: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> Reading:  # fmt: skip
    """Read documents from beginning to end, answered and, after that, learned from.

    Args:
        engine: captured, empty, and adapting as it was left.
        tokens: of all documents.  # [N, S + 1]
        chosen: numbers of those to read, a multiple of `TOGETHER`.
        steps: of each lesson; 0: nothing is learned.
        goes_on: asked behind every step of the engine.
    """
    adapter, last, found = adapter_of(engine), tokens.shape[1] - 1, []
    at_once = engine.max_rows // TOGETHER
    for group in chosen.reshape(-1, TOGETHER).astype(np.int32):
        slots, more = np.array([engine.reserve(last) for _ in group], np.int32), True
        for first in range(0, last, at_once):
            position = np.tile(np.arange(first, min(last, first + at_once), dtype=np.int32), TOGETHER)
            each = len(position) // TOGETHER
            document = group.repeat(each)
            step = engine.launch(
                Rows(slots.repeat(each), position, document), engine.model.config.top_k,
                engine.model.config.n_experts,
            )  # fmt: skip
            target = tokens[document, position + 1]
            if steps and adapter.collect(step.stream, np.arange(len(position)), document, target):
                engine.learn(steps)
            answers = step.answers()
            found.append((answers[3], answers[0] == target, answers[1], answers[2], target))
            if not (more := goes_on()):
                break
        for slot in slots.tolist():
            engine.release(slot)
        if not more:
            break
    return Reading(*(np.concatenate(part) for part in zip(*found, strict=True)))


def price(
    engine: Engine, steps: int, meter: EnergyMeter | None, idle_w: float, window_s: float = WINDOW_S
) -> tuple[float, float | None]:
    """Seconds, and joules above idle, of a lesson; the host waits for each pair of them.

    Raises:
        GpuLostError: the device stopped answering.
        ReadingError: its counter says what cannot be.
    """
    adapter = adapter_of(engine)
    rows = HALVES * adapter.settings.lesson_rows
    stream = engine.documents.new_ones(rows, adapter.heads.shape[2]).to(adapter.heads)
    stream.normal_()
    document, target = np.arange(rows), np.arange(rows) % adapter.heads.shape[1]
    seconds: list[float] = []

    def lessons() -> None:
        adapter.collect(stream, document, document, target)
        work = engine.learn(steps)
        work.wait()
        seconds.append(work.duration_s / HALVES)

    lessons()
    seconds.clear()
    joules = None
    if meter:
        pair_j, pair_s = meter.per_run(lessons, window_s)
        joules = (pair_j - idle_w * pair_s) / HALVES
    else:
        end_s = time.perf_counter() + window_s
        while time.perf_counter() < end_s:
            lessons()
    engine.reset()
    return float(np.median(seconds)), joules


def measure_adaptation(
    engine: Engine, tokens: np.ndarray, domain: np.ndarray, names: Sequence[str], documents: int,
    meter: EnergyMeter | None, idle_w: float | None, provenance: dict[str, Any],
) -> TokenAdaptation:  # fmt: skip
    """Measure how fast each domain is learned, what that changes about every other, and the price.

    Args:
        engine: captured and empty, of one that adapts; left unadapted.
        tokens: of all documents.  # [N, S + 1]
        domain: of each.  # [N]
        names: of the domains; those without documents are left out.
        documents: of each domain, a multiple of `TOGETHER`.
        meter: of the card; None measures time alone.
        idle_w: power that is taken off, in watts; None without a meter.
        provenance: of the measurement.

    Raises:
        GpuLostError: the device stopped answering.
        ReadingError: its counter says what cannot be.
    """
    settings = adapter_of(engine).settings
    parts = {
        name: chosen[: len(chosen) // TOGETHER * TOGETHER][:documents]
        for number, name in enumerate(names)
        if len(chosen := np.flatnonzero(domain == number)) >= TOGETHER
    }
    engine.reset()
    lesson_s, lesson_j = price(engine, 1, meter, idle_w or 0.0)
    bench = _Bench(engine, tokens, list(parts.values()))
    rates, changed = bench.learn_each()
    return TokenAdaptation(
        lesson_rows=settings.lesson_rows, margin=settings.margin, lesson_s=lesson_s, lesson_j=lesson_j,
        rate=dict(zip(parts, rates.tolist(), strict=True)),
        changed={
            about: {
                learned: Learned(accuracy=row[0], confidence=row[1], entropy=row[2], loss=row[3])
                for learned, row in zip(parts, rows.tolist(), strict=True)
            }
            for about, rows in zip(parts, changed, strict=True)
        },
        error=bench.judge(rates, changed, settings.margin),
        provenance=provenance | {"documents": documents},
    )  # fmt: skip


class _Bench:
    """An engine that adapts, and the documents of each domain."""

    def __init__(self, engine: Engine, tokens: np.ndarray, parts: list[np.ndarray]) -> None:
        self._engine, self._tokens, self._parts = engine, tokens, parts
        self._base = np.stack([self._score(d) for d in range(len(parts))])  # [D, 4]

    def _score(self, d: int) -> np.ndarray:
        """How the heads as they are answer a domain: see `Reading.means`."""
        return read(self._engine, self._tokens, self._parts[d], steps=0).means()

    def _change(self, d: int) -> np.ndarray:
        """The same over the unadapted heads: differences, of the loss relative.  # [4]."""
        now, base = self._score(d), self._base[d]
        return np.append((now - base)[:3], now[3] / base[3] - 1.0)

    def learn_each(self) -> tuple[np.ndarray, np.ndarray]:
        """Learn each domain alone; returns rates [D] and changes [about D, learned D, 4]."""
        n = len(self._parts)
        rates, changed = np.zeros(n), np.zeros((n, n, 4))
        for d in tqdm(range(n), desc="adaptation", unit="domain", delay=2.0):
            self._engine.reset()
            curve = self._learn(d)
            changed[:, d] = [self._change(about) for about in range(n)]
            curve.append((adapter_of(self._engine).lessons / HALVES, float(changed[d, d, 3])))
            rates[d] = fitted_rate(curve)
        self._engine.reset()
        return rates, changed

    def _learn(self, d: int) -> list[tuple[float, float]]:
        """Learn from all of a domain; returns lessons of each head and change of the loss, at `MARKS`."""
        adapter, curve, marks = adapter_of(self._engine), [(0.0, 0.0)], [*map(float, MARKS)]

        def look() -> bool:
            if marks and adapter.lessons >= HALVES * marks[0]:
                marks.pop(0)
                curve.append((adapter.lessons / HALVES, float(self._change(d)[3])))
            return True

        read(self._engine, self._tokens, self._parts[d], 1, look)
        return curve

    def _learn_some(self, d: int, lessons: int) -> int:
        """Take so many lessons of each head, or a few more; returns how many were taken in all."""
        adapter = adapter_of(self._engine)
        before = adapter.lessons
        until = before + HALVES * lessons
        read(self._engine, self._tokens, self._parts[d], 1, lambda: adapter.lessons < until)
        return adapter.lessons - before

    def judge(self, rates: np.ndarray, changed: np.ndarray, margin: float) -> dict[str, float]:
        """Let domains take turns, some briefly, and compare how they are answered with what is predicted."""
        rng, errors = np.random.default_rng(0), []
        weights = np.zeros(len(rates) + 1)
        loss = with_unadapted(changed[..., 3])
        for order in SEQUENCES:
            self._engine.reset()
            start_unadapted(weights)
            for d in (d for d in order if d < len(rates)):
                for _ in range(self._learn_some(d, int(rng.integers(1, 9)))):
                    learn(weights, d, 1.0 / HALVES, rates[d], loss[d], margin)
                errors.append(weights[1:] @ changed[d] - self._change(d))
        self._engine.reset()
        error = np.sqrt(np.square(errors).mean(axis=0))
        return {"points": float(len(errors)), "loss_rmse": float(error[3]), "accuracy_rmse": float(error[0])}


def with_unadapted(table: np.ndarray) -> np.ndarray:
    """A table [about, learned] with a column of zeros for the unadapted head in front."""
    return np.pad(table, [(0, 0), (1, 0), *[(0, 0)] * (table.ndim - 2)])


def fitted_rate(curve: Iterable[tuple[float, float]]) -> float:
    """Share r of what is left that one lesson brings, by least squares of G (1 - (1 - r)^lessons), any G.

    Args:
        curve: (lessons, change) pairs.
    """
    lessons, change = np.array(list(curve)).T

    def error(rate: float) -> float:
        shape = 1.0 - (1.0 - rate) ** lessons
        return float(np.square(change - shape * (shape @ change / (shape @ shape))).sum())

    found: Any = minimize_scalar(error, bounds=(0.01, 1.0), method="bounded")
    return float(found.x)
