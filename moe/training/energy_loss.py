"""The energy of the experts as a term of the training loss: weighed by a constant, or held to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.model.config import ModelConfig
from moe.model.losses import chosen_energy, expected_energy
from moe.model.router import Routing, route
from moe.model.transformer import width_cost
from moe.model.usage import tokens_per_expert
from moe.profiles import ProfileError, load_profile
from moe.training.recipes import Recipe

ASSUMED = "assumed from widths"
"""Source of a cost that nobody measured."""
BUDGET_RATE = 0.02
"""Growth of lambda per step with the excess of energy over the budget, both on the scale of `EnergyTerm`."""
BUDGET_DAMPING = 1.5
"""Weight of the present excess beside lambda: without it lambda and the energy swing around the budget."""
BUDGET_RAMP = 0.5
"""Share of the steps over which the budget tightens from 1: against a sudden budget lambda overshoots, and
where the answers do not suffer, nothing brings the energy back."""


class EnergyTerm:
    """The energy in the loss, and its weight.

    With a budget the weight is a Lagrange multiplier: it rises while the experts that the router chooses cost
    more than the budget and falls to 0 at the lowest while they cost less (dual ascent). The choice has no
    gradient, so the loss holds the expected energy, but the multiplier follows the choice itself (a proxy
    constraint, Cotter et al., JMLR 20, 2019); a part proportional to the excess damps it (Stooke, Achiam and
    Abbeel, arXiv 2007.03964). A push of lambda against the costs c moves the energy of even routing by lambda
    times the variance of ``c / mean(c)``, so the excess is divided by it: budgets are then reached as fast
    whatever the costs. The budget is that of the model's own top-k, whatever the step trains, and tightens
    from that of even routing over the first steps.

    Args:
        config: The model.
        recipe: A recipe that is energy-aware.
        expert_cost: Measured cost per routed token, in any unit; None assumes the experts' widths.  # [E]
        cost_source: What measured it.
        device: Where the model is.

    Attributes:
        multiplier: Weight of the energy, on the device and never waited for.  # 0-dim
        expert_cost: Cost per routed token, float32.  # [E]

    Raises:
        ValueError: The cost is of another model, no cost, or the same for all, or the budget cannot be met.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        expert_cost: Tensor | None,
        cost_source: str,
        device: torch.device,
    ) -> None:
        self.expert_cost = cost_of_experts(config, expert_cost).to(device)
        self.cost_source = ASSUMED if expert_cost is None else cost_source
        self.top_k, self.budget = config.top_k, recipe.energy_budget
        self.ramp_steps, self.step = BUDGET_RAMP * recipe.steps, 0
        self.multiplier = self.expert_cost.new_tensor(recipe.energy_lambda)
        self.response = (self.expert_cost / self.expert_cost.mean()).var(correction=0)  # 0-dim
        if (self.expert_cost == self.expert_cost[0]).all():
            raise ValueError(
                f"all {config.n_experts} experts cost {self.expert_cost[0].item():g}: there is no energy to "
                "save by choosing among them; leave energy_lambda and energy_budget out"
            )
        least = self.expert_cost.sort().values[: self.top_k].mean() / self.expert_cost.mean()
        if self.budget is not None and self.budget < least:
            raise ValueError(
                f"energy_budget={self.budget} cannot be met: the {self.top_k} cheapest experts take "
                f"{least.item():.3f} of the energy of even routing; raise it, or lower the model's top_k"
            )

    def loss(self, decisions: Sequence[Routing], balance_biases: Sequence[Tensor | None]) -> Tensor:
        """Return the term for one step's decisions, one per layer, and move the multiplier."""
        expected = [expected_energy(routing, self.expert_cost) for routing in decisions]
        weight = self.multiplier
        if self.budget is not None:
            self.step += 1
            budget = max(self.budget, 1 + (self.budget - 1) * min(1, self.step / self.ramp_steps))
            excess = (self._chosen(decisions, balance_biases) - budget) / self.response
            weight, self.multiplier = dual_step(self.multiplier, excess)
        return weight * torch.stack(expected).mean()

    def record(self) -> dict[str, Any]:
        """Return what the training record says of it, in JSON types."""
        return {
            "lambda": self.multiplier.item(),
            "budget": self.budget,
            "expert_cost": self.expert_cost.tolist(),
            "cost_source": self.cost_source,
        }

    def _chosen(self, decisions: Sequence[Routing], balance_biases: Sequence[Tensor | None]) -> Tensor:
        """Energy of the experts that the model's own top-k would choose, mean over the layers."""
        chosen = [
            route(routing.router_logits.detach(), self.top_k, balance_bias=bias)
            for routing, bias in zip(decisions, balance_biases, strict=True)
        ]
        counts = torch.stack([tokens_per_expert(routing) for routing in chosen])  # [L, E]
        return chosen_energy(counts, self.expert_cost).mean()


def dual_step(multiplier: Tensor, excess: Tensor, damping: float = BUDGET_DAMPING) -> tuple[Tensor, Tensor]:
    """One step of damped dual ascent, see `EnergyTerm`; all 0-dim.

    Args:
        multiplier: Of a term that is held to a budget.
        excess: Of what is spent over the budget, without gradient, on the scale of the term's response.
        damping: Weight of the excess beside the multiplier.

    Returns:
        The term's weight in this step, and the multiplier after it.
    """
    weight = (multiplier + damping * excess).clamp_min(0)
    return weight, (multiplier + BUDGET_RATE * excess).clamp_min(0)


def cost_of_experts(config: ModelConfig, expert_cost: Tensor | None = None) -> Tensor:
    """Return a checked cost per expert, float32, [E]: the one given, else width over the widest.

    Raises:
        ValueError: The cost is of another model, negative, not finite, or 0 throughout.
    """
    cost = width_cost(config) if expert_cost is None else expert_cost.float()
    if cost.shape != (config.n_experts,):
        raise ValueError(
            f"expert_cost needs one number for each of the {config.n_experts} experts, got shape "
            f"{tuple(cost.shape)}; is it the cost of another model?"
        )
    if not torch.isfinite(cost).all() or (cost < 0).any() or not cost.any():
        raise ValueError(
            f"expert_cost must be finite, 0 or more, and not 0 throughout, got {cost.tolist()}; "
            "measure it again"
        )
    return cost


def measured_cost(profile_path: Path, config: ModelConfig) -> tuple[Tensor, str]:
    """Read the cost of the experts from a profile: their energy, or their time where no meter exists.

    Returns:
        Cost per routed token, [E] in joules or seconds, and what measured it.

    Raises:
        ProfileError: The profile cannot be read, holds no cost of single experts, or is of other experts.
    """
    profile = load_profile(profile_path)
    measured = profile.model["config"]
    here = config.to_dict()
    for name in ("task", "d_model", "expert_widths", "zero_computation"):
        if measured.get(name) != here[name]:
            raise ProfileError(
                f"{profile_path} was measured with experts of another model: {name} is "
                f"{measured.get(name)}, here {here[name]}; measure this model with `python -m moe.profiling`"
            )
    for name in ("expert_energy_j", "expert_latency_s"):
        cost = getattr(profile, name)
        if cost is not None:
            return torch.as_tensor(cost, dtype=torch.float32), f"measured: {name}, {profile.device}"
    raise ProfileError(
        f"{profile_path} holds neither expert_energy_j nor expert_latency_s, the cost of single experts; "
        "measure it again with `python -m moe.profiling`, or leave the cost to be assumed from widths"
    )
