"""Several seeds in a row and the search for settings, at small scale: what stopping them does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState

import agents.learning.tuning as tuning
from agents.files import RunFolderError
from agents.learning.algorithms import ALGORITHMS
from agents.learning.checkpoints import CheckpointError, read_state
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.seeds import train_seeds
from agents.learning.training import train
from agents.learning.tuning import read_ranges, tune
from tests.agents.conftest import STEPS, stop_after
from thermoe_env.configs import configs_dir
from thermoe_env.errors import ScenarioError

UPDATES, ENVS = 3, 3
UPDATE = ENVS * STEPS


@pytest.fixture(scope="module")
def config(short_scenario: str) -> TrainConfig:
    return load_train_config(
        "a2c", scenario=short_scenario, total_timesteps=UPDATES * UPDATE, n_envs=ENVS,
        eval_freq=UPDATE, eval_episodes=2, save_freq=1, n_steps=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ranges") / "ranges.yaml"
    entry = {
        "learning_rate": {"low": 0.0005, "high": 0.05, "log": True},
        "n_steps": {"choices": [2, 4]},
        "net_arch": {"choices": [[8], [64, 64]]},
    }
    file.write_text(yaml.safe_dump({"a2c": entry}))
    return file


def best_returns(folder: Path) -> dict[str, float]:
    return {
        file.parent.name: read_state(file)["best_return"] for file in sorted(folder.glob("*/last_model.zip"))
    }


def test_seeds_are_skipped_where_complete_and_continued_where_cut(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "seeds"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"--log-folder {folder}"):
        stop_after(patch, UPDATES * STEPS + STEPS + 1)  # amid the second run
        train_seeds(config, (0, 1), folder, progress=False)
    complete = (folder / "seed-0" / "last_model.zip").stat().st_mtime_ns
    train_seeds(config, (0, 1, 2), folder, progress=False)
    assert (folder / "seed-0" / "last_model.zip").stat().st_mtime_ns == complete
    alone = {
        f"seed-{seed}": train(replace(config, seed=seed), tmp_path / f"seed-{seed}", progress=False)
        for seed in range(3)
    }
    assert best_returns(folder) == best_returns(tmp_path) and len(alone) == 3
    assert "over 3 seeds" in capsys.readouterr().out


def test_seeds_of_other_settings_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    train_seeds(replace(config, total_timesteps=UPDATE), (0,), folder, progress=False)
    with pytest.raises(CheckpointError, match=r"total_timesteps 36 there, 108 asked for"):
        train_seeds(config, (0, 1), folder, progress=False)
    assert not (folder / "seed-1").exists()
    with pytest.raises(ValueError, match="must be different"):
        train_seeds(config, (1, 1), tmp_path / "twice", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="not empty"):
        train_seeds(config, (1,), tmp_path / "full", progress=False)


def test_a_search_stopped_and_continued_equals_one_never_stopped(
    config: TrainConfig, ranges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_FIRST", 2)  # so that the search learns, and cuts short, within a few trials
    whole, _ = tune(config, 4, tmp_path / "whole", ranges=ranges, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--log-folder"):
        stop_after(patch, UPDATES * STEPS + STEPS + 1)  # amid the second trial
        tune(config, 4, tmp_path / "parts", ranges=ranges, progress=False)
    tune(config, 2, tmp_path / "parts", ranges=ranges, progress=False)
    parts, _ = tune(config, 4, tmp_path / "parts", ranges=ranges, progress=False)
    assert parts == whole
    played = [
        [(trial.state, trial.params, trial.value, trial.intermediate_values) for trial in study.trials]
        for study in (
            optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / name / 'study.db'}")
            for name in ("whole", "parts")
        )
    ]
    assert played[0] == played[1] and len(played[0]) == 4
    assert played[0][0][1]["learning_rate"] == config.settings.learning_rate  # what is shipped comes first
    complete = [trial[2] or -np.inf for trial in played[0] if trial[0] == TrialState.COMPLETE]
    best = load_train_config(tmp_path / "whole" / "best.yaml")
    assert best == whole
    run = train(best, tmp_path / "again", progress=False)
    assert read_state(run / "last_model.zip")["best_return"] == max(complete)


def test_a_search_with_other_settings_needs_another_folder(
    config: TrainConfig, ranges: Path, tmp_path: Path
) -> None:
    tune(config, 1, tmp_path / "a", ranges=ranges, progress=False)
    with pytest.raises(CheckpointError, match="other settings"):
        tune(replace(config, seed=1), 2, tmp_path / "a", ranges=ranges, progress=False)


def test_ranges_are_strict_and_every_algorithm_has_some(config: TrainConfig, tmp_path: Path) -> None:
    for algo in ALGORITHMS:
        shipped = load_train_config(algo)
        space = read_ranges(shipped, configs_dir() / "agents" / "ranges.yaml")
        assert set(tuning._given(shipped, space)) == set(space), algo  # the shipped settings lie within
    file = tmp_path / "ranges.yaml"
    for entry, message in (
        ({"learning_rat": {"low": 1.0, "high": 2.0}}, r"no settings \['learning_rat'\]"),
        ({"learning_rate": {"low": 1.0}}, "low and high"),
        ({"learning_rate": {"low": 1.0, "high": 2.0, "lag": True}}, "lag"),
    ):
        file.write_text(yaml.safe_dump({"a2c": entry}))
        with pytest.raises(ScenarioError, match=message):
            read_ranges(config, file)
    file.write_text("ppo: {}")
    with pytest.raises(ScenarioError, match="no ranges for 'a2c'"):
        read_ranges(config, file)
