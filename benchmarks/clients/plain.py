"""The plain environment, which every client is compared with: what it plays for a seed and actions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import gymnasium
import numpy as np

ID = "thermoe_env:ThermalMoETwin-v0"
MO_ID = "thermoe_env:ThermalMoETwinMO-v0"


class Episode(NamedTuple):
    """What one environment returned, beginning with its reset."""

    observations: np.ndarray
    """float32 [T + 1, fields]."""
    rewards: np.ndarray
    """float64 [T], or [T, objectives]."""
    ended: np.ndarray
    """bool [T], terminated or truncated."""
    infos: list[dict[str, Any]]
    """T + 1, that of the reset first."""


def replay(seed: int, actions: Iterable[Any], id: str = ID, **kwargs: Any) -> Episode:
    """Play actions, one per interval, from a seed; past an end it resets without one and goes on.

    Args:
        seed: of the first episode.
        actions: of its action space.
        id: of the environment.
        kwargs: for `gymnasium.make`.
    """
    env = gymnasium.make(id, **kwargs)
    observation, info = env.reset(seed=seed)
    observations, infos, rewards, ended = [observation], [info], [], []
    for action in actions:
        if ended and ended[-1]:
            env.reset()
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        infos.append(info)
        rewards.append(reward)
        ended.append(terminated or truncated)
    return Episode(np.array(observations), np.array(rewards), np.array(ended), infos)
