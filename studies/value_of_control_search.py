"""The searches of the study of control, as tasks: what is searched, and what it earns on other episodes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from agents.play.metrics import episode_metrics
from agents.play.rollout import play_twin
from agents.policies.linear import LinearRule, Signal
from agents.policies.policy import ConstantPolicy, Policy
from agents.tuning.evolution import Population, SearchConfig, best_constant_weights, best_level, tune
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario


@dataclass(frozen=True)
class Variant:
    """What is searched: the rule itself, first or again, or one that does without a knob or a signal."""

    kind: Literal["rule", "sighted", "held", "blind"]
    """`sighted` is `rule` again, from its best; `held` has a knob at one level, `blind` misses a signal."""
    name: str = ""
    """Of the knob or the signal."""


FIRST, SIGHTED = Variant("rule"), Variant("sighted")


@dataclass(frozen=True, kw_only=True)
class _Task:
    label: str
    scenario: Scenario
    seeds: tuple[int, ...]
    """Of the episodes on which it is judged."""

    @property
    def gpus(self) -> int:
        """None: the twin is played on a CPU."""
        return 0

    @property
    def what(self) -> str:
        """Name within the scenario."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name of the result file."""
        return f"{self.label}-{self.what}"

    def settings(self) -> dict[str, Any]:
        """All that the result follows from."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def judged(self, problem: Problem, policy: Policy) -> dict[str, Any]:
        """What a policy earns in every episode: returns, gross values, and its indicators."""
        recording = play_twin(problem, policy, self.seeds, self.what)
        return {
            "returns": recording.reward.sum(axis=0).tolist(),
            "gross": recording.terms[:, :, 0].sum(axis=0).tolist(),
            "episodes": episode_metrics(recording).to_dict("records"),
        }


@dataclass(frozen=True, kw_only=True)
class Baselines(_Task):
    """What never changes: the standard service, in calm too (no events, no warm air); the best constant."""

    search: SearchConfig
    """Whose episodes the constant is searched on."""

    @property
    def what(self) -> str:
        """Name within the scenario."""
        return "baselines"

    def run(self) -> dict[str, Any]:
        """Search, and judge all three."""
        problem, calm = Problem.of(self.scenario), Problem.of(calm_of(self.scenario))
        population, static = Population(problem, self.search.seeds), ConstantPolicy(problem.knobs.action())
        constant = best_constant_weights(population)
        return {
            "settings": self.settings(),
            "static": self.judged(problem, static),
            "calm": self.judged(calm, static),
            "weights": constant.tolist(),
            "steps": population.steps,
            "constant": self.judged(problem, LinearRule(problem, constant)),
        }


@dataclass(frozen=True, kw_only=True)
class Search(_Task):
    """A search for a rule."""

    search: SearchConfig
    restart: int
    variant: Variant
    start: tuple[tuple[float, ...], ...]
    """Weights to begin with.  # [K, 1 + F]"""

    @property
    def what(self) -> str:
        """Name within the scenario."""
        return "-".join(part for part in (self.variant.kind, self.variant.name, str(self.restart)) if part)

    def run(self) -> dict[str, Any]:
        """Search, and judge."""
        problem, start = Problem.of(self.scenario), np.array(self.start)
        population = Population(problem, self.search.seeds)
        free = np.ones(start.shape, bool)
        blind: dict[Signal, np.ndarray] = {}
        if self.variant.kind == "held":
            knob = problem.knobs.controlled.index(self.variant.name)
            start, free[knob] = best_level(population, start, knob), False
        elif self.variant.kind == "blind":
            blind[cast(Signal, self.variant.name)] = population.mean_features(start)
        found = tune(population, start, self.search, self.restart, free, blind)
        return {
            "settings": self.settings(),
            "variant": dataclasses.asdict(self.variant),
            "weights": found.weights.tolist(),
            "value": found.value,
            "generations": found.generations,
            "steps": population.steps,
            **self.judged(problem, LinearRule(problem, found.weights, blind)),
        }


def calm_of(scenario: Scenario) -> Scenario:
    """The scenario outside its events: the usual budget, price and promise, air as calibrated."""
    normal_w = scenario.power_budget.normal_w
    changes: dict[str, Any] = {
        "inlet": None, "price": None, "power_budget": {"event_w": [normal_w, normal_w]},
    }  # fmt: skip
    if scenario.generate is not None:
        changes["generate"] = {"strict": None}
    return load_scenario(scenario, **changes)
