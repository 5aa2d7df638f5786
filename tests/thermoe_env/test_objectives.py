"""Vector rewards under MO-Gymnasium, and costs as one number."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import thermoe_env  # noqa: F401  (registers the ids)
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.objectives import ScalarCost, ThermalMoEMultiObjectiveEnv
from thermoe_env.problem.problem import Problem

HOT = {"episode_s": 20, "limits": {"temperature_c": 40.0}, "power_budget": {"normal_w": 200.0}}
"""Every term is charged somewhere."""


@pytest.mark.parametrize(("seed", "weight"), [(0, 1.0), (7, 3.3), (2**31, 0.07)])
def test_the_vector_sums_to_the_scalar_reward_bit_for_bit(problem: Problem, seed: int, weight: float) -> None:
    overrides = {**HOT, "reward": {"energy": weight, "late": 1.0 / weight}}
    scalar = ThermalMoEEnv(problem.scenario, "twin", overrides=overrides)
    vector = ThermalMoEMultiObjectiveEnv(problem.scenario, "twin", overrides=overrides)
    np.testing.assert_array_equal(scalar.reset(seed=seed)[0], vector.reset(seed=seed)[0])
    scalar.action_space.seed(seed % 1000)
    kept, charged = [], np.zeros(len(REWARD_TERMS), bool)
    for _ in range(20):
        action = scalar.action_space.sample()
        one, other = scalar.step(action), vector.step(action)
        np.testing.assert_array_equal(one[0], other[0])
        assert sum(other[1].tolist()) == one[1] and other[1] in vector.reward_space
        assert other[1].tolist() == list(one[4]["reward_terms"].values())
        kept.append((other[1], other[1].copy()))
        charged |= other[1] != 0.0
    assert charged[:2].all() and charged[REWARD_TERMS.index("heat")]
    for given_out, then in kept:  # a caller may keep the vectors
        np.testing.assert_array_equal(given_out, then)


def test_mo_gymnasium_makes_it_and_its_wrappers_take_it(problem: Problem) -> None:
    mo: Any = pytest.importorskip("mo_gymnasium")
    arguments: dict[str, Any] = {"scenario": problem.scenario, "overrides": HOT}
    vector = mo.make("ThermalMoETwinMO-v0", **arguments)
    assert vector.unwrapped.reward_space.shape == (len(REWARD_TERMS),) and vector.unwrapped.reward_dim == 5
    weights = np.array([1.0, 0.5, 2.0, 0.0, 3.0])
    recorded = mo.wrappers.MORecordEpisodeStatistics(vector, gamma=0.9)
    env = mo.wrappers.LinearReward(recorded, weight=weights)
    plain = gymnasium.make("ThermalMoETwin-v0", **arguments)
    env.reset(seed=5)
    plain.reset(seed=5)
    plain.action_space.seed(5)
    terms, truncated = [], False
    while not truncated:
        action = plain.action_space.sample()
        _, reward, _, truncated, info = env.step(action)
        terms.append(list(plain.step(action)[4]["reward_terms"].values()))
        assert reward == pytest.approx(np.dot(weights, terms[-1]))
        np.testing.assert_array_equal(info["vector_reward"], terms[-1])
    np.testing.assert_allclose(info["episode"]["r"], np.sum(terms, 0), rtol=1e-5, atol=1e-5)
    discount = 0.9 ** np.arange(len(terms))[:, None]
    np.testing.assert_allclose(info["episode"]["dr"], np.sum(discount * terms, 0), rtol=1e-5, atol=1e-5)


def test_the_cost_is_one_number_and_its_parts_stay(problem: Problem) -> None:
    weights = {"above_limit_s": 2.0, "over_budget_j": 0.001}
    env = ScalarCost(ThermalMoEEnv(problem.scenario, "twin", overrides=HOT), weights)
    plain = ThermalMoEEnv(problem.scenario, "twin", overrides=HOT)
    assert env.reset(seed=2)[1]["cost"] == 0.0
    plain.reset(seed=2)
    total = 0.0
    for _ in range(20):
        action = plain.problem.knobs.action(batch_size=8192)
        info, costs = env.step(action)[4], plain.step(action)[4]["cost"]
        assert info["costs"] == costs and set(costs) == set(COST_NAMES)
        assert isinstance(info["cost"], float)
        assert info["cost"] == pytest.approx(2.0 * costs["above_limit_s"] + 0.001 * costs["over_budget_j"])
        total += info["cost"]
        assert info["cost_sum"] == pytest.approx(total)
    assert env.reset(seed=2)[1]["cost_sum"] == 0.0
    # Alone, the seconds above the limit are what an episode may spend: a number of whole intervals.
    seconds = ScalarCost(plain)
    seconds.reset(seed=2)
    infos = [seconds.step(action)[4] for _ in range(20)]
    above = [info["reading"]["temp_c"] > 40.0 for info in infos]
    assert [info["cost"] for info in infos] == [float(hot) for hot in above]
    assert infos[-1]["cost_sum"] == sum(above) > 0


def test_the_wrapper_is_recreated_from_its_spec(problem: Problem) -> None:
    env = ScalarCost(gymnasium.make("ThermalMoETwin-v0"), {"missed": 1.0})
    assert env.spec is not None
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, ScalarCost)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"late": 1.0}, r"costs of \('above_limit_s', .*got \['late'\]"),
        ({}, "got none"),
        ({"missed": 0.0}, "positive and finite"),
        ({"missed": float("nan")}, "positive and finite"),
    ],
)
def test_other_weights_are_refused(problem: Problem, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalarCost(ThermalMoEEnv(problem.scenario, "twin"), weights)
