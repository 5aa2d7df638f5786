"""Reward and costs in the forms that multi-objective and constrained learning read.

Neither needs a package beyond Gymnasium: MO-Gymnasium is told by `reward_space` and a vector for a reward,
libraries of constrained learning by a number in `info["cost"]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS

_LOW = np.array([0.0 if name == "good" else -np.inf for name in REWARD_TERMS])
_HIGH = np.array([0.0 if name == "energy" else np.inf for name in REWARD_TERMS])


class ThermalMoEMultiObjectiveEnv(ThermalMoEEnv):
    """`ThermalMoEEnv` whose reward is the vector of its terms: `mo_gymnasium.make("ThermalMoETwinMO-v0")`.

    The vector, float64 [5] in `REWARD_TERMS` order, has the scenario's prices in it, so its sum is the scalar
    reward bit for bit, and weights of 1 are the scenario's own. All terms are to be maximised: the first is
    what good answers earn, the second the price of energy, the others what debts grow by; they give back what
    is made up for.
    """

    reward_space = spaces.Box(_LOW, _HIGH, dtype=np.float64)

    @property
    def reward_dim(self) -> int:
        """Number of objectives."""
        return len(REWARD_TERMS)

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """`ThermalMoEEnv.step` with the reward's terms in place of their sum."""
        observation, _, terminated, truncated, info = super().step(action)
        return observation, self._terms.copy(), terminated, truncated, info


class ScalarCost(gym.Wrapper[np.ndarray, Any, np.ndarray, Any], RecordConstructorArgs):
    """`info["cost"]` as one number, for libraries of constrained learning; its parts are in `info["costs"]`.

    Safety-Gymnasium's environments return the cost as a sixth value of `step`; its wrappers between that form
    and Gymnasium's carry it in `info["cost"]`. `info["cost_sum"]` is that of the episode so far.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any], weights: Mapping[str, float] | None = None) -> None:
        """Wrap an environment.

        Args:
            env: any of this package's single environments.
            weights: of the costs by their names (`COST_NAMES`), others 0; by default seconds above the
                temperature limit alone.

        Raises:
            ValueError: a name that is no cost, no name, or a weight that is not positive and finite.
        """
        weights = {"above_limit_s": 1.0} if weights is None else dict(weights)
        unknown = sorted(set(weights) - set(COST_NAMES))
        if unknown or not weights:
            raise ValueError(f"weights must name costs of {COST_NAMES}, got {unknown or 'none'}")
        if not all(0.0 < weight < math.inf for weight in weights.values()):
            raise ValueError(
                f"weights of costs must be positive and finite, got {weights}; leave out the rest"
            )
        RecordConstructorArgs.__init__(self, weights=weights)
        super().__init__(env)
        self._weights, self._sum = weights, 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; nothing has been charged yet."""
        self._sum = 0.0
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "cost": 0.0, "cost_sum": 0.0}

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Play an interval; its cost is the weighted sum of its costs."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        costs = info["cost"]
        cost = math.fsum(weight * costs[name] for name, weight in self._weights.items())
        self._sum += cost
        info |= {"cost": cost, "costs": costs, "cost_sum": self._sum}
        return observation, reward, terminated, truncated, info
