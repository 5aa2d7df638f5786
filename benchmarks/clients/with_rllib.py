"""PPO trains with two env runners; what they sample, our vector too, is the plain environment's."""

from __future__ import annotations

import numpy as np
import ray
from ray.rllib.algorithms.ppo import PPOConfig

from benchmarks.clients.plain import ID, replay

RUNNERS, STEPS, SEED = 2, 40, 3


def main(vectorize: str, envs: int, **env_config: str) -> None:
    """One iteration, then an episode of each environment compared.

    Args:
        vectorize: how RLlib makes the environments of a runner.
        envs: of each runner.
        env_config: for the environment, besides its length.
    """
    config = (
        PPOConfig()
        .environment(ID, env_config={"max_episode_steps": STEPS, **env_config})
        .env_runners(num_env_runners=RUNNERS, num_envs_per_env_runner=envs, gym_env_vectorize_mode=vectorize)
        .training(train_batch_size=4 * STEPS * envs, minibatch_size=STEPS, num_epochs=1)
        .debugging(seed=SEED)
    )
    algorithm = config.build_algo()
    sampled = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner.sample(num_episodes=envs, random_actions=True, force_reset=True),
        local_env_runner=False,
    )
    seeds = [SEED + 1 + runner + env for runner in range(RUNNERS) for env in range(envs)]
    episodes = [episode for of_runner in sampled for episode in of_runner]
    assert len(episodes) == len(seeds)
    for seed, episode in zip(seeds, episodes, strict=True):
        plain = replay(seed, episode.get_actions(), max_episode_steps=STEPS)
        assert episode.is_truncated and len(episode) == STEPS
        assert np.array_equal(episode.get_observations(), plain.observations)
        assert np.array_equal(episode.get_rewards(), plain.rewards)
    result = algorithm.train()
    assert result["env_runners"]["num_env_steps_sampled"] >= 4 * STEPS * envs
    assert result["env_runners"]["episode_len_max"] == STEPS
    assert np.isfinite(result["env_runners"]["episode_return_mean"])
    algorithm.stop()


if __name__ == "__main__":
    ray.init(num_cpus=RUNNERS + 1, include_dashboard=False)
    main("sync", 1)
    main("vector_entry_point", 2, autoreset_mode="NextStep")  # RLlib knows no other mode
    ray.shutdown()
