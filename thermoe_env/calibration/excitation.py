"""What `calibrate record` makes a card do: a designed sequence of loads that shows each of its constants.

A grid over experts per token and tokens gives the energy of each kind of work; idling right after full load
gives leakage; long holds at full load, at rest and in between give the slow heat; random levels the fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

SHORTEST_S = 240.0
TOKENS = (64, 512, 4096, 32768)
TOP_K = (1, 2, 4, 8)
DUTY = (0.3, 0.6, 1.0)
_RANDOM_TOKENS = (512, 2048, 32768)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load, held for a while."""

    phase: str
    seconds: float
    tokens: int = 0
    """Tokens per forward pass; 0 idles."""
    top_k: int = 0
    duty: float = 1.0
    """Busy share of the time."""


def schedule(seconds: float, seed: int) -> Iterator[Level]:
    """Levels that fill `seconds`: the designed part takes two thirds, random levels the rest.

    Args:
        seconds: length of the whole, at least `SHORTEST_S`.
        seed: draws the random levels.

    Raises:
        ValueError: too short for the slow heat to show.
    """
    if seconds < SHORTEST_S:
        raise ValueError(
            f"an excitation needs at least {SHORTEST_S:.0f} s, got {seconds}: slow heat takes that"
        )
    unit = seconds / 480.0
    full = {"tokens": TOKENS[-1], "top_k": TOP_K[-1]}
    yield Level(phase="idle", seconds=15.0 * unit)
    for top_k, tokens in product(TOP_K, TOKENS):
        yield Level(phase="grid", seconds=3.0 * unit, tokens=tokens, top_k=top_k)
    yield Level(phase="idle", seconds=30.0 * unit)
    yield Level(phase="hold", seconds=90.0 * unit, **full)
    yield Level(phase="idle", seconds=50.0 * unit)
    yield Level(phase="hold", seconds=45.0 * unit, **full, duty=0.4)
    yield Level(phase="hold", seconds=40.0 * unit, tokens=TOKENS[-2], top_k=2, duty=0.6)
    rng = np.random.default_rng(seed)
    left_s = 480.0 * unit - (15.0 + 48.0 + 30.0 + 90.0 + 50.0 + 45.0 + 40.0) * unit
    while left_s > 0.0:
        held_s = min(left_s, float(np.exp(rng.uniform(np.log(2.0), np.log(30.0)))))
        if rng.random() < 0.2:
            yield Level(phase="random", seconds=held_s)
        else:
            yield Level(
                phase="random",
                seconds=held_s,
                tokens=int(rng.choice(_RANDOM_TOKENS)),
                top_k=int(rng.choice(TOP_K)),
                duty=float(rng.choice(DUTY)),
            )
        left_s -= held_s
