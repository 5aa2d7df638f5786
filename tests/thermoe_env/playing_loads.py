"""Episodes of the twin under loads made up for tests, and all that was said of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe.service.queueing import SLOT_S
from moe.workload import Knobs, WorkStats
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.scenario import Scenario

FULL = {"kind": "poisson", "low_load": 1.5, "high_load": 1.5}
"""More than the standard service can answer, all the time."""


class Load:
    """A service that draws `dynamic_w(t)` above idle for as much of the time as it may run."""

    def __init__(self, dynamic_w: Callable[[float], float], goes_on: bool = False) -> None:
        """`goes_on`: what runs takes longer than any drain."""
        self._dynamic_w, self._goes_on = dynamic_w, goes_on

    def reset(self, seed: int) -> None:
        self._time_s = 0.0

    def run(
        self, knobs: Knobs, duration_s: float, open_classes: int = 2, promised_tpot_s: float | None = None
    ) -> WorkStats:
        share = knobs.pace if open_classes or self._goes_on else 0.0
        watts, self._time_s = self._dynamic_w(self._time_s) * share, self._time_s + duration_s
        energy_j = np.full((round(duration_s / SLOT_S), 1), watts * SLOT_S)
        return WorkStats(slot_energy_j=energy_j, device_clock=np.ones(1), busy_s=share * duration_s)

    def close(self) -> None: ...


class Played(NamedTuple):
    """An episode: infos of its intervals, and what was observed after each."""

    infos: list[dict[str, Any]]
    seen: dict[str, np.ndarray]

    def all(self, *keys: str) -> np.ndarray:
        values: list[Any] = self.infos
        for key in keys:
            values = [value[key] for value in values]
        return np.array(values)


def play(scenario: Scenario, load: Load | None = None, seed: int = 0, random: bool = False) -> Played:
    """An episode of the twin under the standard knobs, or random ones, of its own service or another load."""
    env = ThermalMoEEnv(scenario, world="twin")
    if load is not None:
        env._world.workload = load
    env.action_space.seed(seed)
    env.reset(seed=seed)
    infos, seen, over = [], [], False
    while not over:
        action = env.action_space.sample() if random else env.problem.knobs.action()
        observation, _, terminated, over, info = env.step(action)
        assert not terminated
        infos.append(info)
        seen.append(observation)
    return Played(infos, ranges_of(env.problem).decode(np.array(seen)))
