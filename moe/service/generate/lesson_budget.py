"""An energy budget that pays for the lessons of the token service (`moe.lm.adapt`)."""

from __future__ import annotations

import numpy as np

from moe.lm.engine.rows import Rows
from moe.service.budget import EnergyBudget
from moe.step_cost import StepCost, StepWork

_PURE, _MIXED = range(2)
"""Kinds of steps: of answers alone, and with prompts beside them."""


class LessonBudget:
    """Joules that serving earns and lessons spend, by what a profile says that both take.

    A card's counter ticks too slowly to charge single lessons. What was served since the last look is earned
    at its end, step for step at the mean of each kind of steps.
    """

    def __init__(self, energy: EnergyBudget, cost: StepCost, rates: np.ndarray, lesson_j: float) -> None:
        """Take what may be spent and what work takes.

        Args:
            energy: the purse.
            cost: of steps.
            rates: joules above idle per unit of each of `moe.step_cost.TERMS`.  # [F]
            lesson_j: of a step of a lesson, above idle.
        """
        self._energy, self._cost, self._rates, self._lesson_j = energy, cost, rates, lesson_j
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._energy.reset()
        self._paid_until = 0.0
        self._served = np.zeros((2, 7))  # sums of the parts of `StepWork`, and steps

    def serve(self, rows: Rows, prompts: bool, top_k: int, readable: int) -> None:
        """Note a step that was launched.

        Args:
            rows: of it.
            prompts: whether some are of prompts.
            top_k: experts per token.
            readable: experts of a layer that may be read.
        """
        n, cached = len(rows.slot), float(rows.position.sum() + len(rows.slot))
        work = (n, 0, cached, 0.0)
        if prompts:
            last = np.append(rows.slot[1:] != rows.slot[:-1], True)  # of each sequence, whose rows ascend
            first = np.append(True, last[:-1])
            alone = last & first
            of_prompts = ~alone
            work = (
                int(alone.sum()), int(of_prompts.sum()), float(rows.position[last].sum() + last.sum()),
                float(rows.position[of_prompts].sum() + of_prompts.sum()),
            )  # fmt: skip
        self._served[_MIXED if prompts else _PURE] += (*work, top_k, readable, 1.0)

    def pay(self, now: float, steps: int) -> bool:
        """Spend what so many steps of lessons take, or refuse them all; `now` in seconds of service."""
        self._earn(now)
        return self._energy.charge(steps * self._lesson_j)

    def share(self, now: float) -> float:
        """What can be spent over all that can be banked; `now` in seconds of service."""
        self._earn(now)
        return self._energy.share

    def _earn(self, now: float) -> None:
        joules = 0.0
        for *sums, count in self._served:
            if count:
                decode, prompts, cached, pairs, k, readable = (part / count for part in sums)
                k = round(k)
                read = float(self._cost.reads(decode, prompts, k, readable))
                amounts = self._cost.amounts(StepWork(decode, prompts, cached, pairs, k, read))
                joules += count * float(amounts @ self._rates)
        self._served[:] = 0.0
        if now > self._paid_until:
            self._energy.earn(now - self._paid_until, joules)
            self._paid_until = now
