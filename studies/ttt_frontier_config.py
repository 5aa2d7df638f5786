"""Settings of the frontier of accuracy against energy: methods, models, streams and sizes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe import ttt
from moe.data.corruptions import KINDS
from moe.data.streams import Schedule, StreamConfig
from moe.model.config import Size
from studies.ttt_config import ALL_KINDS, NEVER, Adaptation
from studies.ttt_energy import TENT
from thermoe_env.configs import load_settings

__all__ = ["NEVER", "Frontier", "Trained", "load_frontier"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a model is trained like."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    stem: bool = False
    augment: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepStream:
    """A stream by the length of its steps."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    schedule: Schedule
    kinds: tuple[str, ...] | Literal["all"]
    step: int
    """Batches under one shift."""
    cycles: int = 1
    severity: int = 5
    concentration: float = 0.1


@dataclass(frozen=True, kw_only=True)
class FrontierSize:
    """What depends on the size of the model."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    steps: int
    """Optimizer steps of every training."""
    train_batch_size: int
    batch_size: int
    """Images per batch of a stream."""
    window_s: float
    """Time for which each phase is repeated."""

    def __post_init__(self) -> None:
        if min(self.steps, self.train_batch_size, self.batch_size) < 1 or self.window_s <= 0.0:
            raise ValueError(f"all settings of a size must be positive, got {self}")


@dataclass(frozen=True, kw_only=True)
class Small:
    """The form for continuous integration, of the methods and models that it names."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    models: tuple[str, ...]
    methods: tuple[str, ...]
    steps: int
    batch_size: int
    step: int
    window_s: float


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The study; shipped values are in configs/studies/ttt_frontier.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    methods: dict[str, Adaptation]
    models: dict[str, Trained]
    streams: dict[str, StepStream]
    source_batches: int
    """Clean training batches on which `eata` measures gradients beforehand."""
    sizes: dict[Size, FrontierSize]
    small: Small

    def __post_init__(self) -> None:
        if TENT not in self.methods or type(self.methods[TENT].make_settings()) is not ttt.Tent:
            raise ValueError(f"methods must have TENT by the name {TENT!r}: it is weighed by its phases")
        for what in ("methods", "models"):
            unknown = set(getattr(self.small, what)) - set(getattr(self, what))
            if unknown:
                raise ValueError(
                    f"small.{what}: unknown {sorted(unknown)}; known: {tuple(getattr(self, what))}"
                )
        for size in self.sizes:
            for name in self.streams:
                self.stream_config(name, size)

    def stream_config(self, name: str, size: Size) -> StreamConfig:
        """A stream of whole steps."""
        stream = self.streams[name]
        kinds = KINDS if stream.kinds == ALL_KINDS else stream.kinds
        return StreamConfig(
            task="vision",
            kinds=kinds,
            batches=stream.step * len(kinds) * stream.cycles,
            batch_size=self.sizes[size].batch_size,
            schedule=stream.schedule,
            severity=stream.severity,
            cycles=stream.cycles,
            concentration=stream.concentration,
        )

    def made_small(self) -> Frontier:
        """The same in minutes."""
        small = self.small
        return dataclasses.replace(
            self,
            methods={name: self.methods[name] for name in small.methods},
            models={name: self.models[name] for name in small.models},
            streams={n: dataclasses.replace(stream, step=small.step) for n, stream in self.streams.items()},
            sizes={
                size: dataclasses.replace(
                    own, steps=small.steps, batch_size=small.batch_size, window_s=small.window_s
                )
                for size, own in self.sizes.items()
            },
        )

    def settings(self, model: str, size: Size, device_type: str) -> dict[str, Any]:
        """All that must be the same for repeats of a model to belong together, as plain JSON types."""
        return {
            "size": size,
            "device": device_type,
            **dataclasses.asdict(self.sizes[size]),
            "streams": {n: _plain(self.stream_config(n, size)) for n in self.streams},
            "methods": {n: _plain(method) for n, method in self.methods.items()},
            "model": _plain(self.models[model]),
            "source_batches": self.source_batches,
        }


def _plain(value: Any) -> Any:
    """Fields as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def load_frontier(config: str = "ttt_frontier") -> Frontier:
    """Read the settings: name in configs/studies, or path of a YAML file.

    Raises:
        ScenarioError: The file is no YAML, or a key is unknown, missing or refused.
    """
    return load_settings(Frontier, "studies", config)
