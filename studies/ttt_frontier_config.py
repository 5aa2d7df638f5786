"""Settings of the frontier of accuracy against energy: methods, models, streams and sizes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe import ttt
from moe.data.corruptions import KINDS
from moe.data.streams import Schedule, StreamConfig
from moe.model.config import ModelConfig, Norm, Size, model_config
from moe.model.variants import with_norm, with_stem
from studies.ttt_config import ALL_KINDS, METHODS, NEVER, Adaptation
from studies.ttt_energy import TENT, WEIGHINGS
from thermoe_env.configs import load_settings

__all__ = ["NEVER", "Frontier", "Trained", "load_frontier"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a model is, what it is trained like, and what adapts it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    stem: bool = False
    augment: float = 0.0
    norm: Norm = "batch"
    methods: tuple[str, ...] = ()
    """What adapts it, by name; none named: all."""

    def config(self, size: Size) -> ModelConfig:
        """Shape of the model."""
        config = with_norm(model_config("vision", size), self.norm)
        return with_stem(config) if self.stem else config


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
    weighed_batch_size: int
    """Images per batch where costs are weighed: enough that a GPU need not wait for its host."""
    window_s: float
    """Time for which each phase is repeated, once per weighing."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.train_batch_size, self.batch_size, self.weighed_batch_size)
        if min(counts) < 1 or self.window_s <= 0.0:
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
        for name in self.models:
            self._check_methods(name)
        for size in self.sizes:
            for name in self.streams:
                self.stream_config(name, size)

    def _check_methods(self, model: str) -> None:
        trained, chosen = self.models[model], self.models[model].methods
        if chosen and (TENT not in chosen or set(chosen) - set(self.methods)):
            raise ValueError(
                f"models.{model}.methods must be of {tuple(self.methods)}, {TENT!r} among them, got {chosen}"
            )
        for name, method in self.methods_of(model).items():
            norms = METHODS[method.method].norms
            if trained.norm not in norms:
                raise ValueError(
                    f"models.{model}: {name!r} adapts models with norms {norms}, this one has "
                    f"{trained.norm!r}; leave it out of its methods"
                )

    def methods_of(self, model: str) -> dict[str, Adaptation]:
        """What adapts a model, by name."""
        chosen = self.models[model].methods
        return {name: method for name, method in self.methods.items() if not chosen or name in chosen}

    def weighed_stream(self, size: Size) -> StreamConfig:
        """What costs are weighed on: a batch of each kind of the first stream."""
        first = next(iter(self.streams))
        one = dataclasses.replace(self.stream_config(first, size), schedule="per_shift", cycles=1)
        return dataclasses.replace(
            one, batches=len(one.kinds), batch_size=self.sizes[size].weighed_batch_size
        )

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
            models={name: self._small_model(name) for name in small.models},
            streams={n: dataclasses.replace(stream, step=small.step) for n, stream in self.streams.items()},
            sizes={
                size: dataclasses.replace(
                    own,
                    steps=small.steps,
                    batch_size=small.batch_size,
                    weighed_batch_size=small.batch_size,
                    window_s=small.window_s,
                )
                for size, own in self.sizes.items()
            },
        )

    def _small_model(self, name: str) -> Trained:
        own = self.models[name]
        return dataclasses.replace(own, methods=tuple(m for m in own.methods if m in self.small.methods))

    def training(self, model: str, size: Size, device_type: str) -> dict[str, Any]:
        """All that the weights of a model follow from, but for the seed, as plain JSON types."""
        trained, own = _plain(self.models[model]), self.sizes[size]
        del trained["methods"]
        return {
            "size": size,
            "device": device_type,
            "steps": own.steps,
            "train_batch_size": own.train_batch_size,
            "model": trained,
        }

    def settings(self, model: str, size: Size, device_type: str) -> dict[str, Any]:
        """All that must be the same for repeats of a model to belong together, as plain JSON types."""
        return {
            **self.training(model, size, device_type),
            "batch_size": self.sizes[size].batch_size,
            "streams": {n: _plain(self.stream_config(n, size)) for n in self.streams},
            "methods": {n: _plain(method) for n, method in self.methods_of(model).items()},
            "source_batches": self.source_batches,
        }

    def weighing(self, model: str, size: Size, device_type: str) -> dict[str, Any]:
        """All that must be the same for costs to belong to repeats, as plain JSON types."""
        return {
            "repeats": self.settings(model, size, device_type),
            "batch_size": self.sizes[size].weighed_batch_size,
            "window_s": self.sizes[size].window_s,
            "weighings": WEIGHINGS,
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
