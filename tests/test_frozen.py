"""The twin's episodes and short trainings are those that were frozen (`tests.frozen`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ONE_THREAD
from tests.frozen import FILE, SHORT

FROZEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    """Computed in a process of its own, so that no other test can move it."""
    command = [sys.executable, "-m", "tests.frozen"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=os.environ | ONE_THREAD, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("scenario", sorted(FROZEN["episodes"]))
def test_a_twin_episode_is_the_frozen_one(now: dict[str, Any], scenario: str) -> None:
    frozen, played = FROZEN["episodes"][scenario], now["episodes"][scenario]
    if now["made_on"] == FROZEN["made_on"]:
        assert played["digests"] == frozen["digests"]
    for name, mean in frozen["means"].items():
        if name == "raw":  # by field: one that was added moves no other
            assert {field: played["means"]["raw"][field] for field in mean} == pytest.approx(
                mean, rel=1e-6, abs=1e-9
            )
        else:
            assert np.allclose(played["means"][name], mean, rtol=1e-6, atol=1e-9), name


def test_no_scenario_is_left_unfrozen(now: dict[str, Any]) -> None:
    assert sorted(now["episodes"]) == sorted(FROZEN["episodes"])


@pytest.mark.parametrize("algo", SHORT)
def test_a_short_training_is_the_frozen_one(now: dict[str, Any], algo: str) -> None:
    frozen, trained = FROZEN["trainings"][algo], now["trainings"][algo]
    if now["made_on"] == FROZEN["made_on"]:
        assert trained["digest"] == frozen["digest"]
    assert trained["return"] == pytest.approx(frozen["return"], rel=0.05)
