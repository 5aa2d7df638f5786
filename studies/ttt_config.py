"""Settings of the study of test-time training: what adapts, when, for how much, and on which streams."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from moe import ttt
from moe.data.corruptions import KINDS
from moe.data.streams import Schedule, StreamConfig
from moe.model.config import NORMS, TASKS, TTT_METHODS, Norm, Size, Task, model_config
from moe.service.gates import Always, ConfidenceChange, EntropyThreshold, Gate, Periodic
from moe.ttt import Group
from studies.repeats import StudyError
from thermoe_env.configs import load_settings

ALL_KINDS = "all"
"""In place of a stream's kinds: every corruption."""


@dataclass(frozen=True)
class Method:
    """A method of `moe.ttt`: what it needs, and how a step is taken."""

    settings: type[ttt.Settings]
    step: Callable[..., ttt.Step]
    task: Task
    norms: tuple[Norm, ...] = NORMS
    """Norms of the models that it can adapt."""


_NORMS_OF: dict[str, tuple[Norm, ...]] = {
    "batch_statistics": ("batch",),
    "bank": ("batch",),
    "neo": ("batch", "group", "layer"),
}
METHODS: dict[str, Method] = {
    name: Method(*ttt.METHODS[name], task, _NORMS_OF.get(name, NORMS))
    for task in TASKS
    for name in TTT_METHODS[task]
}
METHODS["rms_dynamic_evaluation"] = Method(ttt.RmsDynamicEvaluation, ttt.dynamic_evaluation, "language")
"""Those that a service can take, and the one that measures gradients beforehand."""
RULES: dict[str, Callable[..., Gate]] = {
    "always": Always,
    "periodic": Periodic,
    "entropy_threshold": EntropyThreshold,
    "confidence_change": ConfidenceChange,
}
NEVER = "never"
"""Adaptation and gate of a model that serves as it was trained, which all others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A method with its settings; fields that are not named keep the method's defaults.

    `neo` and `bank` stand on a `base`, which they have by default where none is named.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    method: str
    group: Group = "norms"
    settings: dict[str, float] = field(default_factory=dict)
    base: Adaptation | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {tuple(METHODS)}")
        known = {f.name for f in dataclasses.fields(METHODS[self.method].settings)}
        if self.base is not None and "base" not in known:
            raise ValueError(f"{self.method} stands on no other method; leave out base")
        known -= {"base"}
        if not set(self.settings) <= known:
            raise ValueError(
                f"{self.method} has no settings {sorted(set(self.settings) - known)}; known: {sorted(known)}"
            )
        self.make_settings()

    def make_settings(self) -> ttt.Settings:
        """Settings of the method."""
        values: dict[str, Any] = dict(self.settings)
        if self.base is not None:
            values["base"] = self.base.make_settings()
        return METHODS[self.method].settings(**values)

    def at_rate(self, learning_rate: float | None) -> Adaptation:
        """The same at another learning rate; None keeps it."""
        if learning_rate is None:
            return self
        return dataclasses.replace(self, settings={**self.settings, "learning_rate": learning_rate})


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """A rule of `moe.service.gates` with its settings."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rule: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; known: {tuple(RULES)}")
        try:
            self.make()
        except TypeError as error:
            raise ValueError(f"{self.rule}: {error}") from error

    def make(self) -> Gate:
        """A gate that has seen nothing."""
        return RULES[self.rule](**self.settings)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream of shifts but for its length, which depends on the size."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    task: Task
    schedule: Schedule
    kinds: tuple[str, ...] | Literal["all"]
    severity: int = 5
    cycles: int = 2
    concentration: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs to make: every combination of what is listed, and the unadapted model to compare with."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    stream: str
    norms: tuple[Norm, ...]
    adaptations: tuple[str, ...]
    gates: tuple[str, ...] = ("always",)
    budgets: tuple[float | None, ...] = (None,)
    """Fractions of the serving cost that adaptation may cost; None means no limit."""
    guarded: tuple[bool, ...] = (True,)

    def __post_init__(self) -> None:
        if any(budget is not None and not 0.0 < budget < 10.0 for budget in self.budgets):
            raise ValueError(
                f"budgets are fractions of the serving cost above 0 (0 is the unadapted model, which is "
                f"always run), or null for no limit; got {self.budgets}"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stream served by one model that adapts in one way."""

    stream: str
    norm: Norm
    adaptation: str = NEVER
    gate: str = NEVER
    budget: float | None = 0.0
    guarded: bool = False

    @property
    def reference(self) -> Run:
        """The same without adaptation."""
        return Run(stream=self.stream, norm=self.norm)


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """What depends on the size of the model."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    steps: dict[Task, int | None]
    """Optimizer steps of every training; None takes the shipped model, the same for every seed."""
    train_batch_size: dict[Task, int]
    batch_size: dict[Task, int]
    """Requests per batch of a stream: images, or pieces of text of a context's length."""
    batches: dict[str, int]
    """Length of each stream."""
    learning_rates: dict[str, float]
    """Of the adaptations whose rate is not their method's default."""
    window_s: float
    """Time under each load that power is measured with, where there is a meter."""

    def __post_init__(self) -> None:
        tables = (self.steps, self.train_batch_size, self.batch_size, self.batches)
        numbers = [number for table in tables for number in table.values() if number is not None]
        if min(numbers) < 1 or self.window_s <= 0.0:
            raise ValueError(f"all settings of a size must be positive, got {self}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study; shipped values are in configs/studies/ttt.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    adaptations: dict[str, Adaptation]
    gates: dict[Task, dict[str, GateSettings]]
    streams: dict[str, Stream]
    grids: tuple[Grid, ...]
    rotation_head: bool
    """Whether the vision models that are trained learn to tell turns of an image too; `rotation` needs it."""
    source_batches: int
    """Clean training batches on which `eata` and `rms_dynamic_evaluation` measure gradients beforehand."""
    window_batches: int
    """Length of a budget's window, in the time of a batch."""
    bank_windows: int
    """Past windows whose rest may still be spent."""
    sizes: dict[Size, SizeSettings]

    def __post_init__(self) -> None:
        for grid in self.grids:
            _check_names("streams", (grid.stream,), self.streams)
            task = self.streams[grid.stream].task
            _check_names("adaptations", grid.adaptations, self.adaptations)
            _check_names(f"{task} gates", grid.gates, self.gates.get(task, {}))
            for name, norm in itertools.product(grid.adaptations, grid.norms):
                method = METHODS[self.adaptations[name].method]
                if method.task != task or norm not in method.norms:
                    raise ValueError(
                        f"{name!r} ({self.adaptations[name].method}) adapts models of task {method.task!r} "
                        f"with norms {method.norms}; the grid of stream {grid.stream!r} is of task {task!r} "
                        f"and norm {norm!r}"
                    )
        for size, own in self.sizes.items():
            _check_names("adaptations", own.learning_rates, self.adaptations)
            self.adaptations_at(size)
            for name in self.streams:
                self.stream_config(name, size)
            for task, steps in own.steps.items():
                if not (self.rotation_head and steps) and "rotation" in self._methods(task):
                    raise ValueError(
                        "'rotation' needs models trained for it: set rotation_head, and the steps of vision"
                    )
                shipped = model_config(task, size).norm
                if steps is None and any(run.norm != shipped for run in self.runs(task)):
                    raise ValueError(
                        f"steps of {task}: the shipped {size} model has norm {shipped!r}, others are trained"
                    )

    def adaptations_at(self, size: Size) -> dict[str, Adaptation]:
        """The adaptations, at the learning rates of a size."""
        rates = self.sizes[size].learning_rates
        return {name: adaptation.at_rate(rates.get(name)) for name, adaptation in self.adaptations.items()}

    def _methods(self, task: Task) -> set[str]:
        used = {run.adaptation for run in self.runs(task)} - {NEVER}
        return {self.adaptations[name].method for name in used}

    def stream_config(self, name: str, size: Size) -> StreamConfig:
        """A stream at the length of a size."""
        stream, own = self.streams[name], self.sizes[size]
        if name not in own.batches:
            raise ValueError(f"size {size!r} needs the number of batches of stream {name!r}")
        return StreamConfig(
            task=stream.task,
            kinds=KINDS if stream.kinds == ALL_KINDS else stream.kinds,
            batches=own.batches[name],
            batch_size=own.batch_size[stream.task],
            schedule=stream.schedule,
            severity=stream.severity,
            cycles=stream.cycles,
            concentration=stream.concentration,
        )

    def runs(self, task: Task) -> list[Run]:
        """All runs of a task, each once, the unadapted model of a stream and norm before the others."""
        found: dict[Run, None] = {}
        for grid in self.grids:
            if self.streams[grid.stream].task != task:
                continue
            for norm in grid.norms:
                found[Run(stream=grid.stream, norm=norm)] = None
                axes = itertools.product(grid.adaptations, grid.gates, grid.budgets, grid.guarded)
                for adaptation, gate, budget, guarded in axes:
                    run = Run(
                        stream=grid.stream, norm=norm, adaptation=adaptation, gate=gate, budget=budget,
                        guarded=guarded,
                    )  # fmt: skip
                    found[run] = None
        return list(found)

    def load(self, runs: Sequence[Run]) -> str:
        """The adaptation whose steps the power of a step is measured with: the first that has a gradient.

        Raises:
            StudyError: There is none.
        """
        for name in dict.fromkeys(run.adaptation for run in runs if run != run.reference):
            if issubclass(METHODS[self.adaptations[name].method].settings, ttt.Tent):
                return name
        raise StudyError(f"norm {runs[0].norm!r} needs an adaptation with a gradient in one of its grids")

    def settings(self, task: Task, size: Size, device_type: str) -> dict[str, Any]:
        """All that must be the same for repeats to belong together, as plain JSON types."""
        own = self.sizes[size]
        streams = {name: stream for name, stream in self.streams.items() if stream.task == task}
        return {
            "task": task,
            "size": size,
            "device": device_type,
            "steps": own.steps[task],
            "train_batch_size": own.train_batch_size[task],
            "streams": {name: dataclasses.asdict(self.stream_config(name, size)) for name in streams},
            "window_s": own.window_s,
            "adaptations": {
                name: dataclasses.asdict(adaptation)
                for name, adaptation in self.adaptations_at(size).items()
                if METHODS[adaptation.method].task == task
            },
            "gates": {name: dataclasses.asdict(value) for name, value in self.gates.get(task, {}).items()},
            "rotation_head": self.rotation_head,
            "source_batches": self.source_batches,
            "window_batches": self.window_batches,
            "bank_windows": self.bank_windows,
            "runs": [dataclasses.asdict(run) for run in self.runs(task)],
        }


def _check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown {what} {sorted(unknown)}; known: {sorted(known)}")


def load_study(config: str = "ttt") -> Study:
    """Read the settings: name in configs/studies, or path of a YAML file.

    Raises:
        ScenarioError: The file is no YAML, or a key is unknown, missing or refused.
    """
    return load_settings(Study, "studies", config)
