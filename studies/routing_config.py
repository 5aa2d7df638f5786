"""Settings of the routing study: the variants of the model and the grid they are measured on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from moe.model.config import ModelConfig, Size, Task, ZeroComputation, model_config
from moe.model.variants import even, fixed_k, with_zero_computation
from moe.training.recipes import Recipe
from studies.repeats import short_recipe
from thermoe_env.configs import load_settings

Layout = Literal["even", "uneven", "zero-computation"]
REFERENCE, BASE = "standard", "uneven"
"""Variants to compare with: the standard Mixture-of-Experts, and ours without a further loss."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to build and train the model."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    experts: Layout
    """`uneven` as shipped, `even` of one width, `zero-computation` those and some of no width."""
    fixed_k: int | None = None
    """Experts per token in training; None trains for all numbers."""
    recipe: dict[str, float] = field(default_factory=dict)
    """Fields of `moe.training.recipes.Recipe` that differ."""

    def __post_init__(self) -> None:
        known = {f.name for f in dataclasses.fields(Recipe)}
        if not set(self.recipe) <= known:
            raise ValueError(
                f"unknown recipe keys {sorted(set(self.recipe) - known)}; known: {sorted(known)}"
            )


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """What depends on the size of the model."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    steps: dict[Task, int]
    """Optimizer steps of every training."""
    batch_size: dict[Task, int]
    """Requests per micro-batch whose cost is measured."""
    window_s: float
    """Time under load per cell and round."""
    rounds: int
    """Windows of a cell; their median counts."""
    test_samples: dict[Task, int] | None
    """Images or text windows that quality is measured on; None means the whole test split."""

    def __post_init__(self) -> None:
        numbers = [*self.steps.values(), *self.batch_size.values(), self.rounds]
        numbers += (self.test_samples or {}).values()
        if min(numbers) < 1 or self.window_s <= 0.0:
            raise ValueError(f"all settings of a size must be positive, got {self}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study; shipped values are in configs/studies/routing.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    variants: dict[str, Variant]
    zero_computation: tuple[ZeroComputation, ...]
    """Experts without width that the layout `zero-computation` adds."""
    expert_counts: tuple[int, ...]
    routing_biases: tuple[float, ...]
    usage_expert_count: int
    """Experts per token at which routing is also counted on shifted inputs."""
    shift: dict[Task, str]
    """The shifted inputs, as `moe.data.pools` names them."""
    quality_margin: float
    """What a cheaper setting may cost, as a fraction of all answers."""
    sizes: dict[Size, SizeSettings]

    def __post_init__(self) -> None:
        standard = self.variants.get(REFERENCE)
        if standard is None or standard.fixed_k not in self.expert_counts or BASE not in self.variants:
            raise ValueError(
                f"variants need {BASE!r} and, to compare with, {REFERENCE!r} with a fixed_k of "
                f"{self.expert_counts}; got {self.variants}"
            )
        if self.usage_expert_count not in self.expert_counts:
            raise ValueError(
                f"usage_expert_count must be one of {self.expert_counts}, got {self.usage_expert_count}"
            )
        if self.routing_biases[0] != 0.0:
            raise ValueError(f"routing_biases must start with 0, got {self.routing_biases}")

    def model_config(self, name: str, task: Task, size: Size) -> ModelConfig:
        """Shape of a variant."""
        variant, config = self.variants[name], model_config(task, size)
        if variant.experts == "even":
            config = even(config)
        elif variant.experts == "zero-computation":
            config = with_zero_computation(config, self.zero_computation)
        return config if variant.fixed_k is None else fixed_k(config, variant.fixed_k)

    def recipe(self, name: str, task: Task, size: Size) -> Recipe:
        """How a variant is trained."""
        steps = self.sizes[size].steps[task]
        return short_recipe(task, size, steps, **self.variants[name].recipe)

    def biases(self, name: str) -> tuple[float, ...]:
        """Routing biases of a variant: none for experts of one width, whose equal cost changes nothing."""
        return (0.0,) if self.variants[name].experts == "even" else self.routing_biases

    def settings(self, task: Task, size: Size, device_type: str) -> dict[str, Any]:
        """All that must be the same for repeats to belong together, as plain JSON types."""
        own = dataclasses.asdict(self.sizes[size])
        return {
            "task": task,
            "size": size,
            "device": device_type,
            **{key: value[task] if isinstance(value, dict) else value for key, value in own.items()},
            "variants": {name: dataclasses.asdict(variant) for name, variant in self.variants.items()},
            "zero_computation": list(self.zero_computation),
            "expert_counts": list(self.expert_counts),
            "routing_biases": list(self.routing_biases),
            "usage_expert_count": self.usage_expert_count,
            "shift": self.shift[task],
        }


def load_study(config: str = "routing", steps: int | None = None) -> Study:
    """Read the settings.

    Args:
        config: Name in configs/studies, or path of a YAML file.
        steps: Optimizer steps in place of those of the file.

    Raises:
        ScenarioError: The file is no YAML, or a key is unknown, missing or refused.
    """
    study = load_settings(Study, "studies", config)
    if steps is None:
        return study
    sizes = {
        size: dataclasses.replace(own, steps=dict.fromkeys(own.steps, steps))
        for size, own in study.sizes.items()
    }
    return dataclasses.replace(study, sizes=sizes)
