"""`ThermalMoEVectorEnv`: the batched twin as a Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from thermoe_env.mdp.fields import observation_space
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, as_overrides, load_scenario
from thermoe_env.seeding import as_seed
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.records import BatchStep


class ThermalMoEVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` twins advanced by one compiled call; `gymnasium.make_vec("ThermalMoETwin-v0", num_envs=N)`.

    Environment `i` reset with `seed` plays, bit for bit, what the single environment reset with `seed + i`
    does. Infos, of resets too, hold `reward_terms` and `cost` (each name an array [num_envs]), zero where an
    episode begins. What follows the end of an episode is `autoreset_mode`, one of Gymnasium's:

    - `SAME_STEP` (default): the next one begins in the same step. The last observation is in
      `infos["final_obs"]`, the last info in `infos["final_info"]`, marked by `infos["_final_obs"]`.
    - `NEXT_STEP`: the next step begins it, ignores the action and returns reward 0.
    - `DISABLED`: a step is refused until `reset(options={"reset_mask": mask})` has begun the next one.

    Copies (`copy.deepcopy`, pickle) continue bit for bit and share nothing that changes.
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
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        """Build the environments; the other arguments are those of `ThermalMoEEnv`.

        Args:
            num_envs: how many.
            scenario: name, YAML path or `Scenario`.
            world: `twin`.
            action_mode: `multi_discrete`, `discrete` or `box`.
            overrides: scenario keys to replace.
            max_episode_steps: intervals after which episodes are truncated; the scenario's at most, and those
                by default and for -1 (as in `gymnasium.make`).
            render_mode: none.
            autoreset_mode: what follows the end of an episode; the mode or its value, such as "NextStep".

        Raises:
            ValueError: a world other than the twin, a render mode, an unknown autoreset mode.
        """
        if world != "twin":
            raise ValueError(f"only the twin plays many episodes at once, got world {world!r}: use 'twin'")
        if render_mode is not None:
            raise ValueError(
                f"render_mode must be None, got {render_mode!r}: a single environment draws itself, "
                "gymnasium.make(id, render_mode=...)"
            )
        self.problem = Problem.of(load_scenario(scenario, **as_overrides(overrides)))
        self.world, self.action_mode, self.render_mode = world, action_mode, None
        self.num_envs = num_envs
        try:
            self._mode = AutoresetMode(autoreset_mode)
        except ValueError:
            known = [mode.value for mode in AutoresetMode]
            raise ValueError(f"autoreset_mode must be one of {known}, got {autoreset_mode!r}") from None
        self.metadata = {**self.metadata, "autoreset_mode": self._mode}
        self.batch = TwinBatch(
            self.problem,
            num_envs,
            max_steps=None if max_episode_steps == -1 else max_episode_steps,
            autoreset=self._mode is AutoresetMode.SAME_STEP,
        )
        """The core; its arrays hold the interval just played (see `TwinBatch`)."""
        self.single_observation_space = observation_space()
        self.single_action_space = self.problem.knobs.action_space(action_mode)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._running = False
        self._ended, self._all = np.zeros(num_envs, np.bool_), np.ones(num_envs, np.bool_)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | np.ndarray | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in every environment, or in some.

        Args:
            seed: of environment 0, the others follow; or one per environment. Without: the next episodes.
            options: `reset_mask`, bool [num_envs]: which environments; all by default. The others stay as
                they are: their seeds are not read, their observations are those of the last step.

        Raises:
            ValueError: a seed that is no integer in [0, 2**64), or missing for one; a mask of another form.
            ResetNeeded: a mask at the first reset, which must be of all.
        """
        one_each = isinstance(seed, Sequence) or (isinstance(seed, np.ndarray) and seed.ndim > 0)
        single = None if seed is None or one_each else as_seed(seed)
        super().reset(seed=single)
        mask = self._mask(options)
        if seed is None and self._running:
            observation = self.batch.reset_to_next(mask)
        else:
            if seed is None:
                single = int(self.np_random.integers(2**31))
            seeds: Any = seed if single is None else [single + i for i in range(self.num_envs)]
            if any(seeds[i] is None for i in np.flatnonzero(mask[: len(seeds)])):
                raise ValueError("give all environments that are reset a seed, or none of them")
            observation = self.batch.reset(seeds, mask)
        self._running = True
        self._ended = self._ended & ~mask
        return observation, self._parts(mask, mask)

    def _mask(self, options: dict[str, Any] | None) -> np.ndarray:
        """Which environments a reset is of, bool [num_envs]."""
        mask = (options or {}).get("reset_mask", self._all)
        if mask is self._all:
            return mask
        of = getattr(mask, "dtype", type(mask)), np.shape(mask)
        if of != (np.bool_, (self.num_envs,)) or not mask.any():
            raise ValueError(
                f"reset_mask must be a numpy array of bool [{self.num_envs}], not all False, got {mask!r}"
            )
        if not self._running:
            raise gym.error.ResetNeeded("call reset() of all environments before one with a reset_mask")
        return mask

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play one control interval everywhere; rewards float64 [num_envs].

        Raises:
            ValueError: an action outside the space.
            ResetNeeded: before the first reset; in mode `DISABLED` where an episode has ended.
        """
        if not self._running:
            raise gym.error.ResetNeeded("call reset() before step(): no episode is running")
        begin = None
        if self._mode is not AutoresetMode.SAME_STEP and self._ended.any():
            if self._mode is AutoresetMode.DISABLED:
                raise gym.error.ResetNeeded(
                    f"the episodes of environments {np.flatnonzero(self._ended).tolist()} have ended: begin "
                    'the next by reset(options={"reset_mask": terminated | truncated}) before step()'
                )
            begin = self._ended
        step = self.batch.step(self.problem.knobs.indices(np.asarray(actions), self.action_mode), begin)
        self._ended = step.terminated | step.truncated
        return step.observation, step.reward, step.terminated, step.truncated, self._infos(step)

    def _infos(self, step: BatchStep) -> dict[str, Any]:
        if self._mode is not AutoresetMode.SAME_STEP or not self._ended.any():
            return self._parts(self._all)
        ended = self._ended
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            final_obs[i] = step.final_observation[i].copy()
        return {
            **self._parts(self._all, ~ended),
            "final_obs": final_obs,
            "_final_obs": ended,
            "final_info": self._parts(ended, ended),
            "_final_info": ended,
        }

    def _parts(self, mask: np.ndarray, played: np.ndarray | None = None) -> dict[str, Any]:
        """Reward terms and costs, in Gymnasium's form: each key with its mask, which environments have it.

        They are 0 where no interval was `played`; by default one was everywhere.
        """
        mask = mask.copy()  # it is the caller's
        groups = {"reward_terms": (REWARD_TERMS, self.batch.terms), "cost": (COST_NAMES, self.batch.cost)}
        infos: dict[str, Any] = {}
        for key, (names, values) in groups.items():
            table = values.T.copy()
            if played is not None:
                table[:, ~played] = 0.0
            columns = dict(zip(names, table, strict=True))
            infos |= {key: {**columns, **{f"_{name}": mask for name in names}}, f"_{key}": mask}
        return infos
