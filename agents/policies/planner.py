"""The planner: it tries plans in copies of a twin and keeps the best, and the oracle, who knows the future.

A plan holds an action for each of a few blocks of time, short ones first (move blocking). From the last plan
on, all moves are tried at once, each in a copy of the twin; the best is taken, and the search goes on from
there until none helps. Copies run the twin's own compiled functions from a given state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from agents.policies.policy import Policy
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.core import TwinBatch

JOINT = ("batch_size", "expert_count", "ttt_steps")
"""Knobs that the planner also changes together."""
_KEEP = -1


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How far, how finely and how hard to plan."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    blocks: tuple[int, ...] = (1, 3, 6, 10)
    """Intervals for which a plan holds its actions, one after another."""
    rounds: int = 12
    """Moves that a decision takes at most."""

    def __post_init__(self) -> None:
        if not self.blocks or min(self.blocks) < 1 or self.rounds < 1:
            raise ValueError(
                "blocks need at least one length, lengths and rounds must be at least 1, got "
                f"{self.blocks} and {self.rounds}"
            )


class Planner:
    """Searches plans, int64 [blocks, controlled knobs]. Deterministic."""

    def __init__(self, problem: Problem, config: PlanConfig) -> None:
        """Build the copies: one per move and one for the plan itself."""
        self._knobs = problem.knobs
        self._steps = problem.scenario.steps
        self._blocks, self._rounds = len(config.blocks), config.rounds
        self._block_of = np.repeat(np.arange(self._blocks), config.blocks)  # [horizon]
        moves = [*self._changes(), *self._jumps()]
        self._level = np.stack([np.full_like(moves[0], _KEEP), *moves])  # [copies, blocks, controlled]
        self._twins = TwinBatch(problem, len(self._level))

    def _changes(self) -> Iterator[np.ndarray]:
        """Moves that change one knob, in one block or from it on: levels, `_KEEP` where the plan's stay."""
        for column, levels in enumerate(self._knobs.nvec.tolist()):
            for level, first in itertools.product(range(levels), range(self._blocks)):
                for last in sorted({first + 1, self._blocks}):
                    move = np.full((self._blocks, len(self._knobs.nvec)), _KEEP)
                    move[first:last, column] = level
                    yield move

    def _jumps(self) -> Iterator[np.ndarray]:
        """Moves that set batches, experts and a pulse of adaptation for the whole plan.

        A plan that answers wrongly in small batches is stuck else: adapting does not pay in such batches, and
        larger ones do not pay for wrong answers.
        """
        columns = [c for c, name in enumerate(self._knobs.controlled) if name in JOINT]
        for levels in itertools.product(*(range(self._knobs.nvec[c]) for c in columns)):
            move = np.full((self._blocks, len(self._knobs.nvec)), _KEEP)
            move[:, columns] = levels
            if "ttt_steps" in self._knobs.controlled:
                move[1:, self._knobs.controlled.index("ttt_steps")] = 0
            yield move

    @property
    def copies(self) -> int:
        """Plans that are tried at once."""
        return len(self._level)

    @property
    def horizon(self) -> int:
        """Intervals that a plan covers."""
        return len(self._block_of)

    def static_plan(self) -> np.ndarray:
        """The plan of the static service."""
        return np.tile(self._knobs.action(), (self._blocks, 1))

    def later(self, plan: np.ndarray) -> np.ndarray:
        """The plan as it looks an interval later; its last action goes on."""
        begin = np.flatnonzero(np.diff(self._block_of, prepend=-1))  # [blocks]
        return plan[self._block_of[np.minimum(begin + 1, self.horizon - 1)]]

    def improved(self, source: TwinBatch, row: int, plan: np.ndarray) -> np.ndarray:
        """The best plan that the best moves lead to.

        Args:
            source: twins.
            row: the one to plan for.
            plan: where the search begins.
        """
        for _ in range(self._rounds):
            plans = np.where(self._level == _KEEP, plan, self._level)  # [copies, blocks, controlled]
            best = int(self.returns(source, row, plans).argmax())
            if best == 0:
                break
            plan = plans[best]
        return plan

    def returns(self, source: TwinBatch, row: int, plans: np.ndarray) -> np.ndarray:
        """Rewards of plans [copies, blocks, controlled] up to the horizon or the episode's end, [copies]."""
        self._twins.fork(source, row)
        steps = min(self.horizon, self._steps - int(source.state.track["step"][row]))
        total, running = np.zeros(len(plans)), np.ones(len(plans), bool)
        index = [self._knobs.indices(plans[:, block], "multi_discrete") for block in range(plans.shape[1])]
        for t in range(steps):
            step = self._twins.step(index[self._block_of[t]])
            total += np.where(running, step.reward, 0.0)
            running &= ~step.terminated
        return total


class Oracle:
    """The planner on the twin itself: its copies see the requests, budgets, shifts and devices to come.

    What it earns is what better forecasts could bring the same planner, not what any policy could. It has to
    know the episodes: `for_seeds` gives the policy that plays them.
    """

    def __init__(self, problem: Problem, config: PlanConfig) -> None:
        self._problem, self._config = problem, config

    def for_seeds(self, seeds: Sequence[int]) -> Policy:
        """The policy for episodes of these seeds, in this order, from number 0 of each on."""
        return _SeededOracle(self._problem, self._config, seeds)

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Refused: an observation does not hold the future."""
        raise ValueError("the oracle must know its episodes: play `oracle.for_seeds(seeds)`, in a twin")


class _SeededOracle:
    """Plays its own copy of the episodes along. Memory: the plans."""

    def __init__(self, problem: Problem, config: PlanConfig, seeds: Sequence[int]) -> None:
        self._knobs, self._seeds = problem.knobs, seeds
        self._planner = Planner(problem, config)
        self._world = TwinBatch(problem, len(seeds))

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions for the next interval; see `Policy.predict`.

        Raises:
            ValueError: the observation is not the one that the last actions lead to.
        """
        if state is None:
            self._expected = self._world.reset(self._seeds)
        if not np.array_equal(observation, self._expected):
            raise ValueError(
                "the oracle's episodes are not those that are played: it needs the twin of its problem, the "
                "seeds it was made for, in order, and all of its actions to be played"
            )
        plans = []
        for row in range(len(observation)):
            if state is None or (episode_start is not None and episode_start[row]):
                plan = self._planner.static_plan()
            else:
                plan = self._planner.later(state[row])
            plans.append(self._planner.improved(self._world, row, plan))
        action = np.array([plan[0] for plan in plans])
        self._expected = self._world.step(self._knobs.indices(action, "multi_discrete")).observation
        return action, plans
