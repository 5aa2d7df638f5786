"""`TwinVecEnv`: the batched twin as a Stable-Baselines3 vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from thermoe_env.mdp.fields import observation_space
from thermoe_env.problem.problem import Problem
from thermoe_env.seeding import episode_seed
from thermoe_env.twin.core import TwinBatch


def fresh_seed(seed: int, number: int) -> int:
    """Seed number `number` that follows from `seed`; at least 2**32, above any seed typed by hand."""
    return (episode_seed(seed, number) >> 2) | 2**32


class TwinVecEnv(VecEnv):
    """`num_envs` twins advanced by one compiled call, with same-step autoreset.

    Environment `i` is the single `ThermalMoETwin-v0` reset with `seed + i`: the same observations, bit for
    bit, and the same rewards (as float32, which is what Stable-Baselines3 stores). Where an episode ended,
    and only there, `infos[i]` holds `terminal_observation`, `TimeLimit.truncated` and, as `Monitor` writes
    it, `episode` with the return `r` and the length `l`. All other entries are one shared empty dict.
    """

    def __init__(
        self, problem: Problem, num_envs: int, seed: int | None = 0, action_mode: str = "multi_discrete"
    ) -> None:
        """Build `num_envs` twins of `problem`; `reset()` starts episode 0 of the seeds `seed + i`."""
        self.batch = TwinBatch(problem, num_envs)
        """The core; its arrays hold the interval just played (see `TwinBatch`)."""
        self.action_mode = action_mode
        self._attributes = {
            "render_mode": None, "spec": None, "world": "twin", "problem": problem,
            "scenario": problem.scenario, "action_mode": action_mode,
        }  # fmt: skip
        self._no_info: dict[str, Any] = {}
        self._return = np.zeros(num_envs)
        self._length = np.zeros(num_envs, np.int64)
        super().__init__(num_envs, observation_space(), problem.knobs.action_space(action_mode))
        self.seed(seed)

    def reset(self) -> np.ndarray:
        """Start an episode everywhere, float32 [n, fields]: of the seeds given last, else of fresh ones."""
        if self._seeds[0] is None:
            self._resets += 1
            first = fresh_seed(self._seed, self._resets)
            seeds = np.arange(first, first + self.num_envs, dtype=np.uint64)
        else:
            self._seed, self._resets = self._seeds[0], 0
            seeds = np.array(self._seeds, np.uint64)
        self._reset_seeds()
        self._reset_options()
        self._return[:] = 0.0
        self._length[:] = 0
        return self.batch.reset(seeds)

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions of the coming step, [n, controlled] (`discrete`: [n])."""
        self._index = self.batch.problem.knobs.indices(actions, self.action_mode)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Play the step: observations float32 [n, fields], rewards float32 [n], dones bool [n], infos."""
        step = self.batch.step(self._index)
        self._return += step.reward
        self._length += 1
        done = step.terminated | step.truncated
        infos = [self._no_info] * self.num_envs
        for i in np.flatnonzero(done):
            infos[i] = {
                "terminal_observation": step.final_observation[i].copy(),
                "TimeLimit.truncated": bool(step.truncated[i]),
                "episode": {"r": float(self._return[i]), "l": int(self._length[i])},
            }
        self._return[done] = 0.0
        self._length[done] = 0
        return step.observation, step.reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the environments, once per index; they all share the same ones."""
        if attr_name not in self._attributes:
            raise AttributeError(f"no attribute {attr_name!r}; a twin batch has {sorted(self._attributes)}")
        return [self._attributes[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the environments are rows of one batch."""
        raise AttributeError(
            f"cannot set {attr_name!r}: a twin batch is fixed by its scenario, change that instead"
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: there is no environment object behind a row."""
        raise AttributeError(
            f"no method {method_name!r}: a twin batch has no single environments, use ThermalMoETwin-v0"
        )

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """True for `Monitor`, whose episode records are in `infos` already."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """No pictures: the environment has no render mode."""
        return [None] * self.num_envs
