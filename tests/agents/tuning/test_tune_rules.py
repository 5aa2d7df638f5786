"""The search for settings: what may be searched, and that it finds what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from agents.policies.registry import POLICIES
from agents.tuning import rules as tune_rules
from agents.tuning.rules import TUNABLE, TuneConfig, mean_return, tune, write_settings
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import config_path, load_settings
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a scenario of 10 s."""
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "vision", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "episode_s": 10}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "tiny.yaml")


@pytest.mark.parametrize("name", TUNABLE)
def test_bounds_hold_the_start_and_the_shipped_settings(name: str) -> None:
    rule = TUNABLE[name]
    assert name in POLICIES
    for settings in (rule.start, load_settings(type(rule.start), "agents", name)):
        for field, (low, high) in rule.bounds.items():
            assert low <= getattr(settings, field) <= high, field


def test_found_settings_earn_what_is_said(
    scenario: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune_rules, "TUNING_SEEDS", SEEDS)
    config = TuneConfig(policy="pace_only", scenario=scenario, knobs=("pace", "batch_size"), trials=30)
    found, value = tune(config)
    rule = TUNABLE["pace_only"]
    problem = Problem.of(load_scenario(scenario, knobs=["pace", "batch_size"]))
    assert mean_return(problem, rule.build(problem, found), SEEDS) == value
    assert value >= mean_return(problem, rule.build(problem, rule.start), SEEDS)
    write_settings(tmp_path / "found.yaml", "how", found)
    assert load_settings(type(found), "agents", tmp_path / "found.yaml") == found
    assert asdict(found)["knobs"] == ("pace",)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'static' has no settings to search; these have.*'pid'"):
        TuneConfig(policy="static")
