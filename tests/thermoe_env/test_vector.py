"""The Gymnasium vector environment against single environments, Gymnasium's own vectorisation and itself."""

from __future__ import annotations

import gymnasium
import numba
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st

import thermoe_env  # noqa: F401  (registers the ids)
from thermoe_env.problem.knobs import ACTION_MODES
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.score import KNOBS_READ
from thermoe_env.vector import ThermalMoEVectorEnv

STEPS = 12
PLACEMENTS = (
    [{}],
    [{"experts": range(4)}, {"inlet_offset_c": 6.0, "experts": range(4, 8)}],
    [{"experts": [7, 0, 3]}, {"experts": [1, 2, 4, 5, 6], "inlet_offset_c": -3.0}, {"experts": []}],
)


def make(problem: Problem, n: int, **arguments) -> ThermalMoEVectorEnv:
    env = gymnasium.make_vec("ThermalMoETwin-v0", num_envs=n, scenario=problem.scenario, **arguments)
    assert isinstance(env, ThermalMoEVectorEnv)
    return env


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**40),
    mode=st.sampled_from(ACTION_MODES),
    knobs=st.sets(st.sampled_from(KNOBS_READ), min_size=1),
    kind=st.sampled_from(["poisson", "bursts", "diurnal"]),
    load=st.tuples(st.floats(0.05, 0.7), st.floats(0.7, 1.6)),
    interval_s=st.sampled_from([0.5, 1.0]),
    limit=st.floats(45.0, 75.0),
    devices=st.sampled_from(PLACEMENTS),
    n=st.integers(1, 5),
    threads=st.sampled_from([1, 2]),
)
def test_equals_single_environments(
    problem, seed, mode, knobs, kind, load, interval_s, limit, devices, n, threads
) -> None:
    """Bit for bit over two episodes, for any scenario, placement, knobs, action mode, number and threads."""
    overrides = {
        "episode_s": STEPS,
        "interval_s": interval_s,
        "knobs": [name for name in KNOBS_READ if name in knobs],
        "traffic": {"kind": kind, "low_load": load[0], "high_load": load[1]},
        "limits": {"temperature_c": limit},
        "devices": devices,
    }
    vec = make(problem, n, action_mode=mode, overrides=overrides)
    singles = [
        gymnasium.make("ThermalMoETwin-v0", scenario=problem.scenario, action_mode=mode, overrides=overrides)
        for _ in range(n)
    ]
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))
    try:
        vec.action_space.seed(0)
        observation, _ = vec.reset(seed=seed)
        expected = [env.reset(seed=seed + i)[0] for i, env in enumerate(singles)]
        np.testing.assert_array_equal(observation, expected)
        for _ in range(round(1.5 * STEPS / interval_s)):
            actions = vec.action_space.sample()
            observation, reward, terminated, truncated, infos = vec.step(actions)
            for i, env in enumerate(singles):
                single, single_reward, end, cut, info = env.step(actions[i])
                assert (reward[i], terminated[i], truncated[i]) == (single_reward, end, cut)
                place = infos
                if end or cut:
                    place = infos["final_info"]
                    assert infos["_final_obs"][i] and infos["_final_info"][i]
                    np.testing.assert_array_equal(infos["final_obs"][i], single)
                    single, _ = env.reset()
                elif "_final_obs" in infos:
                    assert not infos["_final_obs"][i] and infos["final_obs"][i] is None
                for key in ("reward_terms", "cost"):
                    assert place[f"_{key}"][i]
                    assert {name: place[key][name][i] for name in info[key]} == info[key]
                np.testing.assert_array_equal(observation[i], single)
    finally:
        numba.set_num_threads(before)


def test_has_the_form_of_gymnasium_s_own(problem: Problem) -> None:
    """Spaces, shapes, types and the keys of infos are those of `SyncVectorEnv` over single environments."""
    overrides = {"episode_s": STEPS}
    ours = make(problem, 3, overrides=overrides)
    theirs = SyncVectorEnv(
        [lambda: gymnasium.make("ThermalMoETwin-v0", scenario=problem.scenario, overrides=overrides)] * 3,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert ours.spec is not None and ours.spec.id == "ThermalMoETwin-v0"
    for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    ours.action_space.seed(0)
    for _ in range(STEPS):
        actions = ours.action_space.sample()
        mine, other = ours.step(actions), theirs.step(actions)
        assert mine[0] in ours.observation_space
        for a, b in zip(mine[:4], other[:4], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    for infos in (mine[4], mine[4]["final_info"]):
        for key in ("reward_terms", "cost"):
            assert set(infos[key]) == set(other[4]["final_info"][key]) and f"_{key}" in infos
    for a, b in zip(mine[4]["final_obs"], other[4]["final_obs"], strict=True):
        np.testing.assert_array_equal(a, b)
    theirs.close()


def test_gymnasium_counts_its_episodes(problem: Problem) -> None:
    """In `NEXT_STEP`: before Gymnasium 1.4 it miscounts any vector in `SAME_STEP`."""
    env = RecordEpisodeStatistics(make(problem, 3, overrides={"episode_s": STEPS}, autoreset_mode="NextStep"))
    env.reset(seed=1)
    env.action_space.seed(0)
    total = np.zeros(3)
    for step in range(2 * STEPS + 1):
        _, reward, _, truncated, infos = env.step(env.action_space.sample())
        total += reward
        assert truncated.all() == (step in (STEPS - 1, 2 * STEPS))
        if truncated.all():
            np.testing.assert_allclose(infos["episode"]["r"], total)
            assert infos["episode"]["l"].tolist() == [STEPS] * 3
            total[:] = 0.0


def test_resets_without_a_seed_go_on_to_the_next_episodes(problem: Problem) -> None:
    vec = make(problem, 2)
    single = gymnasium.make("ThermalMoETwin-v0", scenario=problem.scenario)
    np.testing.assert_array_equal(vec.reset(seed=[9, 4])[0][1], single.reset(seed=4)[0])
    np.testing.assert_array_equal(vec.reset()[0][1], single.reset()[0])
    with pytest.raises(ValueError, match="all environments that are reset a seed"):
        vec.reset(seed=[1, None])


@pytest.mark.parametrize(
    ("overrides", "limit", "length"),
    [
        ({"episode_s": 310}, None, 310),
        ({"episode_s": 160, "interval_s": 0.5}, None, 320),
        ({"episode_s": 12}, None, 12),
        ({"episode_s": 12}, 5, 5),
        ({"episode_s": 12}, 400, 12),
        ({"episode_s": 12}, -1, 12),
    ],
)
def test_the_scenario_s_length_rules_and_a_limit_only_shortens(
    problem: Problem, overrides, limit, length
) -> None:
    """`make` and `make_vec` alike, with and without Gymnasium's `max_episode_steps`."""
    arguments = {"scenario": problem.scenario, "overrides": overrides, "max_episode_steps": limit}
    single = gymnasium.make("ThermalMoETwin-v0", **arguments)
    vec = make(problem, 2, overrides=overrides, max_episode_steps=limit)
    single.reset(seed=0)
    vec.reset(seed=0)
    vec.action_space.seed(0)
    for step in range(1, length + 1):
        actions = vec.action_space.sample()
        assert single.step(actions[0])[2:4] == (False, step == length)
        assert vec.step(actions)[3].tolist() == [step == length] * 2


def test_limits_below_one_step_are_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        make(problem, 2, max_episode_steps=0)


def test_an_overheated_device_ends_its_episode_alone(problem: Problem) -> None:
    env = make(problem, 3)
    env.reset(seed=0)
    env.batch.devices["inlet_c"][1] = 120.0
    _, _, terminated, truncated, infos = env.step(env.action_space.sample())
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert infos["_final_obs"].tolist() == [False, True, False]


def test_latencies_change_nothing_else(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    batches = [TwinBatch(problem, 8, latencies=latencies) for latencies in (False, True)]
    first, second = (batch.reset(range(8)) for batch in batches)
    np.testing.assert_array_equal(first, second)
    for _ in range(40):
        index = problem.knobs.indices(rng.integers(0, problem.knobs.nvec, (8, 4)), "multi_discrete")
        first, second = (batch.step(index) for batch in batches)
        np.testing.assert_array_equal(first.observation, second.observation)
        np.testing.assert_array_equal(first.reward, second.reward)
        answered = batches[1].work["answered"].sum(axis=-1)
        np.testing.assert_array_equal(batches[1].histogram.sum(axis=1), answered)


def test_scenarios_and_worlds_are_refused_by_name(problem: Problem) -> None:
    with pytest.raises(ValueError, match="only the twin"):
        ThermalMoEVectorEnv(2, problem.scenario, world="live")
    with pytest.raises(ValueError, match="render_mode"):
        make(problem, 2, render_mode="human")
    with pytest.raises(ValueError, match="episode_s"):
        gymnasium.make_vec("ThermalMoETwin-v0", num_envs=2, overrides={"epsiode_s": 3})
