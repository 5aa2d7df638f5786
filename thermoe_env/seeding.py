"""Seeds: one episode, one integer; requests, device and budgets draw from streams of it."""

from __future__ import annotations

import numpy as np


def episode_seed(seed: int, episode: int) -> int:
    """Seed of the episode number `episode` after `reset(seed=seed)`."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1, np.uint64)[0])
