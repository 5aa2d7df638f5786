"""Seeds: one episode, one integer; requests, device and budgets draw from streams of it."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from moe.randomness import derive


def as_seed(seed: Any) -> int:
    """A seed as Python's integer, whichever kind of integer it was.

    Raises:
        ValueError: it is no integer (a float or a bool, say), or outside [0, 2**64).
    """
    try:
        number = -1 if isinstance(seed, bool | np.bool_) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise ValueError(f"a seed must be an integer in [0, 2**64), got {seed!r}; choose one in that range")
    return number


def episode_seed(seed: int, episode: int) -> int:
    """Seed of the episode number `episode` after `reset(seed=seed)`, in [0, 2**64).

    Raises:
        ValueError: `seed` is none, see `as_seed`.
    """
    return int(derive(np.uint64(as_seed(seed)), np.uint64(episode)))
