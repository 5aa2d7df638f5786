"""Copies of environments: bit for bit the original from then on, and independent of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st

import thermoe_env  # noqa: F401  (registers the ids)
from agents.learning.vec import TwinVecEnv
from tests.thermoe_env.test_vector import PLACEMENTS, STEPS, make
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "cloudpickle": lambda thing: cloudpickle.loads(cloudpickle.dumps(thing)),
}
BUDGET = {"window_s": 4.0, "fraction": 0.1, "bank_windows": 2}


def one(problem: Problem, **overrides: Any) -> gymnasium.Env[np.ndarray, Any]:
    overrides = {"episode_s": STEPS, **overrides}
    return gymnasium.make("ThermalMoETwin-v0", scenario=problem.scenario, overrides=overrides)


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal to the bit, in types, keys and arrays, arrays of objects among them."""
    if isinstance(a, np.ndarray) and a.dtype == object:
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return data_equivalence(a, b, exact=True)


def forward(env: Any, action: Any) -> tuple[Any, ...]:
    """A step, and the next episode's beginning where a single environment's has ended."""
    result = env.step(action)
    if isinstance(result[2], bool) and (result[2] or result[3]):
        return *result, *env.reset()
    return result


FORMS: dict[str, Callable[..., Any]] = {"single": one, "vector": lambda p, **o: make(p, 3, overrides=o)}


@settings(max_examples=20, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    way=st.sampled_from(sorted(WAYS)),
    seed=st.integers(0, 2**40),
    devices=st.sampled_from(PLACEMENTS),
    budget=st.sampled_from([None, BUDGET]),
    plays=st.lists(st.integers(0, 2 * STEPS), min_size=1, max_size=4),
)
def test_copies_of_copies_go_on_as_the_original_does(
    problem, form, way, seed, devices, budget, plays
) -> None:
    """A chain of copies, each taken after some steps, equals one environment that was never copied.

    Every one that was left behind is played on first, with other actions: that must move no copy.
    """
    overrides = {"episode_s": STEPS, "devices": devices, "adaptation": {"budget": budget}}
    env, whole = FORMS[form](problem, **overrides), FORMS[form](problem, **overrides)
    whole.action_space.seed(seed)
    assert same(env.reset(seed=seed), whole.reset(seed=seed))
    for steps in plays:
        left, env = env, WAYS[way](env)
        for _ in range(3):
            forward(left, left.action_space.sample())
        for _ in range(steps):
            action = whole.action_space.sample()
            assert same(forward(env, action), forward(whole, action))


@pytest.mark.parametrize("way", sorted(WAYS))
def test_an_environment_that_was_never_reset_can_be_copied(problem: Problem, way: str) -> None:
    """Gymnasium's own test of pickling: make, copy, compare."""
    env = one(problem)
    twin = WAYS[way](env)
    assert twin.spec == env.spec and twin.action_space == env.action_space
    assert same(env.reset(seed=5), twin.reset(seed=5))
    for _ in range(STEPS + 2):
        action = env.action_space.sample()
        assert same(forward(env, action), forward(twin, action))


@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_core_and_the_environments_of_stable_baselines3_can_be_copied(problem: Problem, way: str) -> None:
    short = Problem.of(load_scenario(problem.scenario, episode_s=STEPS))
    rng = np.random.default_rng(0)
    batch, vec = TwinBatch(short, 3, latencies=True), TwinVecEnv(short, 3, seed=4)
    batch.reset([4, 5, 6])
    vec.reset()
    copies = None
    for step in range(2 * STEPS):
        actions = rng.integers(0, short.knobs.nvec, (3, len(short.knobs.nvec)))
        index = short.knobs.indices(actions, "multi_discrete")
        mine = *batch.step(index), batch.histogram, batch.raw, *vec.step(actions)
        if copies is not None:
            other, other_vec = copies
            theirs = *other.step(index), other.histogram, other.raw, *other_vec.step(actions)
            assert same(mine, theirs)
        if step == STEPS - 3:
            copies = WAYS[way](batch), WAYS[way](vec)
            assert not np.shares_memory(batch.devices, copies[0].devices)


def test_a_copy_draws_what_the_original_would_draw(problem: Problem) -> None:
    env = ThermalMoEEnv(problem.scenario, "twin", render_mode="rgb_array")
    env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(20):
        env.step(env.action_space.sample())
        env.render()
    twins = [make_copy(env) for make_copy in WAYS.values()]
    for _ in range(3):
        action = env.action_space.sample()
        for each in (env, *twins):
            each.step(action)
    for twin in twins:
        np.testing.assert_array_equal(twin.render(), env.render())


def test_what_exists_once_refuses_to_be_copied(problem: Problem) -> None:
    shown = ThermalMoEEnv(problem.scenario, "twin", render_mode="human")
    live = ThermalMoEEnv(problem.scenario, "twin")
    live._world.name = "live"
    for make_copy in WAYS.values():
        with pytest.raises(TypeError, match=r"window.*rgb_array"):
            make_copy(shown)
        with pytest.raises(TypeError, match=r"world 'live' cannot be copied.*ThermalMoETwin-v0"):
            make_copy(live)
    shown.close()
