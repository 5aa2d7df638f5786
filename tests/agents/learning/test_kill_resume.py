"""Killed trainings: nothing in them can react, and what they leave continues to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from agents.learning.checkpoints import read_state
from agents.learning.config import TrainConfig
from agents.learning.training import resume, train
from benchmarks.kill_resume import ROOT, Training, differences, moments_of
from tests.agents.conftest import UPDATE


@pytest.mark.parametrize(("algo", "kills"), [("ppo", 1), ("sac", 1)])
def test_a_killed_training_ends_where_an_undisturbed_one_does(
    algo: str, kills: int, configs: dict[str, TrainConfig], tmp_path: Path
) -> None:
    """Rounds are short here, so a training has many, and is killed in its first half."""
    rounds = 24 * kills
    config = replace(configs[algo], total_timesteps=rounds * UPDATE, eval_freq=10 * UPDATE)
    killed = Training(config, tmp_path / "killed")
    for moment in moments_of(kills, 12, np.random.default_rng(7)):
        assert 1 <= killed.kill(moment, round_s=0.05) < rounds
    killed.finish()
    whole = train(config, tmp_path / "whole", progress=False)
    for name in ("last_model.zip", "best_model.zip"):
        assert differences(killed.folder / name, whole / name) == []


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
from agents.learning.training import train
from agents.learning.config import load_train_config

settings, folder, where = sys.argv[1:]
write, replace, written = pathlib.Path.write_bytes, os.replace, 0

def write_bytes(path, content):
    global written
    written += path.name.startswith("last_model.zip")
    if written == 3 and where == "amid the bytes":
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)

def put_in_place(source, target):
    if written == 3 and where == "before the new file is in place":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

pathlib.Path.write_bytes, os.replace = write_bytes, put_in_place
train(load_train_config(settings), folder, progress=False)
"""


@pytest.mark.parametrize("where", ["amid the bytes", "before the new file is in place"])
def test_a_kill_while_writing_leaves_the_checkpoint_before(
    where: str, config: TrainConfig, tmp_path: Path
) -> None:
    settings, folder = tmp_path / "settings.yaml", tmp_path / "run"
    settings.write_text(yaml.safe_dump(config.flat()))
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(settings), str(folder), where]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == -signal.SIGKILL
    assert len(list(folder.glob("last_model.zip.*.part"))) == 1  # the one that it died over
    assert read_state(folder / "last_model.zip")["num_timesteps"] == UPDATE  # written at 0, one round, two
    resume(folder, progress=False)
    whole = train(config, tmp_path / "whole", progress=False)
    assert differences(folder / "last_model.zip", whole / "last_model.zip") == []


def test_differences_are_found(config: TrainConfig, tmp_path: Path) -> None:
    """Of two seeds, and in what one file lacks."""
    run = train(replace(config, total_timesteps=1), tmp_path / "run", progress=False)
    other = train(replace(config, total_timesteps=1, seed=1), tmp_path / "other", progress=False)
    last, best = run / "last_model.zip", run / "best_model.zip"
    assert differences(last, Path(shutil.copy(last, tmp_path / "copy.zip"))) == []
    assert differences(last, best) == ["training_state.json"]
    found = differences(last, other / "last_model.zip")
    assert {"policy.pth/action_net.weight", "policy.pth/value_net.weight", "training_state.json"} <= {*found}


def test_moments_leave_a_round_between_kills_and_at_the_end() -> None:
    moments = np.array(moments_of(10_000, 4, np.random.default_rng(0)))
    assert (np.diff(moments) >= 1.0).all() and moments[-1] <= 4 * 10_000 - 1
    within = moments % 4
    assert within.max() < 3.0 and np.histogram(within, 3, (0.0, 3.0))[0].min() > 3000
