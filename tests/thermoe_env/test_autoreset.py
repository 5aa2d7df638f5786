"""The vector environment's ends, masked resets, seeds and infos, and Gymnasium's wrappers around it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import gymnasium
import gymnasium.wrappers.vector as wrappers
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.thermoe_env.test_copies import same
from tests.thermoe_env.test_vector import STEPS, make
from thermoe_env.mdp.fields import FIELDS
from thermoe_env.problem.problem import Problem

N = 3
SHORT = {"episode_s": STEPS}
MODES = tuple(AutoresetMode)


def singles(problem: Problem, n: int = N) -> list[gymnasium.Env[np.ndarray, Any]]:
    return [gymnasium.make("ThermalMoETwin-v0", scenario=problem.scenario, overrides=SHORT) for _ in range(n)]


def terms_of(infos: dict[str, Any], i: int) -> dict[str, dict[str, float]]:
    """Reward terms and costs of one environment, which must be marked as its own."""
    for key in ("reward_terms", "cost"):
        assert infos[f"_{key}"][i] and all(infos[key][f"_{name}"][i] for name in infos[key] if name[0] != "_")
    return {
        key: {name: column[i] for name, column in infos[key].items() if name[0] != "_"}
        for key in ("reward_terms", "cost")
    }


def told(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in ("reward_terms", "cost")}


MASKS = st.lists(st.booleans(), min_size=N, max_size=N).filter(any)
EVENTS = st.one_of(
    st.tuples(st.just("play"), st.integers(1, STEPS + 3)),
    st.tuples(st.just("reset"), MASKS),
    st.tuples(st.just("seed"), MASKS, st.lists(st.integers(0, 2**64 - 1), min_size=N, max_size=N)),
    st.tuples(st.just("copy")),
    st.tuples(st.just("overheat"), st.integers(0, N - 1)),
)


@settings(max_examples=25, deadline=None)
@given(mode=st.sampled_from(MODES), seed=st.integers(0, 2**40), events=st.lists(EVENTS, max_size=8))
def test_every_mode_plays_what_single_environments_play(problem, mode, seed, events) -> None:
    """Any sequence of steps, ends, masked resets, seeds and copies, environment by environment."""
    vec, alone = make(problem, N, overrides=SHORT, autoreset_mode=mode), singles(problem)
    assert vec.metadata["autoreset_mode"] is mode
    rng = np.random.default_rng(seed)
    last = [env.reset(seed=seed + i) for i, env in enumerate(alone)]
    observation, infos = vec.reset(seed=seed)
    ended = np.zeros(N, np.bool_)

    def check(mask: Any) -> None:
        for i in range(N):
            np.testing.assert_array_equal(observation[i], last[i][0])
            if mask[i]:
                assert terms_of(infos, i) == told(last[i][1])

    def step() -> None:
        nonlocal observation, infos, ended
        actions = rng.integers(0, problem.knobs.nvec, (N, len(problem.knobs.nvec)))
        before = ended
        observation, reward, terminated, truncated, infos = vec.step(actions)
        ended = terminated | truncated
        for i, env in enumerate(alone):
            if before[i] and mode is AutoresetMode.NEXT_STEP:
                last[i] = env.reset()
                assert (reward[i], terminated[i], truncated[i]) == (0.0, False, False)
                continue
            single, single_reward, end, cut, info = env.step(actions[i])
            assert (reward[i], terminated[i], truncated[i]) == (single_reward, end, cut)
            last[i] = single, info
            if (end or cut) and mode is AutoresetMode.SAME_STEP:
                np.testing.assert_array_equal(infos["final_obs"][i], single)
                assert terms_of(infos["final_info"], i) == told(info)
                last[i] = env.reset()
        if mode is not AutoresetMode.SAME_STEP:
            assert "final_obs" not in infos
        check(np.ones(N, np.bool_))

    def reset(mask: np.ndarray, seeds: list[int] | None = None) -> None:
        nonlocal observation, infos, ended
        options = {"reset_mask": mask}
        given_seeds = None if seeds is None else [s if m else None for s, m in zip(seeds, mask, strict=True)]
        observation, infos = vec.reset(seed=given_seeds, options=options)
        for i in np.flatnonzero(mask):
            last[i] = alone[i].reset(seed=None if seeds is None else seeds[i])
        ended = ended & ~mask
        assert infos["_cost"].tolist() == mask.tolist()
        check(mask)

    check(np.ones(N, np.bool_))
    for name, *arguments in events:
        if name == "play":
            for _ in range(arguments[0]):
                if mode is AutoresetMode.DISABLED and ended.any():
                    with pytest.raises(gymnasium.error.ResetNeeded, match=r"have ended.*reset_mask"):
                        vec.step(np.zeros((N, len(problem.knobs.nvec)), np.int64))
                    reset(ended)
                step()
        elif name in ("reset", "seed"):
            reset(np.array(arguments[0]), *arguments[1:])
        elif name == "copy":
            left, vec = vec, copy.deepcopy(vec)
            left.reset(seed=0)
        elif not (mode is AutoresetMode.DISABLED and ended.any()):
            at: Any = alone[arguments[0]].unwrapped
            vec.batch.devices["inlet_c"][arguments[0]] = at._world.telemetry._devices["inlet_c"] = 120.0
            step()


@pytest.mark.parametrize("mode", MODES)
def test_results_have_the_form_of_gymnasium_s_own_vector_in_every_mode(
    problem: Problem, mode: AutoresetMode
) -> None:
    ours = make(problem, N, overrides=SHORT, autoreset_mode=mode.value)
    theirs = SyncVectorEnv([lambda: singles(problem, 1)[0]] * N, autoreset_mode=mode)
    ours.action_space.seed(0)
    mine, other = ours.reset(seed=3), theirs.reset(seed=3)
    mask = np.array([True, False, True])
    for step in range(2 * STEPS + 4):
        for key in ("reward_terms", "cost"):
            assert same(mine[-1][key], other[-1][key]) and same(mine[-1][f"_{key}"], other[-1][f"_{key}"])
        assert same(mine[:-1], other[:-1])
        if step == 5:
            mine, other = (env.reset(options={"reset_mask": mask.copy()}) for env in (ours, theirs))
            continue
        if mode is AutoresetMode.DISABLED and len(mine) > 2 and (mine[2] | mine[3]).any():
            done = mine[2] | mine[3]
            mine, other = (env.reset(options={"reset_mask": done.copy()}) for env in (ours, theirs))
            continue
        actions = ours.action_space.sample()
        mine, other = ours.step(actions), theirs.step(actions)
    theirs.close()


def test_masks_are_refused_by_name(problem: Problem) -> None:
    env = make(problem, N)
    with pytest.raises(gymnasium.error.ResetNeeded, match="all environments before"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(seed=0)
    for mask in ([True, False, False], np.array([1, 0, 0]), np.ones(2, np.bool_), np.zeros(N, np.bool_)):
        with pytest.raises(ValueError, match="reset_mask must be a numpy array of bool"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match=r"autoreset_mode must be one of.*NextStep"):
        make(problem, N, autoreset_mode="next_step")


@pytest.mark.parametrize("n", [1, N])
def test_seeds_are_integers_of_python_or_numpy_and_nothing_else(problem: Problem, n: int) -> None:
    """A list, a tuple or an array of them for a vector; the single environment takes the same ones."""
    vec, single = make(problem, n), singles(problem, 1)[0]
    expected = vec.reset(seed=7)[0]
    alike: list[Any] = [np.int64(7), np.array(7), [np.uint8(7), *range(8, 7 + n)], np.arange(7, 7 + n)]
    for seed in alike:
        np.testing.assert_array_equal(vec.reset(seed=seed)[0], expected)
    alike = [7, np.int64(7), np.uint64(7)]
    for seed in alike:
        np.testing.assert_array_equal(single.reset(seed=seed)[0], expected[0])
    bad: list[Any] = [7.0, np.float64(7.0), True, np.True_, -1, 2**64, "7"]
    for seed in bad:
        for reset in (lambda s=seed: single.reset(seed=s), lambda s=seed: vec.reset(seed=[s] * n)):
            with pytest.raises(ValueError, match=r"a seed must be an integer in \[0, 2\*\*64\)"):
                reset()
    bad.append(np.full(n, 7.0))
    for seed in bad[:5] + bad[-1:]:
        with pytest.raises(ValueError, match="a seed must be an integer"):
            vec.reset(seed=seed)


WRAPPERS: dict[str, Callable[[Any], VectorEnv[Any, Any, Any]]] = {
    "RecordEpisodeStatistics": wrappers.RecordEpisodeStatistics,
    "DictInfoToList": wrappers.DictInfoToList,
    "NormalizeReward": wrappers.NormalizeReward,
    "ClipReward": lambda env: wrappers.ClipReward(env, -1.0, 1.0),
    "TransformReward": lambda env: wrappers.TransformReward(env, lambda reward: 2.0 * reward),
    "TransformAction": lambda env: wrappers.TransformAction(env, lambda action: action),
    "NormalizeObservation": wrappers.NormalizeObservation,
    "TransformObservation": lambda env: wrappers.TransformObservation(env, lambda o: 0.5 * o),
    "FlattenObservation": wrappers.FlattenObservation,
    "ReshapeObservation": lambda env: wrappers.ReshapeObservation(env, (len(FIELDS), 1)),
    "VectorizeTransformReward": lambda env: wrappers.VectorizeTransformReward(
        env, gymnasium.wrappers.TransformReward, func=lambda reward: reward
    ),
    "VectorizeTransformAction": lambda env: wrappers.VectorizeTransformAction(
        env, gymnasium.wrappers.TransformAction, func=lambda action: action, action_space=None
    ),
    "VectorizeTransformObservation": lambda env: wrappers.VectorizeTransformObservation(
        env, gymnasium.wrappers.TransformObservation, func=lambda o: o, observation_space=None
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRAPPERS)
def test_gymnasium_s_wrappers_do_the_same_as_around_its_own_vector(
    problem: Problem, name: str, mode: AutoresetMode
) -> None:
    """Those of observations refuse `SAME_STEP`, `NormalizeObservation` also `DISABLED`: around any vector."""
    ours = make(problem, N, overrides=SHORT, autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda: singles(problem, 1)[0]] * N, autoreset_mode=mode)
    try:
        around = WRAPPERS[name](theirs)
    except (AssertionError, ValueError) as refused:  # the former before Gymnasium 1.4
        assert "Observation" in name and mode is not AutoresetMode.NEXT_STEP
        with pytest.raises(type(refused), match=re.escape(str(refused)[:40])):
            WRAPPERS[name](ours)
        return
    pair = WRAPPERS[name](ours), around
    assert pair[0].observation_space == pair[1].observation_space
    rng = np.random.default_rng(0)
    results = [env.reset(seed=2) for env in pair]
    for _ in range(2 * STEPS + 3):
        assert same(*(result[:-1] for result in results))
        ends = results[0][2] | results[0][3] if len(results[0]) == 5 else np.zeros(N, np.bool_)
        if mode is AutoresetMode.DISABLED and ends.any():
            results = [env.reset(options={"reset_mask": ends.copy()}) for env in pair]
            continue
        actions = rng.integers(0, problem.knobs.nvec, (N, len(problem.knobs.nvec)))
        results = [env.step(actions) for env in pair]
        if name == "RecordEpisodeStatistics" and "episode" in results[1][-1]:
            for key in ("r", "l"):
                assert same(*(result[-1]["episode"][key] for result in results))
    theirs.close()
