"""`check_env_specs`; rollouts of two workers of `ParallelEnv` are the plain environment's."""

from __future__ import annotations

import numpy as np
import torch
from torchrl.envs import GymEnv, ParallelEnv, check_env_specs

from benchmarks.clients.plain import ID, replay

N, STEPS, SEED = 2, 40, 3


def make():
    """One environment; levels of the knobs, not one-hot."""
    return GymEnv(ID, categorical_action_encoding=True, max_episode_steps=STEPS)


def main() -> None:
    """Check, then roll out two episodes in two workers and compare."""
    for mode in ("multi_discrete", "discrete", "box"):
        check_env_specs(GymEnv(ID, action_mode=mode))
    envs = ParallelEnv(N, make)
    check_env_specs(envs)
    first = envs.reset(list_of_kwargs=[{"seed": SEED + i} for i in range(N)])
    rollout = envs.rollout(2 * STEPS, tensordict=first, auto_reset=False, break_when_any_done=False)
    assert rollout.batch_size == torch.Size([N, 2 * STEPS])
    for i, episode in enumerate(rollout):
        plain = replay(SEED + i, episode["action"].numpy(), max_episode_steps=STEPS)
        after = episode["next"]
        assert np.array_equal(after["observation"], plain.observations[1:])
        assert np.array_equal(after["reward"][:, 0], plain.rewards.astype(np.float32))
        assert np.array_equal(after["done"][:, 0], plain.ended) and plain.ended.sum() == 2
    envs.close()


if __name__ == "__main__":
    main()
