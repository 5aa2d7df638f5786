"""The service of tokens event by event: the live code, its queue, its sequences, over a modelled engine.

The engine runs no model. A step lasts and costs what `moe.step_cost` says of its rows; the clock is the sum
of what was waited for. A token is right by a draw of its own, below the measured accuracy of the knobs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe.lm.adapt import HeadCounters
from moe.lm.config import AHEAD, BLOCK
from moe.lm.engine.blocks import Blocks, blocks_for
from moe.lm.engine.rows import Rows
from moe.step_cost import StepCost, StepWork


@dataclass
class ModelledStep:
    """A step of the modelled engine, see `moe.lm.engine.engine.Step`."""

    engine: ModelledEngine
    started_s: float
    ended_s: float
    found: np.ndarray
    stream: None = None

    def done(self) -> bool:
        return self.ended_s <= self.engine.now_s

    def answers(self) -> np.ndarray:
        self.engine.now_s = max(self.engine.now_s, self.ended_s)
        return self.found

    def seconds_since(self, mark: float) -> float:
        return self.ended_s - mark

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass
class ModelledLessons:
    """What `moe.lm.adapt.HeadAdapter` counts: rows of either half of the documents, up to a lesson's."""

    lesson_rows: int
    lesson_s: float
    filled: list[int]
    lessons: int = 0

    def collect(self, stream: Any, rows: np.ndarray, document: np.ndarray, target: np.ndarray) -> bool:
        for half in range(2):
            here = int((document % 2 == half).sum())
            self.filled[half] = min(self.lesson_rows, self.filled[half] + here)
        return self.whole > 0

    @property
    def whole(self) -> int:
        return sum(n == self.lesson_rows for n in self.filled)

    def skip(self) -> int:
        whole, self.filled = self.whole, [n % self.lesson_rows for n in self.filled]
        return whole

    @property
    def counters(self) -> HeadCounters:
        return HeadCounters(steps=self.lessons)


@dataclass
class ModelledWork:
    """A lesson, see `moe.lm.engine.step.Work`."""

    engine: ModelledEngine
    ended_s: float
    duration_s: float

    def done(self) -> bool:
        return self.ended_s <= self.engine.now_s

    def wait(self) -> None:
        self.engine.now_s = max(self.engine.now_s, self.ended_s)


class ModelledEngine:
    """What `GenerateWorkload` asks of an engine, on a clock that only waiting moves.

    Attributes:
        now_s: The host's clock.
        energy_j: Of all steps, above idle.
    """

    def __init__(
        self, cost: StepCost, config: dict[str, int], documents: np.ndarray, accuracy: Any, *, slots: int,
        max_rows: int, cache_positions: int | None = None, launch_s: float = 0.0, domain: str = "prose",
    ) -> None:  # fmt: skip
        """Model an engine.

        Args:
            cost: of steps.
            config: of the model.
            documents: their text.  # [N, S + 1]
            accuracy: function of (rows of answers, top_k, readable experts, whether prompts are read).
            slots, max_rows, cache_positions: as `Engine` has them.
            launch_s: time of the host per launch.
            domain: of all text.
        """
        self.cost, self.documents, self._accuracy = cost, documents, accuracy
        self.model = SimpleNamespace(config=SimpleNamespace(**config))
        self.max_rows, self._launch_s, self._domain = max_rows, launch_s, domain
        context = documents.shape[1] - 1
        positions = cache_positions or slots * blocks_for(context) * BLOCK
        self.blocks = Blocks(slots, context, positions // BLOCK)
        self.now_s = self._free_s = self.energy_j = 0.0
        self._ring: deque[ModelledStep] = deque()
        self._draw = np.random.default_rng(1).random(documents.shape)
        self.steps: list[tuple[float, int, int, float]] = []
        self.adapter: ModelledLessons | None = None

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def mark(self) -> float:
        return self.now_s

    def launch(self, rows: Rows, top_k: int, readable: int) -> ModelledStep:
        self.now_s += self._launch_s
        if len(self._ring) == AHEAD:
            self._ring.popleft().answers()
        _, first, count = np.unique(rows.slot, return_index=True, return_counts=True)
        decode = first[count == 1]
        prompt = np.setdiff1d(np.arange(len(rows.slot)), decode)
        ends = rows.position[first + count - 1] + 1  # rows of a slot ascend
        work = StepWork(
            len(decode), len(prompt), ends.sum(), (rows.position[prompt] + 1).sum(), top_k,
            float(self.cost.reads(len(decode), len(prompt), top_k, readable, self._domain)),
        )  # fmt: skip
        amounts = self.cost.amounts(work)
        started = max(self._free_s, self.now_s)
        self._free_s = started + float(amounts @ self.cost.time.rate)
        if self.cost.energy is not None:
            self.energy_j += float(amounts @ self.cost.energy.rate)
        accuracy = self._accuracy(max(1, len(decode)), top_k, readable)
        text = self.documents[rows.document, rows.position + 1]
        right = self._draw[rows.document, rows.position] < accuracy
        found = np.stack([np.where(right, text, -1), *np.zeros((3, len(text)))])
        step = ModelledStep(self, started, self._free_s, found)
        self._ring.append(step)
        self.steps.append((self._free_s - started, len(decode), len(prompt), work.experts_read))
        return step

    def learn(self, steps: int) -> ModelledWork:
        assert self.adapter is not None
        took = self.adapter.skip()
        self.adapter.lessons += steps * took
        duration = steps * took * self.adapter.lesson_s
        self._free_s = max(self._free_s, self.now_s) + duration
        return ModelledWork(self, self._free_s, duration)

    def reserve(self, positions: int) -> int:
        return self.blocks.reserve(positions)

    def release(self, slot: int) -> None:
        self.blocks.release(slot)

    def synchronize(self) -> None:
        while self._ring:
            self._ring.popleft().answers()

    def usage(self) -> tuple[np.ndarray, np.ndarray]:
        shape = self.model.config.n_layers, self.model.config.n_experts
        return np.ones(shape, np.int64), np.ones(shape, np.int64)

    def reset(self) -> None:
        self.synchronize()
        self.blocks.clear()
