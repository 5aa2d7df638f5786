"""The learning algorithms: one table of their classes, action modes, networks and settings.

Settings are named as the arguments of Stable-Baselines3 (and sb3-contrib) that they become; those that are
ours alone are explained where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.crossq.policies import CrossQPolicy
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from sb3_contrib.tqc.policies import TQCPolicy
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy

from agents.learning.networks import KnobLstmPolicy, KnobPolicy
from agents.learning.vec import TwinVecEnv
from thermoe_env.problem.knobs import KnobTable

_MAY_BE_ZERO = ("seed", "learning_starts", "top_quantiles_to_drop_per_net")


def refuse_below_one(config: Any) -> None:
    """Refuse whole numbers below 1 in a dataclass, but for the few that may be 0.

    Raises:
        ValueError: names the field and its value.
    """
    for field in fields(config):
        value, least = getattr(config, field.name), 0 if field.name in _MAY_BE_ZERO else 1
        if type(value) is int and value < least:
            raise ValueError(f"{field.name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every algorithm is set by."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    OF_NETWORK: ClassVar[tuple[str, ...]] = ("net_arch",)
    """Settings that the network takes, not the algorithm."""
    OURS: ClassVar[tuple[str, ...]] = ()
    """Settings that neither takes as they are."""

    learning_rate: float
    gamma: float
    net_arch: tuple[int, ...]
    """Hidden layers of each network."""

    def __post_init__(self) -> None:
        refuse_below_one(self)
        if self.learning_rate <= 0.0 or not 0.0 <= self.gamma <= 1.0:
            raise ValueError(
                f"learning_rate must be > 0 and gamma in [0, 1], got {self.learning_rate}, {self.gamma}"
            )

    def rollout_steps(self, episode_steps: int) -> int:
        """Steps of each environment between two updates."""
        raise NotImplementedError

    def log_interval(self, episode_steps: int, n_envs: int) -> int:
        """`log_interval` of `learn` that logs once per episode of all environments."""
        raise NotImplementedError

    def arguments(self, env: TwinVecEnv) -> dict[str, Any]:
        """Arguments of the algorithm's constructor.

        Raises:
            ValueError: updates do not fit into an episode, or minibatches not into an update.
        """
        steps = env.batch.problem.scenario.steps
        if steps % self.rollout_steps(steps):
            raise ValueError(
                f"{self.rollout_steps(steps)} steps between updates do not divide an episode of {steps}, and "
                "runs are kept between episodes: choose a divisor"
            )
        left_out = (*self.OF_NETWORK, *self.OURS)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return given | {"policy_kwargs": self.network()}

    def network(self) -> dict[str, Any]:
        """Arguments of the network's constructor."""
        given = {name: getattr(self, name) for name in self.OF_NETWORK}
        return given | {"net_arch": list(self.net_arch)}


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings(Settings):
    """Learning from what the present policy has just played. The learning rate falls linearly to 0."""

    OURS: ClassVar = ("static_bias",)

    gae_lambda: float
    static_bias: float
    """Added to the first logits of the static service's levels; 0 starts with even choices."""

    def rollout_steps(self, episode_steps: int) -> int:
        """A whole episode."""
        return episode_steps

    def log_interval(self, episode_steps: int, n_envs: int) -> int:
        """Counted in updates."""
        return episode_steps // self.rollout_steps(episode_steps)

    def arguments(self, env: TwinVecEnv) -> dict[str, Any]:
        """See `Settings.arguments`."""
        return super().arguments(env) | {
            "learning_rate": LinearSchedule(self.learning_rate, 0.0, 1.0),
            "n_steps": self.rollout_steps(env.batch.problem.scenario.steps),
        }


@dataclass(frozen=True, kw_only=True)
class A2CSettings(OnPolicySettings):
    """One gradient step after each few steps."""

    n_steps: int
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    normalize_advantage: bool

    def rollout_steps(self, episode_steps: int) -> int:
        """As set."""
        return self.n_steps


@dataclass(frozen=True, kw_only=True)
class _Minibatched(OnPolicySettings):
    """An update's steps are divided into minibatches."""

    OURS: ClassVar = ("static_bias", "n_minibatches")

    n_minibatches: int
    """Parts an update's steps are divided into."""

    def arguments(self, env: TwinVecEnv) -> dict[str, Any]:
        """See `Settings.arguments`."""
        n_steps = self.rollout_steps(env.batch.problem.scenario.steps)
        samples = n_steps * env.num_envs
        if samples % self.n_minibatches:
            raise ValueError(
                f"n_minibatches={self.n_minibatches} does not divide an update of {env.num_envs} "
                f"environments x {n_steps} steps; choose a divisor of {samples}"
            )
        return super().arguments(env) | {"batch_size": samples // self.n_minibatches}


@dataclass(frozen=True, kw_only=True)
class PPOSettings(_Minibatched):
    """Clipped policy gradients over several epochs."""

    n_epochs: int
    clip_range: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOSettings(PPOSettings):
    """PPO whose networks begin with an LSTM."""

    OF_NETWORK: ClassVar = ("net_arch", "lstm_hidden_size")

    n_steps: int
    """Also the longest sequence that gradients flow through."""
    lstm_hidden_size: int

    def rollout_steps(self, episode_steps: int) -> int:
        """As set."""
        return self.n_steps


@dataclass(frozen=True, kw_only=True)
class TRPOSettings(_Minibatched):
    """Steps of the policy within a trust region; the minibatches and the learning rate are the critic's."""

    n_critic_updates: int
    target_kl: float
    cg_max_steps: int
    cg_damping: float


@dataclass(frozen=True, kw_only=True)
class OffPolicySettings(Settings):
    """Learning from a replay buffer. The learning rate stays."""

    buffer_size: int
    """Steps kept, over all environments."""
    learning_starts: int
    """Steps played at random before."""
    batch_size: int
    train_freq: int
    """Steps of each environment between two updates."""
    gradient_steps: int
    """Gradient steps per update."""

    def rollout_steps(self, episode_steps: int) -> int:
        """As set."""
        return self.train_freq

    def log_interval(self, episode_steps: int, n_envs: int) -> int:
        """Counted in episodes."""
        return n_envs


@dataclass(frozen=True, kw_only=True)
class DQNSettings(OffPolicySettings):
    """Values of every combination of levels; exploration takes one at random."""

    target_update_interval: int
    exploration_fraction: float
    exploration_final_eps: float
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class QRDQNSettings(DQNSettings):
    """DQN with quantiles of the return."""

    OF_NETWORK: ClassVar = ("net_arch", "n_quantiles")

    n_quantiles: int


@dataclass(frozen=True, kw_only=True)
class SACSettings(OffPolicySettings):
    """A stochastic actor, paid for its entropy."""

    tau: float
    ent_coef: float | str
    """A weight, or `auto` for one that is learned."""


@dataclass(frozen=True, kw_only=True)
class TD3Settings(OffPolicySettings):
    """A deterministic actor, explored around by Gaussian noise."""

    OURS: ClassVar = ("noise_std",)

    tau: float
    policy_delay: int
    target_policy_noise: float
    target_noise_clip: float
    noise_std: float
    """Standard deviation of the noise on actions in [-1, 1]."""

    def arguments(self, env: TwinVecEnv) -> dict[str, Any]:
        """See `Settings.arguments`."""
        mean = np.zeros(len(env.batch.problem.knobs.controlled))
        return super().arguments(env) | {"action_noise": NormalActionNoise(mean, self.noise_std + mean)}


@dataclass(frozen=True, kw_only=True)
class TQCSettings(SACSettings):
    """SAC with quantile critics, the highest quantiles left out."""

    OF_NETWORK: ClassVar = ("net_arch", "n_quantiles", "n_critics")

    n_quantiles: int
    n_critics: int
    top_quantiles_to_drop_per_net: int


@dataclass(frozen=True, kw_only=True)
class CrossQSettings(OffPolicySettings):
    """SAC without target networks, with batch renormalisation."""

    ent_coef: float | str
    """A weight, or `auto` for one that is learned."""
    policy_delay: int


@dataclass(frozen=True)
class Algorithm:
    """A learning algorithm as this project uses it."""

    model: type[BaseAlgorithm]
    networks: Mapping[str, type[BasePolicy]]
    """By action mode that the algorithm can act in; the first is the one taken unless another is named."""
    settings: type[Settings]

    @property
    def action_mode(self) -> str:
        """The action mode that fits best."""
        return next(iter(self.networks))


_ACTOR_CRITIC = {"multi_discrete": KnobPolicy, "discrete": ActorCriticPolicy, "box": ActorCriticPolicy}
_LSTM = {
    "multi_discrete": KnobLstmPolicy,
    "discrete": RecurrentActorCriticPolicy,
    "box": RecurrentActorCriticPolicy,
}
# TRPO compares distributions by torch's own, knob by knob, which `KnobPolicy` does away with.
_PLAIN = dict.fromkeys(_ACTOR_CRITIC, ActorCriticPolicy)

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(PPO, _ACTOR_CRITIC, PPOSettings),
    "a2c": Algorithm(A2C, _ACTOR_CRITIC, A2CSettings),
    "recurrent_ppo": Algorithm(RecurrentPPO, _LSTM, RecurrentPPOSettings),
    "trpo": Algorithm(TRPO, _PLAIN, TRPOSettings),
    "dqn": Algorithm(DQN, {"discrete": DQNPolicy}, DQNSettings),
    "qrdqn": Algorithm(QRDQN, {"discrete": QRDQNPolicy}, QRDQNSettings),
    "sac": Algorithm(SAC, {"box": SACPolicy}, SACSettings),
    "td3": Algorithm(TD3, {"box": TD3Policy}, TD3Settings),
    "tqc": Algorithm(TQC, {"box": TQCPolicy}, TQCSettings),
    "crossq": Algorithm(CrossQ, {"box": CrossQPolicy}, CrossQSettings),
}
"""Every algorithm by name; each has a file of settings in configs/agents."""

_NOT_OFFERED = {
    "maskable_ppo": "it leaves out what is forbidden, and here every level is always allowed; use ppo",
}


def algorithm(name: str) -> Algorithm:
    """An algorithm by name.

    Raises:
        ValueError: unknown, or not offered; the message says why or lists the known ones.
    """
    if name in _NOT_OFFERED:
        raise ValueError(f"no algo {name!r}: {_NOT_OFFERED[name]}")
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algo {name!r}; known: {sorted(ALGORITHMS)}, or the path of a YAML file")
    return ALGORITHMS[name]


def check_action_mode(name: str, mode: str) -> None:
    """Refuse an action mode that the algorithm cannot act in.

    Raises:
        ValueError: says which modes fit it, and which algorithms fit the mode.
    """
    networks = algorithm(name).networks
    if mode not in networks:
        fitting = sorted(other for other, entry in ALGORITHMS.items() if mode in entry.networks)
        raise ValueError(
            f"{name} acts by {' or '.join(networks)}, not by {mode!r}"
            + (f"; algorithms that do: {fitting}" if fitting else "")
        )


def lean_to_static(model: BaseAlgorithm, mode: str, knobs: KnobTable, bias: float) -> None:
    """Add `bias` to the first logits of the static service's levels.

    Raises:
        ValueError: box actions have no logits.
    """
    if mode == "box":
        raise ValueError(f"static_bias={bias} is added to logits, and box actions have none: set it to 0")
    static = knobs.action()
    logits = np.cumsum(knobs.nvec) - knobs.nvec + static
    if mode == "discrete":
        logits = np.array([np.ravel_multi_index(tuple(static), tuple(knobs.nvec))])
    with torch.no_grad():
        model.policy.get_parameter("action_net.bias")[torch.as_tensor(logits)] += bias
