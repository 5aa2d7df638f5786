"""No warning of `check_env`; pickles go on alike; our vector is Gymnasium's in each autoreset mode."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers

from benchmarks.clients.plain import ID, MO_ID, replay

N, STEPS, SEED = 2, 25, 3


def passes_the_checker() -> None:
    """In every action mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for action_mode in ("multi_discrete", "discrete", "box"):
            check_env(gymnasium.make(ID, action_mode=action_mode).unwrapped)


def a_pickled_copy_goes_on_alike(id: str) -> None:
    """As Gymnasium's own tests pickle its environments, but in the middle of an episode."""
    env = gymnasium.make(id, max_episode_steps=STEPS)
    env.reset(seed=SEED)
    for _ in range(10):
        env.step(env.action_space.sample())
    copied = pickle.loads(pickle.dumps(env))
    for _ in range(3):
        ended = False
        while not ended:
            action = env.action_space.sample()
            result = env.step(action)
            assert data_equivalence(result, copied.step(action), exact=True)
            ended = result[2] or result[3]
        assert data_equivalence(env.reset(), copied.reset(), exact=True)
    spec = pickle.loads(pickle.dumps(env.spec))
    assert gymnasium.make(spec).spec == env.spec


def vectors_agree(mode: AutoresetMode) -> None:
    """Ours is compiled, Gymnasium's has a process per environment."""
    ours: Any = gymnasium.make_vec(ID, N, max_episode_steps=STEPS, autoreset_mode=mode)
    theirs: Any = gymnasium.make_vec(
        ID, N, "async", {"autoreset_mode": mode, "context": "spawn"}, max_episode_steps=STEPS
    )
    assert type(ours.unwrapped).__name__ == "ThermalMoEVectorEnv"
    pair = [ours, theirs]
    if mode is AutoresetMode.NEXT_STEP:  # the only one that this wrapper takes
        pair = [wrappers.NormalizeObservation(env) for env in pair]
    ours, theirs = (wrappers.RecordEpisodeStatistics(env) for env in pair)
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    actions = [ours.action_space.sample() for _ in range(2 * STEPS + 1)]
    assert data_equivalence(ours.reset(seed=SEED)[0], theirs.reset(seed=SEED)[0], exact=True)
    for action in actions:
        mine, other = ours.step(action), theirs.step(action)
        assert data_equivalence(mine[:-1], other[:-1], exact=True)
        ended = mine[2] | mine[3]
        if mode is AutoresetMode.DISABLED and ended.any():
            again = [env.reset(options={"reset_mask": ended.copy()})[0] for env in (ours, theirs)]
            assert data_equivalence(*again, exact=True)
    plain = [
        replay(SEED + i, np.array(actions)[:STEPS, i], max_episode_steps=STEPS).rewards.sum()
        for i in range(N)
    ]
    assert len(ours.return_queue) == 2 * N and list(ours.return_queue) == list(theirs.return_queue)
    np.testing.assert_allclose(list(ours.return_queue)[:N], plain, rtol=1e-12)
    ours.close()
    theirs.close()


if __name__ == "__main__":
    passes_the_checker()
    for one in (ID, MO_ID):
        a_pickled_copy_goes_on_alike(one)
    for each in AutoresetMode:
        vectors_agree(each)
