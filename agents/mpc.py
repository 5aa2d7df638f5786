"""Model-predictive control: the planner on what can be known, `agents.belief`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from agents.belief import Belief, BeliefConfig, without_luck
from agents.planner import PlanConfig, Planner
from thermoe_env.problem import Problem


@dataclass(frozen=True, kw_only=True)
class MpcConfig:
    """How to plan, and what to believe."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    plan: PlanConfig = field(default_factory=PlanConfig)
    belief: BeliefConfig = field(default_factory=BeliefConfig)


class Mpc:
    """Plans on its belief anew in every interval. Memory: a belief and a plan per environment."""

    def __init__(self, problem: Problem, config: MpcConfig) -> None:
        self._problem, self._belief = without_luck(problem), config.belief
        self._planner = Planner(self._problem, config.plan)

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """First actions of the plans; see `Policy.predict`."""
        start = np.ones(len(observation), bool) if state is None else episode_start
        memory = []
        for row, own in enumerate(observation):
            if start is not None and start[row]:
                belief, plan = Belief(self._problem, self._belief, own), self._planner.static_plan()
            else:
                belief, plan = state[row]
                belief.follow(own)
                plan = self._planner.later(plan)
            memory.append((belief, self._planner.improved(belief.state, 0, plan)))
        return np.array([plan[0] for _, plan in memory]), memory
