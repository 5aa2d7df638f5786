"""Evaluation end to end at small scale, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console
from stable_baselines3 import PPO

from agents.evaluation import command as evaluation
from agents.evaluation.command import RESERVED_SEEDS, EvaluateConfig, evaluate
from agents.files import RunFolderError
from agents.learning.interface import INTERFACE_FILE, interface_of
from agents.learning.models import ModelFileError, UntrustedModelError
from agents.learning.validation import VALIDATION_SEEDS
from agents.learning.vec import TwinVecEnv
from agents.load import load_policy
from agents.play import rollout
from agents.play.metrics import KPIS, episode_metrics
from agents.play.rollout import play_live
from agents.policies.registry import make_policy
from agents.policies.search import SEARCH_SEEDS
from thermoe_env.configs import config_path
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import GpuLostError
from thermoe_env.mdp.fields import FIELDS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


def read_tables(out: Path) -> list[Any]:
    return [pd.read_csv(out / name) for name in ("summary.csv", "episodes.csv", "steps.csv.gz")]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def twin_as_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the twin stand for the live device."""
    monkeypatch.setattr(evaluation, "ThermalMoEEnv", lambda scenario, **_: ThermalMoEEnv(scenario, "twin"))


def quiet() -> Console:
    return Console(quiet=True)


def test_command_writes_everything(
    scenario: str,
    problem: Problem,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    out = tmp_path / "out"
    options = f"--policy rule_based {run_folder} --scenario {scenario} --seeds 2 --seed 7 --out {out}"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options.split()])
    evaluation.main()
    shown = capsys.readouterr().out
    policies = ["static", "best_constant", "rule_based", "trained"]
    assert all(policy in shown for policy in policies) and str(out) in shown and "simulated (twin)" in shown

    summary, episodes, steps = read_tables(out)
    assert set(summary.policy) == set(policies) and set(KPIS) <= set(summary.columns)
    assert episodes.groupby("policy").seed.apply(list).to_dict() == {policy: [7, 8] for policy in policies}
    assert steps.groupby(["policy", "seed"]).size().eq(20).all()
    env = ThermalMoEEnv(problem.scenario, "twin")
    for policy in ("static", "rule_based"):
        expected: Any = episode_metrics(play_live(env, make_policy(policy, problem), 8, policy))[list(KPIS)]
        found = episodes[(episodes.policy == policy) & (episodes.seed == 8)][list(KPIS)]
        np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-8)

    assert yaml.safe_load((out / "config.yaml").read_text())["evaluate"]["seeds"] == 2
    assert (out / "command.txt").read_text().endswith(f"{options}\n")
    assert "numpy" in json.loads((out / "versions.json").read_text())
    figures = sorted(path.name for path in (out / "figures").iterdir())
    assert len(figures) == 8 and all(name.endswith(".png") for name in figures)
    report = (out / "report.html").read_text()
    assert report.index("<table") < report.index("<img") and report.count("data:image/png;base64,") == 8
    assert not re.findall(r'(?:src|href)="(?!data:)', report)
    assert not list(out.rglob("*.part"))


@pytest.mark.usefixtures("no_figures")
def test_live_plays_the_same_episodes(scenario: str, tmp_path: Path, twin_as_live: None) -> None:
    twin = evaluate(EvaluateConfig(scenario=scenario, seeds=2, out=tmp_path / "twin"), quiet())
    live = evaluate(EvaluateConfig(scenario=scenario, seeds=2, out=tmp_path / "live", live=True), quiet())
    order = ["policy", "seed"]
    pd.testing.assert_frame_equal(
        twin.episodes.sort_values(order, ignore_index=True),
        live.episodes.sort_values(order, ignore_index=True),
    )
    assert live.episodes.policy.tolist()[:4] == ["static", "best_constant", "rule_based", "best_constant"]


@pytest.mark.usefixtures("no_figures", "twin_as_live")
@pytest.mark.parametrize(("live", "by"), [(False, "path"), (True, "name")])
def test_traffic_is_that_of_the_trace(
    scenario: str, problem: Problem, tmp_path: Path, live: bool, by: str
) -> None:
    path = config_path("traces/requests", "azure-conv-2023", ".csv")
    traffic = path.stem if by == "name" else str(path)
    config = EvaluateConfig(
        policy=(), scenario=scenario, traffic=traffic, seeds=2, live=live, out=tmp_path / "out"
    )
    results = evaluate(config, quiet())
    counts = pd.read_csv(path, parse_dates=["TIMESTAMP"]).resample("s", on="TIMESTAMP", origin="start").size()
    load = results.problem.scenario.traffic
    rate = 0.5 * (load.low_load + load.high_load) * problem.capacity_rps / counts.mean()
    stretches = np.lib.stride_tricks.sliding_window_view(rate * counts.to_numpy(), 20)
    _, _, steps = read_tables(tmp_path / "out")
    for _, episode in steps.groupby(["policy", "seed"]):
        arrived = (episode.arrived_interactive + episode.arrived_deferrable).to_numpy()
        distance = np.abs(arrived - stretches) - 6.0 * np.sqrt(stretches)  # <= 0: within the Poisson noise
        assert distance.max(axis=1).min() <= 0.0
    assert "requests replayed from azure-conv-2023.csv" in (tmp_path / "out" / "report.html").read_text()


def test_unusable_traffic_is_refused_before_a_folder_is_made(scenario: str, tmp_path: Path) -> None:
    short = tmp_path / "short.csv"
    short.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,1\n2024-05-10 00:00:09,1,1\n"
    )
    telemetry = str(config_path("traces", "h100_steps_telemetry", ".csv"))
    for traffic, message in (
        ("azure", r"no traces/requests 'azure': give one of \['azure-code-2023', 'azure-conv-2023'\] or the"),
        (str(short), r"short\.csv: covers 18 s, the episode needs 21 s: shorten the episode"),
        (telemetry, "no column TIMESTAMP or Timestamp in the header"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateConfig(scenario=scenario, traffic=traffic, out=tmp_path / "out"), quiet())
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_figures", "twin_as_live")
@pytest.mark.parametrize("stop", [GpuLostError("gone"), KeyboardInterrupt()])
def test_failure_keeps_what_was_played(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    step, played = ThermalMoEEnv.step, 0

    def failing(self: ThermalMoEEnv, action: Any) -> Any:
        nonlocal played
        played += 1
        if played > 70:  # in the fourth episode
            raise stop
        return step(self, action)

    monkeypatch.setattr(ThermalMoEEnv, "step", failing)
    with pytest.raises(type(stop)):
        evaluate(EvaluateConfig(scenario=scenario, seeds=3, out=tmp_path / "out", live=True), quiet())
    summary, episodes, steps = read_tables(tmp_path / "out")
    assert episodes.whole.tolist() == [True, True, True, False] and len(steps) == 70
    assert summary.set_index("policy").episodes.to_dict() == {
        "static": 1,
        "best_constant": 1,
        "rule_based": 1,
    }
    assert "cut short after 10 s" in (tmp_path / "out" / "report.html").read_text()


def test_cool_down_waits_for_the_first_start(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = SimpleNamespace(now=0.0)
    sleep = lambda s: setattr(clock, "now", clock.now + s)  # noqa: E731
    monkeypatch.setattr(rollout, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    env: Any = SimpleNamespace(reset=lambda seed: (None, {"reading": {"temp_c": 60.0 - 0.5 * clock.now}}))
    cool = evaluation._cool_down
    assert cool(env, 0, None, "p", Console()) == 60.0 and clock.now == 0.0
    assert cool(env, 0, 40.0, "p", Console()) == 41.0 and clock.now == 38.0
    assert not capsys.readouterr().out
    clock.now = 0.0
    assert cool(env, 0, -99.0, "p", Console()) == 0.0 and clock.now == 120.0
    assert "not at -99" in capsys.readouterr().out


def test_bad_names_are_refused_before_a_folder_is_made(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("agents.policies.search.best_constant", lambda _: pytest.fail("searched before"))
    with pytest.raises(ValueError, match=r"unknown policy 'rule_bases'.*best_constant.*rule_based"):
        evaluate(EvaluateConfig(policy=("rule_bases",), scenario=scenario, out=out), quiet())
    assert not out.exists()
    with pytest.raises(RunFolderError, match="exists and is not empty"):
        evaluate(EvaluateConfig(scenario=scenario, out=Path(scenario).parent), quiet())
    with pytest.raises(ValueError, match="baseline 'ppo' is not among"):
        evaluate(EvaluateConfig(scenario=scenario, baseline="ppo", out=out), quiet())
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--policy", "x", "--scenario", scenario])
    with pytest.raises(SystemExit, match="ValueError: unknown policy 'x'"):
        evaluation.main()


@pytest.mark.usefixtures("no_figures")
def test_existing_folder_is_refused_and_left_alone(scenario: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="--out"):
        evaluate(EvaluateConfig(scenario=scenario, seeds=1, out=tmp_path), quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_seeds_that_chose_the_policies_are_refused() -> None:
    assert set(SEARCH_SEEDS) | set(VALIDATION_SEEDS) <= set(RESERVED_SEEDS)
    for seed, seeds in ((800_000, 1), (799_990, 20), (950_000, 5)):
        with pytest.raises(ValueError, match="flatter"):
            EvaluateConfig(seed=seed, seeds=seeds)
    EvaluateConfig(seed=799_990, seeds=10)
    EvaluateConfig(seed=1_000_000)


def test_run_folder_loads_without_unpickling(
    run_folder: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    observation = np.random.default_rng(0).uniform(-1.0, 1.0, (50, len(FIELDS))).astype(np.float32)
    expected = PPO.load(run_folder / "best_model.zip", device="cpu").predict(observation, deterministic=True)[
        0
    ]

    def refuse(*_: Any) -> Any:
        raise AssertionError("unpickled")

    monkeypatch.setattr(cloudpickle, "loads", refuse)
    action, _ = load_policy(run_folder, problem).predict(observation)
    np.testing.assert_array_equal(action, expected)
    with pytest.raises(AssertionError, match="unpickled"):
        load_policy(run_folder, problem, trust_pickle=True)


@pytest.mark.parametrize("mode", ["discrete", "box"])
def test_models_of_other_action_modes_answer_with_levels(problem: Problem, tmp_path: Path, mode: str) -> None:
    env = TwinVecEnv(problem, 2, action_mode=mode)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, device="cpu")
    model.save(tmp_path / "best_model.zip")
    (tmp_path / "config.yaml").write_text("algo: ppo\n")
    (tmp_path / INTERFACE_FILE).write_text(interface_of(problem))
    observation = env.reset()
    action, _ = load_policy(tmp_path, problem).predict(observation)
    index = problem.knobs.indices(model.predict(observation, deterministic=True)[0], mode)
    np.testing.assert_array_equal(problem.knobs.indices(action, "multi_discrete"), index)


def test_zip_from_elsewhere_needs_trust(run_folder: Path, problem: Problem, tmp_path: Path) -> None:
    stray = tmp_path / "gift.zip"
    shutil.copy(run_folder / "best_model.zip", stray)
    with pytest.raises(UntrustedModelError, match=r"gift\.zip.*--trust-pickle"):
        load_policy(stray, problem)
    load_policy(stray, problem, trust_pickle=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not a model"])
def test_damaged_zip_is_refused_by_name(
    run_folder: Path, problem: Problem, tmp_path: Path, damage: str
) -> None:
    whole = (run_folder / "best_model.zip").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    content = {"cut": whole[:middle], "flipped": flipped, "empty": b"", "not a model": b"hello"}[damage]
    (tmp_path / "best_model.zip").write_bytes(content)
    (tmp_path / "config.yaml").write_text("algo: ppo\n")
    shutil.copy(run_folder / INTERFACE_FILE, tmp_path)
    with pytest.raises(ModelFileError, match=r"best_model\.zip"):
        load_policy(tmp_path, problem)


FOREIGN = ["[1]", "3", "{}", '{"action_space": 3}', '{"observation_space": {":type:": "x"}}', "\udcff"]


@pytest.mark.parametrize("data", FOREIGN)
def test_a_zip_of_something_else_is_refused_by_name(data: str, problem: Problem, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("data", data.encode(errors="surrogateescape"))
    with pytest.raises(ModelFileError, match=r"other\.zip is no whole Stable-Baselines3 zip"):
        load_policy(tmp_path / "other.zip", problem, trust_pickle=True)


def test_model_of_other_observations_is_refused(run_folder: Path, problem: Problem, tmp_path: Path) -> None:
    """As one trained before a field was added."""
    with (
        zipfile.ZipFile(run_folder / "best_model.zip") as whole,
        zipfile.ZipFile(tmp_path / "best_model.zip", "w") as old,
    ):
        for part in whole.namelist():
            content = whole.read(part)
            if part == "data":
                data = json.loads(content)
                data["observation_space"]["_shape"] = [len(FIELDS) - 2]
                content = json.dumps(data).encode()
            old.writestr(part, content)
    (tmp_path / "config.yaml").write_text("algo: ppo\n")
    shutil.copy(run_folder / INTERFACE_FILE, tmp_path)
    with pytest.raises(ModelFileError, match=rf"this version has {len(FIELDS)} fields: train it again"):
        load_policy(tmp_path, problem)


def test_model_of_another_scenario_is_refused(run_folder: Path, scenario: str) -> None:
    other = Problem.of(load_scenario(scenario, knobs=["expert_count", "batch_size"]))
    with pytest.raises(ModelFileError, match=r"trained for .*this scenario has"):
        load_policy(run_folder, other)
    with pytest.raises(ModelFileError, match=r"holds no best_model\.zip"):
        load_policy(run_folder.parent, other)


@pytest.mark.usefixtures("own_cache", "no_figures")
def test_a_run_played_on_what_it_was_not_trained_on_is_noted(
    scenario: str, run_folder: Path, tmp_path: Path
) -> None:
    for duration, noted in ((None, False), (15, True)):
        config = EvaluateConfig(
            policy=(str(run_folder),),
            scenario=scenario,
            seeds=1,
            duration=duration,
            out=tmp_path / str(noted),
        )
        found = evaluate(config, Console(quiet=True)).notes
        assert ("trained was trained on other contents of the scenario." in found) == noted
