"""Search for the weights of linear rules: CMA-ES, a whole generation played as one batch of twins.

By the package `cmaes`, on which Optuna's sampler of that name stands. Every candidate plays the same
episodes. Shapes: P candidates, M episodes, K knobs, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from cmaes import CMA

from agents.policies.linear import LinearRule, Signal, constant_weights, features_of
from agents.tuning.rules import TUNING_SEEDS
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.core import TwinBatch

_ROUNDS = 4
"""Most rounds of the search for a constant, knob by knob."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How far to look."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    population: int = 20
    episodes: int = 12
    generations: int = 300
    """At most."""
    patience: int = 60
    """Generations after which a search ends that has not gained `tolerance`."""
    tolerance: float = 0.003
    """Gain of the best mean return that counts, over its size."""
    sigma: float = 0.5
    """Step size to begin with, in levels."""

    def __post_init__(self) -> None:
        if min(self.population - 3, self.episodes, self.generations, self.patience) < 1:
            raise ValueError(
                f"population must be at least 4, episodes, generations and patience at least 1, got {self}"
            )
        if not (self.sigma > 0.0 and self.tolerance >= 0.0):
            raise ValueError(f"sigma must be above 0 and tolerance at least 0, got {self}")

    @property
    def seeds(self) -> range:
        """Of the tuning episodes."""
        return range(TUNING_SEEDS[0], TUNING_SEEDS[0] + self.episodes)


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        weights: The best.  # [K, 1 + F]
        value: Its mean return on the tuning episodes.
        generations: Played.
        steps: Twin intervals played.
    """

    weights: np.ndarray
    value: float
    generations: int
    steps: int


class Population:
    """Twins that play the same episodes once per candidate."""

    def __init__(self, problem: Problem, seeds: Sequence[int]) -> None:
        """Play episode 0 of each seed."""
        self.problem, self._seeds, self.steps = problem, list(seeds), 0
        self._batches: dict[int, TwinBatch] = {}

    def returns(self, weights: np.ndarray, blind: Mapping[Signal, np.ndarray] | None = None) -> np.ndarray:
        """Return of every candidate, [P, K, 1 + F], in every episode: [P, M]."""
        return self._play(weights, blind, None)

    def mean_features(self, weights: np.ndarray) -> np.ndarray:
        """Mean of what a rule, [K, 1 + F], sees in the episodes, [1 + F]."""
        seen = np.zeros(weights.shape[-1])
        self._play(weights[None], None, seen)
        return seen / self.problem.scenario.steps

    def _play(
        self, weights: np.ndarray, blind: Mapping[Signal, np.ndarray] | None, seen: np.ndarray | None
    ) -> np.ndarray:
        """Return of every candidate in every episode; `seen` sums the mean features of all intervals."""
        n, problem = len(weights) * len(self._seeds), self.problem
        if n not in self._batches:
            self._batches[n] = TwinBatch(problem, n, autoreset=False)
        batch = self._batches[n]
        policy = LinearRule(problem, np.repeat(weights, len(self._seeds), axis=0), blind)
        observation = batch.reset(self._seeds * len(weights))
        total, running = np.zeros(n), np.ones(n, bool)
        for _ in range(problem.scenario.steps):
            if seen is not None:
                seen += features_of(problem, observation).mean(axis=0)
            step = batch.step(problem.knobs.indices(policy.predict(observation)[0], "multi_discrete"))
            total += np.where(running, step.reward, 0.0)
            running &= ~step.terminated
            observation = step.observation
        self.steps += n * problem.scenario.steps
        return total.reshape(len(weights), -1)


def tune(
    population: Population,
    start: np.ndarray,
    config: SearchConfig,
    seed: int,
    free: np.ndarray | None = None,
    blind: Mapping[Signal, np.ndarray] | None = None,
) -> Found:
    """Look for better weights than `start`, until nothing is gained any more.

    Args:
        population: Plays the tuning episodes.
        start: Where to begin.  # [K, 1 + F]
        config: How far to look.
        seed: Of the search.
        free: Which weights may change; None: all.  # bool [K, 1 + F]
        blind: As of `LinearRule`.
    """
    free = np.ones(start.shape, bool) if free is None else free
    begun = population.steps
    search = CMA(mean=start[free], sigma=config.sigma, seed=seed, population_size=config.population)
    best, value, counted, last_gain, generation = start, -np.inf, -np.inf, 0, 0
    for generation in range(1, config.generations + 1):
        asked = [search.ask() for _ in range(config.population)]
        candidates = np.tile(start, (config.population + 1, 1, 1))
        candidates[:, free] = [*asked, search.mean]  # often better than any sample
        values = population.returns(candidates, blind).mean(axis=1)
        search.tell([(x, -y) for x, y in zip(asked, values, strict=False)])
        if values.max() > value:
            best, value = candidates[values.argmax()].copy(), float(values.max())
        if generation == 1 or value > counted + config.tolerance * abs(counted):
            counted, last_gain = value, generation
        if generation - last_gain >= config.patience or search.should_stop():
            break
    return Found(best, value, generation, population.steps - begun)


def best_level(population: Population, weights: np.ndarray, knob: int) -> np.ndarray:
    """Hold a knob of a rule at the level that is best beside the rest as it is; returns the weights."""
    levels = int(population.problem.knobs.nvec[knob])
    held = np.tile(weights, (levels, 1, 1))
    held[:, knob], held[:, knob, 0] = 0.0, np.arange(levels)
    return held[population.returns(held).mean(axis=1).argmax()]


def best_constant_weights(population: Population) -> np.ndarray:
    """Search the best constant setting knob by knob from the standard one; weights [K, 1 + F]."""
    problem = population.problem
    weights, knobs = constant_weights(problem.knobs.action()), range(len(problem.knobs.controlled))
    for _ in range(_ROUNDS):
        before = weights.copy()
        for knob in knobs:
            weights = best_level(population, weights, knob)
        if np.array_equal(before, weights):
            break
    return weights
