"""The twin plays a bank of states, by a profile that was measured with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe import ttt
from moe.profiles import load_profile, save_profile
from moe.workload import Knobs
from tests.thermoe_env.conftest import make_profile
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario
from thermoe_env.twin.workload import TwinWorkload

VISITS = (1, 2, 1, 3, 2)
"""Shifts in force, two seconds each."""


@pytest.fixture
def banking(problem: Problem, tmp_path: Path) -> Scenario:
    """The default scenario on the made-up device, adapted by a bank and as good in each state as by TENT."""
    measured = {"adaptation": {"method": "bank", "group": "norms"}}
    profile = replace(make_profile(), provenance=measured, adapt_rate=ttt.step_share(ttt.Bank()))
    save_profile(profile, tmp_path / "bank.json")
    assert load_profile(tmp_path / "bank.json").adapt_rate == 1.0
    return load_scenario(problem.scenario, profile=str(tmp_path / "bank.json"), adaptation={"method": "bank"})


def accuracies(scenario: Scenario) -> np.ndarray:
    """Share of right answers by second, with one step after each batch.  # [visits, 2]"""
    workload = TwinWorkload(Problem.of(scenario), lambda: 1.0)
    workload.reset(0)
    found = []
    for second, shift in enumerate(np.repeat(VISITS, 2)):
        workload._here.shift[0, second] = shift
        stats = workload.run(Knobs(ttt_steps=1), 1.0, 2)
        found.append(stats.correct / sum(stats.answered))
    return np.array(found).reshape(len(VISITS), 2)


def test_a_shift_that_returns_is_answered_in_its_own_state_after_the_first_batches(banking, problem):
    own_k = 2  # four experts
    pure = make_profile().accuracy[:, :, own_k, 0]  # [shift, state]
    settled = np.array([pure[shift, shift + 1] for shift in VISITS])
    first, second = accuracies(banking).T
    assert second == pytest.approx(settled)
    left = (0, *(shift + 1 for shift in VISITS[:-1]))  # the state of the shift before, for the first slot
    quarter = [
        0.25 * pure[shift, old] + 0.75 * own for shift, old, own in zip(VISITS, left, settled, strict=True)
    ]
    assert first == pytest.approx(quarter, abs=0.02)


def test_an_environment_plays_a_profile_of_a_bank_and_no_other_methods(banking):
    env = ThermalMoEEnv(banking, world="twin")
    env.reset(seed=0)
    *_, info = env.step(env.action_space.sample())
    assert info["world"] == "twin"
    with pytest.raises(ScenarioError, match=r"'tent', 'norms'.*measured with.*'bank', 'norms'"):
        Problem.of(load_scenario(banking, adaptation={"method": "tent", "budget": {}}))
