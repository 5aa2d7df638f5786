"""Each knob, moved alone, has its own physical effect: under overload, by the made-up profile's formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.score import KNOBS_READ

SECONDS = 20
STATIC = {
    "routing_bias": 0.0, "batch_size": 2048, "expert_count": 4, "ttt_steps": 0, "pace": 1.0, "sm_clock": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def overloaded(problem: Problem) -> Problem:
    """Every batch is full, and the device is never free but where pace lets it idle."""
    traffic = {"kind": "poisson", "low_load": 5.0, "high_load": 5.0, "shifts": [0]}
    overrides: dict[str, Any] = {
        "knobs": list(KNOBS_READ),
        "static": STATIC,
        "episode_s": SECONDS,
    }
    return Problem.of(load_scenario(problem.scenario, traffic=traffic, **overrides))


@pytest.mark.parametrize(
    "moved",
    [
        {},
        {"routing_bias": 1.0},
        {"batch_size": 512},
        {"batch_size": 8192},
        {"expert_count": 1},
        {"expert_count": 8},
        {"ttt_steps": 2},
        {"pace": 0.2},
        {"pace": 0.6},
        {"sm_clock": 0.5},
        {"sm_clock": 0.8},
    ],
    ids=str,
)
def test_a_knob_moved_alone_does_what_its_name_says(overloaded: Problem, moved: dict[str, float]) -> None:
    env = ThermalMoEEnv(overloaded.scenario, world="twin")
    intervals = []
    env.reset(seed=2)
    for _ in range(SECONDS):
        observation, *_, info = env.step(overloaded.knobs.action(**moved))
        intervals.append(info["work"])
    done = {name: sum(np.sum(work[name]) for work in intervals) for name in intervals[0]}
    set_to = STATIC | moved
    assert info["knobs"] == set_to | {"admission": 1.0}  # which answers of one pass do not have
    # The profile's formulas (tests/thermoe_env/conftest.py); time goes with one over the clock.
    work = set_to["batch_size"] * (1 + set_to["expert_count"]) * (1.0 - 0.2 * set_to["routing_bias"])
    adapting_s = set_to["ttt_steps"] * 0.015
    batch_s = (0.004 + 3.5e-6 * work + adapting_s) / set_to["sm_clock"]
    assert done["busy_s"] == pytest.approx(set_to["pace"] * SECONDS, rel=0.03)
    assert done["batches"] == pytest.approx(set_to["pace"] * SECONDS / batch_s, abs=2)
    assert done["answered"] == pytest.approx(set_to["batch_size"] * done["batches"], rel=0.01)
    assert done["ttt_steps"] == set_to["ttt_steps"] * done["batches"]
    assert info["work"]["sm_clock"] == set_to["sm_clock"]
    shown = ranges_of(overloaded).decode(observation)
    for name in set_to:
        levels = overloaded.knobs.levels[name]
        assert shown[f"{name}_level"] == pytest.approx(
            levels.index(set_to[name]) / (len(levels) - 1), abs=1e-6
        )
