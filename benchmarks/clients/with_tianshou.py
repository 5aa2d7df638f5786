"""PPO trains; what a `Collector` of two processes stores is the plain environment's, bit for bit."""

from __future__ import annotations

import gymnasium
import numpy as np
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, CollectStats, VectorReplayBuffer
from tianshou.env import SubprocVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

from benchmarks.clients.plain import ID, replay

N, STEPS, SEED = 2, 40, 3
PLAIN = {"action_mode": "discrete", "max_episode_steps": STEPS}


def make() -> gymnasium.Env:
    """One environment, of a single discrete action, the one kind that its policies take."""
    return gymnasium.make(ID, **PLAIN)


def main() -> None:
    """Train, then collect and compare."""
    alone = make()
    shape = alone.observation_space.shape
    actor = DiscreteActor(
        preprocess_net=Net(state_shape=shape, hidden_sizes=[16]),
        action_shape=alone.action_space.n,
        softmax_output=False,
    )
    critic = DiscreteCritic(preprocess_net=Net(state_shape=shape, hidden_sizes=[16]))
    policy = DiscreteActorPolicy(
        actor=actor, action_space=alone.action_space, observation_space=alone.observation_space
    )
    algorithm = PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-3))
    before = [parameter.detach().clone() for parameter in actor.parameters()]
    envs = SubprocVectorEnv([make] * N)
    training = Collector[CollectStats](algorithm, envs, VectorReplayBuffer(4 * N * STEPS, N))
    result = algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=training,
            max_epochs=1,
            epoch_num_steps=2 * N * STEPS,
            collection_step_num_env_steps=N * STEPS,
            show_progress=False,
        )
    )
    assert result.update_step > 0
    assert any((old != new).any() for old, new in zip(before, actor.parameters(), strict=True))

    buffer = VectorReplayBuffer(N * STEPS, N)
    collected = Collector[CollectStats](algorithm, envs, buffer)
    stats = collected.collect(
        n_episode=N, reset_before_collect=True, gym_reset_kwargs={"seed": SEED}
    )  # gives both the same seed; their actions are sampled
    assert stats.lens.tolist() == [STEPS] * N
    assert len(buffer) == N * STEPS
    for rows, total in zip(np.arange(N * STEPS).reshape(N, STEPS), stats.returns, strict=True):
        stored = buffer[rows]
        plain = replay(SEED, stored.act, **PLAIN)
        assert np.array_equal(stored.obs, plain.observations[:-1])
        assert np.array_equal(stored.obs_next, plain.observations[1:])
        assert np.array_equal(stored.rew, plain.rewards) and np.array_equal(stored.done, plain.ended)
        np.testing.assert_allclose(total, plain.rewards.sum(), rtol=1e-12)
    assert (buffer.act[:STEPS] != buffer.act[STEPS:]).any()
    envs.close()


if __name__ == "__main__":
    main()
