"""PPO trains on our vector through `wrap_env`, whose steps are the plain environment's."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, Model, MultiCategoricalMixin
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed

from benchmarks.clients.plain import ID, replay

N, STEPS, SEED = 2, 40, 3


class Policy(MultiCategoricalMixin, Model):
    """A level of each knob."""

    def __init__(self, observation_space, action_space, device) -> None:
        Model.__init__(self, observation_space=observation_space, action_space=action_space, device=device)
        MultiCategoricalMixin.__init__(self)
        self.net = torch.nn.Linear(self.num_observations, int(action_space.nvec.sum()))

    def compute(self, inputs, role=""):
        """Logits."""
        return self.net(inputs["observations"]), {}


class Value(DeterministicMixin, Model):
    """What is still to come."""

    def __init__(self, observation_space, action_space, device) -> None:
        Model.__init__(self, observation_space=observation_space, action_space=action_space, device=device)
        DeterministicMixin.__init__(self)
        self.net = torch.nn.Linear(self.num_observations, 1)

    def compute(self, inputs, role=""):
        """One number."""
        return self.net(inputs["observations"]), {}


def make():
    """Our vector, as skrl wraps it; it seeds the first reset by its own key."""
    return wrap_env(gymnasium.make_vec(ID, N, max_episode_steps=STEPS, autoreset_mode="NextStep"))


def steps_are_the_plain_ones() -> None:
    """Of an episode; the step after it ignores its action, returns 0 and begins the next."""
    env = make()
    assert env.num_envs == N and isinstance(env.action_space, gymnasium.spaces.MultiDiscrete)
    observations = [env.reset()[0]]
    actions, rewards = [], []
    for _ in range(STEPS + 1):
        actions.append(np.array([env.action_space.sample() for _ in range(N)]))
        observation, reward, _, truncated, _ = env.step(torch.as_tensor(actions[-1]))
        observations.append(observation)
        rewards.append(reward)
        env.reset()  # as its trainers do after every step: of a vector, nothing
    for i in range(N):
        plain = replay(SEED + i, np.array(actions)[:STEPS, i], max_episode_steps=STEPS)
        assert np.array_equal(torch.stack(observations)[: STEPS + 1, i], plain.observations)
        assert np.array_equal(torch.stack(rewards)[:STEPS, i, 0], plain.rewards.astype(np.float32))
    assert (rewards[STEPS] == 0.0).all() and not truncated.any()


def ppo_trains() -> None:
    """And every parameter of the policy moves."""
    env = make()
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    models = {"policy": Policy(**spaces, device="cpu"), "value": Value(**spaces, device="cpu")}
    before = [parameter.detach().clone() for parameter in models["policy"].parameters()]
    cfg = PPO_CFG(rollouts=16, learning_epochs=1, mini_batches=2)
    memory = RandomMemory(memory_size=16, num_envs=N, device="cpu")
    agent = PPO(models=models, memory=memory, cfg=cfg, device="cpu", **spaces)
    trainer = SequentialTrainer(
        env=env, agents=agent, cfg={"timesteps": 64, "headless": True, "disable_progressbar": True}
    )
    trainer.train()
    moved = [(old != new).any() for old, new in zip(before, models["policy"].parameters(), strict=True)]
    assert all(moved)


if __name__ == "__main__":
    set_seed(SEED)
    steps_are_the_plain_ones()
    ppo_trains()
