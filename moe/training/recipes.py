"""How the models are trained: one frozen dataclass and its four shipped instances."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Raises:
        ValueError: The energy is both weighed and budgeted, or a value is out of range.
    """

    batch_size: int
    """Samples per step."""
    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup_steps: int = 100
    balance_coefficient: float = 0.01
    z_coefficient: float = 1e-3
    """Both coefficients as in ST-MoE, arXiv 2202.08906, section 2.2."""
    balance_rate: float = 1e-2
    """Step of the balance bias, where the config has one: ten times that of arXiv 2408.15664, section 4.2,
    since a training here is a thousand steps, not a hundred thousand."""
    rotation_weight: float = 1.0
    """Weight of the rotation head's loss, where the config has one; 1 as in arXiv 1909.13231, section 2."""
    augment: float = 0.0
    """Share of the images that are changed at random, `moe.training.augment`."""
    energy_lambda: float = 0.0
    """Weight of the experts' energy in the loss, usefully 0 to 1; 0 leaves energy out."""
    energy_budget: float | None = None
    """Energy of the chosen experts at the model's own top-k, as a fraction of that of even routing."""

    def __post_init__(self) -> None:
        """Refuse a term of the loss that means nothing."""
        if not (math.isfinite(self.energy_lambda) and self.energy_lambda >= 0):
            raise ValueError(f"energy_lambda must be 0 or more, usefully 0..1, got {self.energy_lambda}")
        if not (math.isfinite(self.rotation_weight) and self.rotation_weight > 0):
            raise ValueError(f"rotation_weight must be above 0, got {self.rotation_weight}")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment must be within 0..1, got {self.augment}")
        budget = self.energy_budget
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise ValueError(
                f"energy_budget must be above 0, as a fraction of the energy of even routing, got {budget}"
            )
        if budget is not None and self.energy_lambda:
            raise ValueError(
                f"energy_lambda={self.energy_lambda} and energy_budget={budget} exclude each other: a budget "
                "finds its own lambda; give one of them"
            )

    @property
    def energy_aware(self) -> bool:
        """Whether the loss holds the experts' energy."""
        return self.energy_lambda > 0 or self.energy_budget is not None


RECIPES: dict[tuple[str, str], Recipe] = {
    ("vision", "tiny"): Recipe(batch_size=256, steps=600, learning_rate=5e-3),
    ("language", "tiny"): Recipe(batch_size=64, steps=600, learning_rate=2e-2),
    ("vision", "base"): Recipe(batch_size=512, steps=800, learning_rate=2e-4),
    ("language", "base"): Recipe(batch_size=128, steps=300, learning_rate=2e-4),
}
