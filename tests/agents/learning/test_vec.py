"""The vector environment against the single one, Stable-Baselines3's own vectorisation and itself."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from agents.learning.vec import TwinVecEnv, fresh_seed
from agents.policies.policy import RandomPolicy
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

STEPS = 15


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "made-up.json"
    save_profile(make_profile(), path)
    return str(path)


@pytest.fixture(scope="module")
def problem(profile: str) -> Problem:
    return Problem.of(load_scenario("vision", profile=profile, episode_s=STEPS))


def play(env: TwinVecEnv, seed: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations [T + 1, n, fields], rewards [T, n] and dones [T, n] of `actions` [T, n, knobs]."""
    env.seed(seed)
    observations, rewards, dones = [env.reset()], [], []
    for action in actions:
        observation, reward, done, _ = env.step(action)
        observations.append(np.asarray(observation))
        rewards.append(reward)
        dones.append(done)
    return np.array(observations), np.array(rewards), np.array(dones)


def draw_actions(problem: Problem, steps: int, n: int) -> np.ndarray:
    nvec = problem.knobs.nvec
    return np.random.default_rng(7).integers(0, nvec, (steps, n, len(nvec)))


@pytest.mark.parametrize("mode", ["multi_discrete", "discrete", "box"])
def test_equals_single_environments(problem: Problem, mode: str) -> None:
    """Two episodes and a half, across autoresets, in every action mode."""
    n = 3
    vec = TwinVecEnv(problem, n, seed=5, action_mode=mode)
    singles = [ThermalMoEEnv(problem.scenario, "twin", mode) for _ in range(n)]
    vec.action_space.seed(1)
    expected = np.array([env.reset(seed=5 + i)[0] for i, env in enumerate(singles)])
    np.testing.assert_array_equal(vec.reset(), expected)
    returns = np.zeros(n)
    for t in range(5 * STEPS // 2):
        actions = np.array([vec.action_space.sample() for _ in range(n)])
        observation, reward, done, infos = vec.step(actions)
        for i, env in enumerate(singles):
            single, single_reward, terminated, truncated, _ = env.step(actions[i])
            returns[i] += single_reward
            assert reward[i] == np.float32(single_reward)
            assert done[i] == (terminated or truncated)
            if done[i]:
                np.testing.assert_array_equal(infos[i]["terminal_observation"], single)
                assert infos[i]["TimeLimit.truncated"] == truncated
                assert infos[i]["episode"] == {"r": returns[i], "l": STEPS}
                single, _ = env.reset()
                returns[i] = 0.0
            else:
                assert infos[i] == {}
            np.testing.assert_array_equal(np.asarray(observation)[i], single)
        assert done.all() == ((t + 1) % STEPS == 0)


def test_equals_single_environment_over_the_default_episode(profile: str) -> None:
    problem = Problem.of(load_scenario("vision", profile=profile))
    vec, single = TwinVecEnv(problem, 2, seed=11), ThermalMoEEnv(problem.scenario, "twin")
    vec.reset()
    single.reset(seed=12)
    for action in draw_actions(problem, problem.scenario.steps, 2):
        observation, reward, _, infos = vec.step(action)
        expected, expected_reward, *_ = single.step(action[1])
        last = infos[1].get("terminal_observation", np.asarray(observation)[1])
        np.testing.assert_array_equal(last, expected)
        assert reward[1] == np.float32(expected_reward)
    assert infos[1]["TimeLimit.truncated"]


def test_result_depends_neither_on_batch_size_nor_on_threads(problem: Problem) -> None:
    n, threads = 6, numba.get_num_threads()
    actions = draw_actions(problem, STEPS + 3, n)
    whole = play(TwinVecEnv(problem, n), 3, actions)
    part = play(TwinVecEnv(problem, 2), 3 + 4, actions[:, 4:])
    for all_of_it, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_of_it[:, 4:], some)
    try:
        numba.set_num_threads(1)
        alone = play(TwinVecEnv(problem, n), 3, actions)
    finally:
        numba.set_num_threads(threads)
    for one, other in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_seeds_follow_the_convention(problem: Problem) -> None:
    """`seed` counts for one reset; resets after it start other episodes, the same ones every time."""
    env = TwinVecEnv(problem, 2, seed=8)
    action = draw_actions(problem, 1, 2)[0]

    def first_step() -> list[float]:
        env.reset()
        return np.asarray(env.step(action)[0]).ravel().tolist()

    episodes = [first_step() for _ in range(3)]
    assert len({tuple(episode) for episode in episodes}) == 3
    assert env.seed(8) == [8, 9]
    assert [first_step() for _ in range(3)] == episodes
    seeds = {fresh_seed(8, number) for number in range(100)}
    assert len(seeds) == 100 and min(seeds) >= 2**32


def test_kept_results_do_not_change(problem: Problem) -> None:
    """What a step returned stays as it was when later steps are played."""
    env = TwinVecEnv(problem, 2)
    action = draw_actions(problem, 1, 2)[0]
    kept = [env.reset(), *env.step(action)[:3]]
    copies = [array.copy() for array in kept]
    env.step(action)
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_stable_baselines3_accepts_it(problem: Problem) -> None:
    """Its wrappers see the episodes, and its evaluation agrees with single environments."""
    policy = RandomPolicy(problem.knobs.nvec, seed=2)
    env = TwinVecEnv(problem, 2, seed=4)
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(VecNormalize, indices=0) == [False]
    mean, _ = evaluate_policy(policy, env, n_eval_episodes=2)  # type: ignore[arg-type]
    policy = RandomPolicy(problem.knobs.nvec, seed=2)
    dummy = DummyVecEnv([lambda: Monitor(ThermalMoEEnv(problem.scenario, "twin"))] * 2)
    dummy.seed(4)
    expected, _ = evaluate_policy(policy, dummy, n_eval_episodes=2)  # type: ignore[arg-type]
    assert mean == pytest.approx(expected, rel=1e-6)
    with pytest.warns(UserWarning, match="already wrapped"):
        monitored = VecMonitor(TwinVecEnv(problem, 2, seed=4))
    monitored.reset()
    for action in draw_actions(problem, STEPS, 2):
        _, _, _, infos = monitored.step(action)
    assert [info["episode"]["l"] for info in infos] == [STEPS, STEPS]


def test_attributes_are_shared_and_fixed(problem: Problem) -> None:
    env = TwinVecEnv(problem, 3)
    assert env.get_attr("world") == ["twin"] * 3 and env.get_attr("scenario", [1]) == [problem.scenario]
    assert env.has_attr("problem") and not env.has_attr("gravity")
    with pytest.raises(AttributeError, match=r"gravity.*'problem'"):
        env.get_attr("gravity")
    with pytest.raises(AttributeError, match="scenario"):
        env.set_attr("world", "live")
    with pytest.raises(AttributeError, match="ThermalMoETwin-v0"):
        env.env_method("reset")
    assert env.get_images() == [None] * 3
    env.close()


def test_refuses_actions_outside_the_space(problem: Problem) -> None:
    env = TwinVecEnv(problem, 2)
    env.reset()
    with pytest.raises(ValueError, match="level"):
        env.step(np.full((2, len(problem.knobs.nvec)), 99))
    with pytest.raises(ValueError, match="at least 1"):
        TwinVecEnv(problem, 0)
