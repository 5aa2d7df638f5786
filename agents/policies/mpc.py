"""Model-predictive control: the planner on what can be known, `agents.policies.belief`."""

from __future__ import annotations

from typing import Any

import numpy as np

from agents.policies.belief import Belief, MpcConfig, without_luck
from agents.policies.planner import Planner
from thermoe_env.problem.problem import Problem


class Mpc:
    """Plans on its belief anew in every interval. Memory: a belief and a plan per environment."""

    def __init__(self, problem: Problem, config: MpcConfig) -> None:
        self._problem, self._config = without_luck(problem), config
        self._planner = Planner(self._problem, config)

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """First actions of the plans; see `Policy.predict`."""
        memory = []
        for row, own in enumerate(observation):
            if state is None or (episode_start is not None and episode_start[row]):
                belief, plan = Belief(self._problem, self._config, own), self._planner.static_plan()
            else:
                belief, plan = state[row]
                belief.follow(own)
                plan = self._planner.later(plan)
            memory.append((belief, self._planner.improved(belief.twins, 0, plan)))
        return np.array([plan[0] for _, plan in memory]), memory
