"""Policies of other packages: named by class, played by the command, refused by what is wrong with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agents.evaluation.command import EvaluateConfig, evaluate
from agents.evaluation.report import wide_console
from agents.load import load_policy, long_label, model_file, policy_label
from agents.play.metrics import episode_metrics
from agents.play.rollout import play_live, play_twin
from agents.policies.policy import ConstantPolicy, PolicyError
from tests.conftest import ONE_THREAD
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem

ROOT = Path(__file__).parents[2]
GOOD = """
import numpy as np

class Narrow:
    def __init__(self, problem):
        self.action = problem.knobs.action(expert_count=1)

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.tile(self.action, (len(observation), 1)), state
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, from which modules can be imported; none of them is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_policy_of_another_package_is_played_by_the_command(
    scenario: str, problem: Problem, tmp_path: Path
) -> None:
    package = tmp_path / "elsewhere" / "outsider"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "policies.py").write_text(GOOD)
    options = ["--policy", "outsider.policies:Narrow", "--scenario", scenario, "--seeds", "2", "--out", "out"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *options],
        cwd=package.parent,
        env=os.environ | ONE_THREAD | {"THERMALMOE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    episodes = pd.read_csv(package.parent / "out" / "episodes.csv")
    assert sorted(episodes.policy.unique()) == ["Narrow", "best_constant", "static"]
    narrow = ConstantPolicy(problem.knobs.action(expert_count=1))
    expected = episode_metrics(play_twin(problem, narrow, [1000, 1001]))
    found = episodes[episodes.policy == "Narrow"]
    np.testing.assert_allclose(found.energy_j, expected.energy_j, rtol=1e-8)


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        (None, "nowhere:Mine", r"module 'nowhere' does not import: there is no module 'nowhere' in "),
        (None, "mine.deep:Mine", r"module 'mine\.deep' does not import: there is no module 'mine' in "),
        (None, ":Mine", r"module '' does not import: ValueError"),
        ("import nothing_such", "mine:Mine", r"ModuleNotFoundError: No module named 'nothing_such' \(.*1\)"),
        (
            "\n1 / 0",
            "mine:Mine",
            r"does not import: ZeroDivisionError: division by zero \(.*mine\.py, line 2\)",
        ),
        ("class:", "mine:Mine", r"does not import: SyntaxError: invalid syntax \(mine\.py, line 1\)"),
        ("exit(3)", "mine:Mine", r"does not import: SystemExit: 3 \("),
        (GOOD, "mine:Narow", r"mine\.py has no 'Narow'; what has `predict`: \['Narrow'\]"),
        ("Mine = 3", "mine:Mine", r"Mine is a int, name a class"),
        ("class Mine: pass", "mine:Mine", r"Mine must take one argument, .*\(too many positional"),
        ("class Mine:\n def __init__(self, a, b): 0", "mine:Mine", r"one argument.*missing a required.*'b'"),
        (
            "class Mine:\n def __init__(self, a): 1 / 0",
            "mine:Mine",
            r"Mine\(problem\) failed: ZeroDiv.*line 2",
        ),
        ("class Mine:\n def __init__(self, a): 0", "mine:Mine", r"Mine lacks `predict\(observation, state"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(
    problem: Problem, folder: Path, source: str | None, spec: str, message: str
) -> None:
    if source is not None:
        (folder / "mine.py").write_text(source)
    with pytest.raises(PolicyError, match=f"policy '{spec}': .*{message}") as refusal:
        load_policy(spec, problem)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda n: (np.zeros(2, int), None), r"shape \(2,\)"),
        (lambda n: (np.zeros((n, 3), int), None), r"shape \(\d, 3\)"),
        (lambda n: (np.zeros((n + 1, 2), int), None), r"shape \(\d, 2\)"),
        (lambda n: np.zeros((n, 2), int), "got ndarray"),
        (lambda n: None, "got NoneType"),
    ],
)
def test_an_answer_that_is_no_action_is_refused_in_both_ways_of_playing(
    problem: Problem, answer: Any, got: str
) -> None:
    class Wrong:
        def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> Any:
            return answer(len(observation))

    rule = (
        r"policy 'mine': predict must return \(levels \[{}, 2\] of \('batch_size', 'expert_count'\), state\)"
    )
    with pytest.raises(PolicyError, match=f"{rule.format(3)}, .*{got}"):
        play_twin(problem, Wrong(), [1, 2, 3], "mine")
    with pytest.raises(PolicyError, match=f"{rule.format(1)}, .*{got}"):
        play_live(ThermalMoEEnv(problem.scenario, "twin"), Wrong(), 1, "mine")


@pytest.mark.usefixtures("no_figures")
def test_two_classes_of_one_name_are_told_apart(scenario: str, folder: Path) -> None:
    for name in ("mine", "yours"):
        (folder / f"{name}.py").write_text(GOOD)
    policies = ("mine:Narrow", "yours:Narrow")
    config = EvaluateConfig(policy=policies, scenario=scenario, seeds=1, out=folder / "out")
    results = evaluate(config, wide_console())
    assert {"Narrow", "yours:Narrow"} < set(results.episodes.policy)


def test_what_exists_is_a_path_and_a_class_is_known_by_its_module(problem: Problem, folder: Path) -> None:
    (folder / "mine.py").write_text(GOOD)
    assert (policy_label("mine:Narrow"), long_label("mine:Narrow")) == ("Narrow", "mine:Narrow")
    assert model_file("mine:Narrow") == folder / "mine.py"
    (folder / "mine:Narrow").mkdir()
    assert policy_label("mine:Narrow") == "mine:Narrow"
    with pytest.raises(ValueError, match=r"holds no best_model\.zip"):
        load_policy("mine:Narrow", problem)
