"""Seeds: one episode, one integer; requests, device and budgets draw from streams of it."""

from __future__ import annotations

import numpy as np

from moe.randomness import derive


def episode_seed(seed: int, episode: int) -> int:
    """Seed of the episode number `episode` after `reset(seed=seed)`, in [0, 2**64).

    Raises:
        ValueError: a seed outside that range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must lie in [0, 2**64), got {seed}; choose one in that range")
    return int(derive(np.uint64(seed), np.uint64(episode)))
