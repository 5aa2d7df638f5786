"""The study of robustness: its cells against `evaluate`, what it keeps, and what does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console
from stable_baselines3 import PPO

from agents.evaluation import command as evaluation
from agents.evaluation.command import EvaluateConfig, evaluate
from agents.learning.interface import INTERFACE_FILE, interface_of
from agents.learning.models import ModelFileError
from agents.learning.vec import TwinVecEnv
from moe.errors import DataCorruptError
from studies import robustness
from studies.repeats import StudyError
from studies.robustness import Arguments, Condition, Study, main
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

CONDITIONS: dict[str, Any] = {
    "default": {"title": "default"},
    "wide": {"title": "wide", "spread": 4.0, "overrides": {"traffic": {"dwell_s": 5.0}}},
    "language": {"title": "text", "scenario": "language"},
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMALMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(yaml.safe_dump({"conditions": CONDITIONS}))
    return str(path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a training run on the default scenario leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    folder.mkdir()
    problem = Problem.of(load_scenario("vision", episode_s=20))
    env = TwinVecEnv(problem, 2)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, policy_kwargs={"net_arch": [8]}, device="cpu")
    model.save(folder / "best_model.zip")
    (folder / "config.yaml").write_text("algo: ppo\n")
    (folder / INTERFACE_FILE).write_text(interface_of(problem))
    return folder


def arguments(out: Path, config: str, run: Path, **changes: Any) -> Arguments:
    values = {"policy": ("rule_based", str(run)), "seeds": 3, "duration": 20, "config": config, "out": out}
    return Arguments(**{**values, **changes})


def quiet() -> Console:
    return Console(quiet=True)


def test_cells_are_what_evaluate_finds(
    config: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of the table from the other command, which is told the same scenario."""
    monkeypatch.setattr(evaluation, "write_figures", lambda *_: [])
    out = tmp_path / "out"
    main(arguments(out, config, run_folder), quiet())
    table = pd.read_csv(out / "robustness.csv")
    rows = table.groupby("condition").policy.apply(list)
    assert rows.to_dict() == {name: ["static", "rule_based", "trained"] for name in CONDITIONS}
    width = {"resistance": 0.2, "time_constant": 0.4, "leakage": 0.8, "energy": 0.12, "inlet_c": 4.0}
    changes = {"wide": {"randomize": width, "traffic": {"dwell_s": 5.0}}}
    for name in CONDITIONS:
        base = "language" if name == "language" else "vision"
        raw = yaml.safe_load(config_path("scenarios", base, ".yaml").read_text())
        for section, values in changes.get(name, {}).items():
            raw[section] = raw.get(section, {}) | values
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        policies = ("rule_based",) if name == "language" else ("rule_based", str(run_folder))
        other = evaluate(
            EvaluateConfig(
                policy=policies, scenario=str(tmp_path / f"{name}.yaml"), duration=20, seeds=3, seed=5000,
                out=tmp_path / name,
            ),
            quiet(),
        ).summary.set_index("policy")  # fmt: skip
        own = table[table.condition == name].set_index("policy")
        numbers = [column for column in other.columns if column.startswith(("j_per_good", "quality", "late"))]
        for policy in ("static", *(Path(p).name for p in policies)):
            found, expected = own.loc[policy], other.loc[policy]
            pd.testing.assert_series_equal(
                found[numbers].astype(float), expected[numbers].astype(float), rtol=1e-7
            )
            assert ("" if pd.isna(found.infeasible) else found.infeasible) == expected.infeasible

    lost = table[(table.condition == "language") & (table.policy == "trained")].iloc[0]
    assert "trained for something else than this scenario" in lost.not_played
    assert pd.isna(lost.j_per_good) and pd.isna(lost["rank"])
    text = (out / "robustness.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| text |"))
    assert row.endswith("| does not fit |") and "* text, trained: does not fit: " in text
    for record in table.loc[table.policy == "rule_based", :].to_dict("records"):
        ratio, low, high = (record[f"j_per_good_vs_static{end}"] for end in ("", "_low", "_high"))
        assert f"{ratio:.3f} ({low:.3f}-{high:.3f})" in text
    assert (out / "robustness.png").stat().st_size > 5000


def test_a_run_that_was_cut_goes_on(
    config: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(arguments(whole, config, run_folder), quiet())
    played: list[str] = []
    play = robustness.play_twin

    def stopping(problem: Problem, policy: Any, seeds: Any, name: str) -> Any:
        if len(played) == 4:
            played.append("stop")
            raise KeyboardInterrupt
        played.append(name)
        return play(problem, policy, seeds, name)

    monkeypatch.setattr(robustness, "play_twin", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(cut, config, run_folder), quiet())
    assert len(list(cut.rglob("*.json"))) - 1 == 4 and not (cut / "robustness.csv").exists()  # versions.json
    main(arguments(cut, config, run_folder), quiet())
    assert len(played) - 1 == 3 * len(CONDITIONS) - 1  # one does not fit
    for name in ("robustness.csv", "robustness.md", "robustness.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    main(arguments(cut, config, run_folder), quiet())
    assert len(played) - 1 == 3 * len(CONDITIONS) - 1  # nothing is played again
    for changes, what in (({"seeds": 4}, "seeds"), ({"duration": 21}, "scenario")):
        with pytest.raises(StudyError, match=rf"static\.json was played with another {what}: give another"):
            main(arguments(cut, config, run_folder, **changes), quiet())


def test_another_model_under_the_same_name_is_not_mixed_in(
    config: str, run_folder: Path, tmp_path: Path
) -> None:
    out, conditions = tmp_path / "out", ("default",)
    main(arguments(out, config, run_folder, conditions=conditions), quiet())
    path = out / "cells" / "default" / "trained.json"
    cell = json.loads(path.read_text())
    cell["settings"]["policy"] = "sha256:0"
    path.write_text(json.dumps(cell))
    with pytest.raises(StudyError, match=r"trained\.json was played with another policy"):
        main(arguments(out, config, run_folder, conditions=conditions), quiet())
    path.write_text("{")
    with pytest.raises(DataCorruptError, match=r"trained\.json is no JSON"):
        main(arguments(out, config, run_folder, conditions=conditions), quiet())


def test_few_seeds_give_no_intervals(config: str, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(arguments(out, config, run_folder, seeds=2, conditions=("default",)), quiet())
    table = pd.read_csv(out / "robustness.csv")
    ends = [name for name in table if name.endswith(("_low", "_high"))]
    assert ends and table[ends].isna().to_numpy().all() and table.j_per_good_vs_static.notna().all()
    text = (out / "robustness.md").read_text()
    assert "no intervals below 3 seeds" in text and not re.search(r"\(\d", text.partition("## ")[0])


def test_what_cannot_be_played_is_refused_first(config: str, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StudyError, match=r"unknown conditions \['storm'\]; known: \['default'"):
        main(arguments(out, config, run_folder, conditions=("storm",)), quiet())
    with pytest.raises(StudyError, match="go by one name"):
        main(arguments(out, config, run_folder, policy=(str(run_folder), f"{run_folder}/")), quiet())
    with pytest.raises(ValueError, match="unknown policy 'rule_bases'"):
        main(arguments(out, config, run_folder, policy=("rule_bases",)), quiet())
    with pytest.raises(ModelFileError, match=r"holds no best_model\.zip"):
        main(arguments(out, config, run_folder, policy=(str(run_folder.parent),)), quiet())
    with pytest.raises(
        ModelFileError, match="trained for something else"
    ):  # not made for the scenario itself
        main(arguments(out, config, run_folder, scenario="language"), quiet())
    assert not out.exists()


def test_shipped_conditions_are_scenarios() -> None:
    conditions = robustness.load_settings(Study, "studies", "robustness").conditions
    scenarios = {name: condition.apply("vision", None) for name, condition in conditions.items()}
    plain = load_scenario("vision")
    assert scenarios["default"] == plain == Condition(title="").apply("vision", None)
    for name, factor in (("spread-2", 2.0), ("spread-4", 4.0)):
        for field in ("resistance", "time_constant", "leakage", "energy", "inlet_c"):
            width = getattr(scenarios[name].randomize, field)
            assert width == pytest.approx(factor * getattr(plain.randomize, field))
    assert scenarios["hot"].devices[0].inlet_offset_c == 8.0
    assert {scenarios[name].name for name in ("two-devices", "language")} == {"two-devices", "language"}
    assert scenarios["replay"].traffic.kind == "trace" and len(set(map(repr, scenarios.values()))) == len(
        scenarios
    )
    for scenario in scenarios.values():
        Problem.of(scenario)
