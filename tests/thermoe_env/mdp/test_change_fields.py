"""The fields about changes of the inputs, recomputed from what an episode's `info` says was answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.profiles import save_profile
from tests.moe.service.page_hinkley import rise
from tests.thermoe_env.conftest import make_profile
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import FIELD_NAMES, ranges_of
from thermoe_env.mdp.interval import CHANGE_THRESHOLD, CHANGE_TOLERANCE

NAMES = ("since_change_s", "adapted_since_change_s")
MOVING = {"shift_dwell_s": 20.0}
SPARSE = {"kind": "poisson", "low_load": 2e-5, "high_load": 2e-5, "interactive_share": 1.0}
"""Now and then nobody asks in an interval."""


def expected(alarms: list[bool], adapted: list[bool], interval_s: float) -> list[tuple[float, float]]:
    """Both fields after each interval, before they are clipped."""
    start, rows = 0, []
    for t, alarm in enumerate(alarms):
        if alarm:
            start = t + 1
        rows.append(((t + 1 - start) * interval_s, sum(adapted[start : t + 1]) * interval_s))
    return rows


@pytest.mark.parametrize("confidence", ["as measured", "constant"])
@pytest.mark.parametrize("interval_s, traffic", [(1.0, MOVING), (0.5, MOVING), (1.0, SPARSE)])
def test_the_fields_are_what_the_definition_of_the_test_says_of_the_answers(
    tmp_path: Path, confidence: str, interval_s: float, traffic: dict[str, Any]
) -> None:
    """Random knobs, held for a random time. Under constant confidence all changes show in entropy alone."""
    profile = make_profile()
    assert profile.mixture is not None
    answers, mixture = (
        0.997 * profile.confidence,
        0.997 * profile.mixture,
    )  # round numbers end on the threshold
    if confidence == "constant":
        answers[:], mixture[..., 1] = 0.8, 0.8
    profile = replace(profile, confidence=answers, entropy=0.997 * profile.entropy, mixture=mixture)
    save_profile(profile, tmp_path / "profile.json")
    overrides = {
        "profile": str(tmp_path / "profile.json"),
        "interval_s": interval_s,
        "episode_s": 120,
        "traffic": traffic,
    }
    env = ThermalMoEEnv("vision", world="twin", overrides=overrides)
    knobs, ranges = env.problem.knobs, ranges_of(env.problem)
    ttt_steps = knobs.controlled.index("ttt_steps")
    rng = np.random.default_rng(5)
    seen, alarms, adapted, answered = [], [], [], []
    since: tuple[list[float], list[float]] = ([], [])
    action, ended, n_by = rng.integers(0, knobs.nvec), False, np.zeros(2, int)
    env.reset(seed=9)
    while not ended:
        if rng.random() < 0.08:
            action = rng.integers(0, knobs.nvec)
        if rng.random() < 0.3:
            action[ttt_steps] = rng.integers(0, knobs.nvec[ttt_steps])
        observation, _, terminated, truncated, info = env.step(action)
        ended, work = terminated or truncated, info["work"]
        seen.append([float(ranges.decode(observation)[name]) for name in NAMES])
        adapted.append(bool(action[ttt_steps] > 0))
        answered.append(sum(work["answered"]) > 0)
        alarm = False
        if answered[-1]:
            for i, name in enumerate(("confidence", "entropy")):
                since[i].append(work[name])
            rises = [rise(values, CHANGE_TOLERANCE) for values in since]
            assert min(abs(each - CHANGE_THRESHOLD) for each in rises) > 1e-9, "rounding decides"
            n_by += [each > CHANGE_THRESHOLD for each in rises]
            alarm = max(rises) > CHANGE_THRESHOLD
        if alarm:
            since = ([], [])
        alarms.append(alarm)
    wanted = np.array(expected(alarms, adapted, interval_s))
    low, high = np.array(ranges)[:, [FIELD_NAMES.index(name) for name in NAMES]]
    np.testing.assert_allclose(seen, np.clip(wanted, low, high), atol=1e-5)
    # The cases that the episode is for.
    assert (wanted[:, 1] > high[1]).any() and sum(alarms) > 5
    assert n_by[1] > 0 and (n_by[0] == 0) == (confidence == "constant")
    assert all(answered) == (traffic is MOVING)
