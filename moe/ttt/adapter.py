"""One model's adaptation, as a service holds it: a method and its settings, a group, and a guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from torch import Tensor

from moe.model.config import TTT_METHODS, Method
from moe.model.transformer import MoEModel
from moe.ttt.bank import bank
from moe.ttt.groups import Group
from moe.ttt.guard_settings import GuardCounters, GuardSettings
from moe.ttt.guards import Guard
from moe.ttt.neo import PLAIN, neo
from moe.ttt.settings import (
    Bank,
    BatchStatistics,
    DynamicEvaluation,
    Eata,
    Eva,
    Neo,
    Roid,
    Rotation,
    Sar,
    Settings,
    Tent,
)
from moe.ttt.state import AdaptationState, Saved, start
from moe.ttt.steps import Step, smallest_batch

SETTINGS: dict[Method, type[Settings]] = {
    "batch_statistics": BatchStatistics,
    "tent": Tent,
    "eata": Eata,
    "sar": Sar,
    "roid": Roid,
    "eva": Eva,
    "rotation": Rotation,
    "neo": Neo,
    "bank": Bank,
    "dynamic_evaluation": DynamicEvaluation,
}
METHODS: dict[Method, tuple[type[Settings], Callable[..., Step]]] = {
    name: (kind, {**PLAIN, Neo: neo, Bank: bank}[kind]) for name, kind in SETTINGS.items()
}
"""Name -> (type of the settings, function). A type of settings picks its function."""


class Adapter:
    """Takes the adaptation steps of one model, and can undo them.

    Attributes:
        model: What adapts.
        settings: Of the method.
        method: Function that takes a step.
        state: What it remembers.
        guard: What watches over the steps, or None.
        adapted: Whether a step was kept since the start or the last reset.
        changed: Whether the last `adapt` put the state of another shift in force (`bank`). Inputs that were
            answered just before are worth answering again.
    """

    def __init__(
        self,
        model: MoEModel,
        settings: Settings | None = None,
        group: Group = "norms",
        guard: GuardSettings | None = GuardSettings(),  # noqa: B008  (immutable)
    ) -> None:
        """Prepare an unadapted model, see `moe.ttt.start`.

        Args:
            model: Model to adapt.
            settings: Of a method in `METHODS`; default: `Tent()`.
            group: Parameters that adapt.
            guard: Limits of the guard; None: unguarded.

        Raises:
            ValueError: The method is for another task, or the model lacks what it needs.
        """
        self.model, self.settings = model, Tent() if settings is None else settings
        name, self.method = _method_of(self.settings)
        fitting = TTT_METHODS[model.config.task]
        if name not in fitting:
            raise ValueError(f"{name} is not for task {model.config.task!r}; use one of {fitting}")
        self.state: AdaptationState = start(model, self.settings, group)
        self.guard = None if guard is None else Guard(model, self.state, guard)
        self.adapted = self.changed = False
        self._counters = GuardCounters()

    @property
    def counters(self) -> GuardCounters:
        """What became of the steps so far, without a guard too; a reset does not clear them."""
        if self.guard is None:
            return self._counters
        own, seen = self._counters, self.guard.counters
        return GuardCounters(*(getattr(own, f.name) + getattr(seen, f.name) for f in fields(GuardCounters)))

    @property
    def smallest_batch(self) -> int:
        """Fewest inputs that a step can be taken on: one sample has no batch statistics."""
        return smallest_batch(self.model)

    def adapt(
        self,
        inputs: Tensor,
        answers: Tensor,
        steps: int,
        top_k: int | None = None,
        routing_bias: float = 0.0,
    ) -> int:
        """Take steps on inputs that were answered, until one is not kept; too few inputs are no step.

        Args:
            inputs: Inputs to learn from.  # [B, ...]
            answers: Logits given to them before the first step, for the guard.  # [B, C] or [B, S, C]
            steps: Most steps to take.
            top_k: Experts per token; None means the config's.
            routing_bias: Pull to cheap experts.

        Returns:
            Steps kept; `counters` say what became of the others.

        Raises:
            AdaptationDiverged: Unguarded, the loss of a step is not a number; the step was not taken.
        """
        self.changed = False
        if steps and len(inputs) < self.smallest_batch:
            self._count("empty")
            return 0
        kept = 0
        while kept < steps and self._step(inputs, answers, top_k, routing_bias, served=kept == 0):
            kept += 1
            self.adapted = True
        return kept

    def rescue(self) -> bool:
        """Go back after answers that are not finite; returns whether there was a guarded step to undo."""
        if self.guard is None or not self.adapted:
            return False
        self.restore(self.guard.good)
        self._count("non_finite")
        self._count("rollbacks")
        return True

    def snapshot(self) -> Saved:
        """Copy all that adaptation has changed."""
        return self.state.snapshot(self.model)

    def restore(self, saved: Saved) -> None:
        """Put a snapshot back, bit for bit; the guard takes it for good and forgets what it saw."""
        self.state.restore(self.model, saved)
        self.adapted = saved is not self.state.source
        if self.guard is not None:
            self.guard.reset()

    def reset(self) -> None:
        """Undo all adaptation: weights, statistics, optimizer, averages, and the guard's memory."""
        self.restore(self.state.source)

    def _step(
        self, inputs: Tensor, answers: Tensor, top_k: int | None, routing_bias: float, served: bool
    ) -> bool:
        """Take a step; returns whether it was taken and kept. `served`: the model is as it answered."""
        if self.guard is not None:
            step = self.guard.step(
                self.method, inputs, answers, self.settings, top_k, routing_bias, served=served
            )
            self.changed = self.changed or (step is not None and step.changed)
            return step is not None and step.selected > 0
        given = answers if served else None
        step = self.method(self.model, self.state, inputs, self.settings, top_k, routing_bias, given)
        self._count("steps" if step.selected else "empty")
        self.changed = self.changed or step.changed
        return step.selected > 0

    def _count(self, what: str) -> None:
        self._counters = replace(self._counters, **{what: getattr(self._counters, what) + 1})


def _method_of(settings: Settings) -> tuple[Method, Callable[..., Step]]:
    for name, (kind, method) in METHODS.items():
        if type(settings) is kind:
            return name, method
    raise ValueError(f"settings must be those of one of {tuple(METHODS)}, got {type(settings).__name__}")
