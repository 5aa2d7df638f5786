"""`ThermalMoEVectorEnv`: the batched twin as a Gymnasium vector environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from thermoe_env.mdp.fields import observation_space
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario
from thermoe_env.twin.core import BatchStep, TwinBatch


class ThermalMoEVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` twins advanced by one compiled call; `gymnasium.make_vec("ThermalMoETwin-v0", num_envs=N)`.

    Environment `i` reset with `seed` plays, bit for bit, what the single environment reset with `seed + i`
    does. An environment whose episode ends starts the next one in the same step: its last observation is in
    `infos["final_obs"]`, its last info in `infos["final_info"]`, marked by `infos["_final_obs"]`. Infos hold
    `reward_terms` and `cost` (each name an array [num_envs]); those of finished environments are marked in
    `final_info` alone.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        scenario: str | Scenario = "default",
        world: str = "twin",
        action_mode: str = "multi_discrete",
        overrides: dict[str, Any] | None = None,
        max_episode_steps: int | None = None,
        render_mode: None = None,
    ) -> None:
        """Build the environments; the arguments are those of `ThermalMoEEnv`.

        Raises:
            ValueError: a world other than the twin, or a render mode.
        """
        if world != "twin":
            raise ValueError(f"only the twin plays many episodes at once, got world {world!r}: use 'twin'")
        if render_mode is not None:
            raise ValueError(
                f"render_mode must be None, got {render_mode!r}: a single environment draws itself, "
                "gymnasium.make(id, render_mode=...)"
            )
        self.problem = Problem.of(load_scenario(scenario, **(overrides or {})))
        self.world, self.action_mode, self.render_mode = world, action_mode, None
        self.num_envs = num_envs
        self.batch = TwinBatch(self.problem, num_envs, max_steps=max_episode_steps)
        """The core; its arrays hold the interval just played (see `TwinBatch`)."""
        self.single_observation_space = observation_space()
        self.single_action_space = self.problem.knobs.action_space(action_mode)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._running = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in every environment.

        Args:
            seed: of environment 0, the others follow; or one per environment. Without: the next episodes.
            options: not used.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is None and self._running:
            return self.batch.reset_to_next(), {}
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        if None in seeds:
            raise ValueError("give all environments a seed, or none of them")
        self._running = True
        return self.batch.reset(np.array(seeds, np.uint64)), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play one control interval everywhere; rewards float64 [num_envs].

        Raises:
            ValueError: an action outside the space.
            ResetNeeded: before the first reset.
        """
        if not self._running:
            raise gym.error.ResetNeeded("call reset() before step(): no episode is running")
        step = self.batch.step(self.problem.knobs.indices(np.asarray(actions), self.action_mode))
        return step.observation, step.reward, step.terminated, step.truncated, self._infos(step)

    def _infos(self, step: BatchStep) -> dict[str, Any]:
        done = step.terminated | step.truncated
        if not done.any():
            return self._parts(~done)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(done):
            final_obs[i] = step.final_observation[i].copy()
        return {
            **self._parts(~done),
            "final_obs": final_obs,
            "_final_obs": done,
            "final_info": self._parts(done),
            "_final_info": done,
        }

    def _parts(self, mask: np.ndarray) -> dict[str, Any]:
        """Reward terms and costs, in Gymnasium's form: each key with its mask, which environments have it."""
        groups = {"reward_terms": (REWARD_TERMS, self.batch.terms), "cost": (COST_NAMES, self.batch.cost)}
        infos: dict[str, Any] = {}
        for key, (names, values) in groups.items():
            columns = dict(zip(names, values.T.copy(), strict=True))
            infos |= {key: {**columns, **{f"_{name}": mask for name in names}}, f"_{key}": mask}
        return infos
