"""What the head of the token service learns from prompts here, domain by domain, and what a lesson costs.

Documents are read by an engine that adapts, eight side by side. Between lessons all of a domain's documents
are answered by the heads as they are, half by each, so what is scored was never learned by who answers it.
Shapes: D domains, n tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from moe.device.meter import EnergyMeter
from moe.lm.adapt import HeadAdapter
from moe.lm.config import HALVES
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows
from moe.token_profile import Learned, TokenAdaptation, Visit

TOGETHER = 8
"""Documents that are read side by side."""
DOCUMENTS = {"cuda": 24, "cpu": 8}
"""Of each domain, a multiple of `TOGETHER`."""
MARKS = (1, 2, 4, 8)
"""Lessons of each head after which it is scored, besides the end."""
SEQUENCES = ((0, 3, 1, 4, 3, 2), (4, 0, 4, 2, 3, 0))
"""Domains that take turns, by number, to judge `moe.lesson_fit`."""
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
    bench = _Bench(engine, tokens, parts)
    curve, changed = bench.learn_each()
    return TokenAdaptation(
        lesson_rows=settings.lesson_rows, margin=settings.margin, lesson_s=lesson_s, lesson_j=lesson_j,
        curve=curve, changed=changed, visits=tuple(bench.visit(order) for order in SEQUENCES),
        provenance=provenance | {"documents": documents},
    )  # fmt: skip


class _Bench:
    """An engine that adapts, and the documents of each domain by name."""

    def __init__(self, engine: Engine, tokens: np.ndarray, parts: dict[str, np.ndarray]) -> None:
        self._engine, self._tokens, self._parts = engine, tokens, parts
        self._adapter = adapter_of(engine)
        self._base = {name: self._score(name) for name in parts}

    def _score(self, name: str) -> np.ndarray:
        """How the heads as they are answer a domain: see `Reading.means`."""
        return read(self._engine, self._tokens, self._parts[name], steps=0).means()

    def _change(self, name: str) -> Learned:
        """The same over the unadapted heads."""
        now, base = self._score(name), self._base[name]
        accuracy, confidence, entropy = (now - base)[:3].tolist()
        loss = float(now[3] / base[3] - 1.0)
        return Learned(accuracy=accuracy, confidence=confidence, entropy=entropy, loss=loss)

    def learn_each(self) -> tuple[dict[str, Any], dict[str, dict[str, Learned]]]:
        """Learn each domain alone; returns curves, and what all of it changed, see `TokenAdaptation`."""
        curves, found = {}, {}
        for name in tqdm(self._parts, desc="adaptation", unit="domain", delay=2.0):
            self._engine.reset()
            curve = self._learn(name)
            found[name] = {about: self._change(about) for about in self._parts}
            curves[name] = (*curve, (self._adapter.lessons / HALVES, found[name][name].loss))
        self._engine.reset()
        return curves, {about: {learned: of[about] for learned, of in found.items()} for about in self._parts}

    def _learn(self, name: str) -> list[tuple[float, float]]:
        """Learn from all of a domain; returns lessons of each head and change of the loss, at `MARKS`."""
        curve, marks = [(0.0, 0.0)], [*map(float, MARKS)]

        def look() -> bool:
            if marks and self._adapter.lessons >= HALVES * marks[0]:
                marks.pop(0)
                curve.append((self._adapter.lessons / HALVES, self._change(name).loss))
            return True

        read(self._engine, self._tokens, self._parts[name], 1, look)
        return curve

    def visit(self, order: Sequence[int]) -> tuple[Visit, ...]:
        """Let domains take turns, by number, each for a few lessons."""
        rng, names, visits = np.random.default_rng(sum(order)), list(self._parts), []
        self._engine.reset()
        for name in (names[number] for number in order if number < len(names)):
            lessons = self._learn_some(name, int(rng.integers(1, 9)))
            change = self._change(name)
            visits.append(Visit(domain=name, lessons=lessons, loss=change.loss, accuracy=change.accuracy))
        self._engine.reset()
        return tuple(visits)

    def _learn_some(self, name: str, lessons: int) -> int:
        """Take so many lessons of each head, or a few more; returns how many were taken in all."""
        before = self._adapter.lessons
        until = before + HALVES * lessons
        read(self._engine, self._tokens, self._parts[name], 1, lambda: self._adapter.lessons < until)
        return self._adapter.lessons - before
