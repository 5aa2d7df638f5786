"""Linear rules: against a loop by hand, many at once against one at a time, and blind to a signal."""

from __future__ import annotations

import numpy as np
import pytest

from agents.play.rollout import play_twin
from agents.policies.linear import (
    FEATURES,
    WEIGHTS,
    LinearConfig,
    LinearRule,
    constant_weights,
    features_of,
)
from agents.policies.registry import make_policy
from thermoe_env.mdp.fields import FIELD_NAMES, ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

N = 6


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(load_scenario("rack", episode_s=30))


@pytest.fixture(scope="module")
def seen(problem: Problem) -> np.ndarray:
    """Observations of some intervals of chance."""
    batch, rng = TwinBatch(problem, N), np.random.default_rng(0)
    batch.reset(range(N))
    actions = rng.integers(0, problem.knobs.nvec, (20, N, len(problem.knobs.controlled)))
    rows = [batch.step(problem.knobs.indices(action, "multi_discrete")).observation for action in actions]
    return np.concatenate(rows)


def some_weights(problem: Problem, *shape: int) -> np.ndarray:
    source = np.random.default_rng(1)
    return source.normal(1.0, 2.0, (*shape, len(problem.knobs.controlled), len(WEIGHTS)))


def test_levels_are_rounded_scores(problem, seen):
    weights, levels = some_weights(problem), LinearRule(problem, some_weights(problem)).predict(seen)[0]
    features = features_of(problem, seen)
    for row, own in zip(features, levels, strict=True):
        for knob, level in enumerate(own):
            score = weights[knob, 0] + sum(w * x for w, x in zip(weights[knob, 1:], row[1:], strict=True))
            assert level == min(max(round(score), 0), problem.knobs.nvec[knob] - 1)
    assert np.sum(np.ptp(levels, axis=0) > 0) >= 4


def test_features_are_what_they_say(problem, seen):
    o = ranges_of(problem).decode(seen)
    found = dict(zip((f.name for f in FEATURES), features_of(problem, seen)[:, 1:].T, strict=True))
    reference_w = problem.reference_power_w
    expected = {
        "load": 2 * o["load_fast"] - 1,
        "margin": (o["budget_w"] - o["power_w"]) / (0.3 * reference_w),
        "cap_ahead": (o["budget_w"] - o["budget_ahead_w"]) / (0.5 * reference_w),
        "heat": 1 - o["margin_c"] / 5,
        "oldest": o["oldest_interactive_s"] / 1.0,
        "backlog": o["queue_deferrable_s"] / 40.0,
        "price": np.zeros(len(seen)),
        "strict": np.zeros(len(seen)),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], np.clip(values, -1, 1), atol=1e-6, err_msg=name)
    assert np.all(np.abs(features_of(problem, seen)) <= 1.0)


def test_many_rules_at_once_are_each_alone(problem, seen):
    rules = some_weights(problem, len(seen))
    together = LinearRule(problem, rules).predict(seen)[0]
    alone = [LinearRule(problem, w).predict(row[None])[0][0] for w, row in zip(rules, seen, strict=True)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("signal", "fields"), [("heat", ["margin_c"]), ("power", ["power_w", "budget_w", "budget_ahead_w"])]
)
def test_a_blind_rule_does_not_see_its_signal_and_a_sighted_one_does(problem, seen, signal, fields):
    weights, other = some_weights(problem), seen.copy()
    for name in fields:
        column = FIELD_NAMES.index(name)
        other[:, column] = np.random.default_rng(2).uniform(-1, 1, len(seen))
    means = features_of(problem, seen).mean(axis=0)
    blind, sighted = LinearRule(problem, weights, {signal: means}), LinearRule(problem, weights)
    np.testing.assert_array_equal(blind.predict(seen)[0], blind.predict(other)[0])
    assert np.any(sighted.predict(seen)[0] != sighted.predict(other)[0])


def test_a_constant_is_a_rule_without_weights(problem, seen):
    action = problem.knobs.nvec - 1
    levels = LinearRule(problem, constant_weights(action)).predict(seen)[0]
    np.testing.assert_array_equal(levels, np.tile(action, (len(seen), 1)))


@pytest.mark.parametrize("weights", [np.zeros((2, 3)), np.full((5, len(WEIGHTS)), np.nan)])
def test_weights_that_fit_no_knobs_are_refused(problem, weights):
    with pytest.raises(ValueError, match=r"weights must be finite, \[knobs, 1 \+ features\] = \(5, 13\)"):
        LinearRule(problem, weights)


def test_weights_are_written_for_a_reader_and_read_back(problem):
    weights = np.round(some_weights(problem), 3)
    weights[1, 3:] = 0.0
    config = LinearConfig.of(problem, weights)
    assert config.weights["pace"]["bias"] == weights[4, 0] and len(config.weights["batch_size"]) == 3
    np.testing.assert_array_equal(config.table(problem), weights)


@pytest.mark.parametrize(
    "change", [{"pace": {"warmth": 1.0}}, {"sm_clock": {"bias": 1.0}}], ids=["feature", "knob"]
)
def test_weights_for_something_else_are_refused(problem, change):
    config = LinearConfig.of(problem, constant_weights(problem.knobs.action()))
    with pytest.raises(ValueError, match=r"weights must be for the knobs .* search them anew"):
        LinearConfig(weights=config.weights | change).table(problem)


def test_a_scenario_without_a_rule_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"no weights for the scenario 'restless': search them .*--scenario"):
        make_policy("linear", Problem.of(load_scenario("restless")))


@pytest.mark.parametrize("name", ["premium", "rack", "hot-aisle"])
def test_the_shipped_rules_beat_the_standard_service(name):
    """On two episodes; docs/results/value_of_control says by how much."""
    problem = Problem.of(load_scenario(name))
    earned = {
        policy: play_twin(problem, make_policy(policy, problem), (1, 2)).reward.sum(axis=0)
        for policy in ("linear", "static")
    }
    assert np.all(earned["linear"] > earned["static"] + 20.0)
