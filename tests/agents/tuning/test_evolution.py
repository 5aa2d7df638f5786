"""The search for linear rules: it plays what single twins play, and finds what there is to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.play.rollout import play_twin
from agents.policies.linear import WEIGHTS, LinearConfig, LinearRule, constant_weights
from agents.tuning import linear as command
from agents.tuning.evolution import Population, SearchConfig, best_level, tune
from thermoe_env.configs import load_settings
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

SEEDS = (3, 4, 5)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(load_scenario("premium", episode_s=20))


class Valley:
    """In place of twins: the nearer to the target, the better."""

    steps = 0

    def __init__(self, target: np.ndarray) -> None:
        self.target = target

    def returns(self, weights: np.ndarray, blind: Any = None) -> np.ndarray:
        self.steps += len(weights)
        return -np.square(weights - self.target).sum(axis=(1, 2))[:, None]


def test_a_population_plays_what_each_rule_plays_alone(problem):
    source = np.random.default_rng(0)
    weights = source.normal(1.0, 1.0, (4, len(problem.knobs.controlled), len(WEIGHTS)))
    population = Population(problem, SEEDS)
    found = population.returns(weights)
    for own, row in zip(weights, found, strict=True):
        alone = play_twin(problem, LinearRule(problem, own), SEEDS).reward.sum(axis=0)
        np.testing.assert_allclose(row, alone, rtol=1e-12)
    np.testing.assert_array_equal(population.returns(weights), found)  # twins are reset
    assert population.steps == 2 * 4 * len(SEEDS) * 20


def test_the_search_finds_the_valley_s_floor_and_leaves_what_is_held():
    target = np.random.default_rng(1).normal(size=(2, len(WEIGHTS)))
    free = np.ones(target.shape, bool)
    free[1] = False
    config = SearchConfig(population=16, episodes=1, generations=400, patience=100, tolerance=0.0)
    population: Any = Valley(target)
    found = tune(population, np.zeros(target.shape), config, 0, free)
    np.testing.assert_allclose(found.weights[0], target[0], atol=0.05)
    assert np.all(found.weights[1] == 0.0)
    again = tune(population, np.zeros(target.shape), config, 0, free)
    np.testing.assert_array_equal(found.weights, again.weights)
    assert found.steps == found.generations * 17


def test_a_search_ends_when_it_has_not_gained_for_long_and_no_sooner():
    class Plateau(Valley):
        """Worth more with every generation, up to a number of them."""

        def returns(self, weights: np.ndarray, blind: Any = None) -> np.ndarray:
            self.steps += len(weights)
            return np.full((len(weights), 1), min(self.steps // len(weights), 30) - 50.0)

    population: Any = Plateau(np.zeros((1, len(WEIGHTS))))
    config = SearchConfig(population=8, episodes=1, generations=300, patience=10)
    assert tune(population, np.zeros((1, len(WEIGHTS))), config, 0).generations == 40


def test_what_is_found_is_no_worse_than_where_it_began_and_worth_what_is_said(problem):
    start, population = constant_weights(problem.knobs.action()), Population(problem, SEEDS)
    config = SearchConfig(population=8, episodes=len(SEEDS), generations=6)
    found = tune(population, start, config, 0)
    assert found.value == pytest.approx(population.returns(found.weights[None]).mean())
    assert found.value >= population.returns(start[None]).mean()


def test_the_best_level_of_a_knob_is_the_best_of_all(problem):
    population, weights = Population(problem, SEEDS), constant_weights(problem.knobs.action())
    held = best_level(population, weights, 1)
    each = []
    for level in range(problem.knobs.nvec[1]):
        action = problem.knobs.action().copy()
        action[1] = level
        each.append(population.returns(constant_weights(action)[None]).mean())
    assert held[1, 0] == int(np.argmax(each)) and np.all(held[1, 1:] == 0.0)


@pytest.mark.parametrize("wrong", [{"population": 3}, {"generations": 0}, {"sigma": 0.0}])
def test_a_search_that_cannot_look_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be (at least|above)"):
        SearchConfig(**wrong)


def test_the_command_writes_a_rule_that_is_worth_what_it_says(tmp_path: Path):
    scenario, out = tmp_path / "mine.yaml", tmp_path / "linear.yaml"
    scenario.write_text("name: mine\nbase: premium\nepisode_s: 20\n")
    few = SearchConfig(population=6, episodes=2, generations=3)
    command.main(command.Arguments(scenario=str(scenario), restarts=1, first=few, again=few, out=out))
    text = out.read_text()
    assert text.startswith("# Weights of `linear`") and "mean return" in text
    problem = Problem.of(load_scenario(str(scenario)))
    rule = load_settings(LinearConfig, "agents", str(out)).table(problem)
    worth = Population(problem, few.seeds).returns(rule[None]).mean()
    said = float(text.splitlines()[2].split()[1])
    assert said == pytest.approx(worth, abs=0.2)  # weights are rounded
    with pytest.raises(ValueError, match="restarts must be at least 1"):
        command.Arguments(scenario="rack", restarts=0)
