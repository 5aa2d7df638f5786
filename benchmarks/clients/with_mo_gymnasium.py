"""`LinearReward` of weights 1 gives the plain reward; recorded and vector rewards are its terms."""

from __future__ import annotations

import mo_gymnasium
import numpy as np
from mo_gymnasium.wrappers import LinearReward, MONormalizeReward, MORecordEpisodeStatistics
from mo_gymnasium.wrappers.vector import MOSyncVectorEnv

from benchmarks.clients.plain import MO_ID, replay

N, STEPS, SEED = 2, 40, 3


def weighted_terms_are_the_plain_reward() -> None:
    """And the vectors' discounted and plain sums are those of the terms in infos."""
    record = MORecordEpisodeStatistics(mo_gymnasium.make(MO_ID, max_episode_steps=STEPS), gamma=0.9)
    env = LinearReward(record)
    assert env.unwrapped.reward_space.shape == (6,)
    env.reset(seed=SEED)
    actions = [env.action_space.sample() for _ in range(STEPS)]
    steps = [env.step(action) for action in actions]
    plain = replay(SEED, actions, max_episode_steps=STEPS)
    np.testing.assert_allclose([step[1] for step in steps], plain.rewards, rtol=1e-12)
    terms = np.array([list(info["reward_terms"].values()) for info in plain.infos[1:]])
    episode = steps[-1][-1]["episode"]
    np.testing.assert_allclose(episode["r"], terms.sum(0), rtol=1e-5)
    np.testing.assert_allclose(episode["dr"], (terms * 0.9 ** np.arange(STEPS)[:, None]).sum(0), rtol=1e-5)


def vectors_hold_the_terms() -> None:
    """Each row is an environment of its own."""
    envs = MOSyncVectorEnv([lambda: mo_gymnasium.make(MO_ID, max_episode_steps=STEPS)] * N)
    envs.reset(seed=SEED)
    actions = [envs.action_space.sample() for _ in range(STEPS)]
    rewards = np.array([envs.step(action)[1] for action in actions])
    for i in range(N):
        plain = replay(SEED + i, np.array(actions)[:, i], MO_ID, max_episode_steps=STEPS)
        np.testing.assert_allclose(rewards[:, i], plain.rewards, rtol=1e-6)


def normalising_touches_its_objective_alone() -> None:
    """`MONormalizeReward` scales the energy and leaves the others."""
    env = MONormalizeReward(mo_gymnasium.make(MO_ID, max_episode_steps=STEPS), idx=1)
    env.reset(seed=SEED)
    actions = [env.action_space.sample() for _ in range(STEPS)]
    rewards = np.array([env.step(action)[1] for action in actions])
    plain = replay(SEED, actions, MO_ID, max_episode_steps=STEPS).rewards
    others = [0, 2, 3, 4, 5]
    assert np.array_equal(rewards[:, others], plain[:, others]) and (rewards[:, 1] != plain[:, 1]).any()


if __name__ == "__main__":
    weighted_terms_are_the_plain_reward()
    vectors_hold_the_terms()
    normalising_touches_its_objective_alone()
