"""Killed trainings: nothing in them can react, and what they leave continues to the same bits."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from agents.learning.checkpoints import read_state
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.training import resume, train
from tests.agents.conftest import UPDATE
from thermoe_env.problem.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[3]
POLL_S = 0.02


class KillError(RuntimeError):
    """A training ended by itself, by an error or before its kill; the message holds what it said."""


@dataclass(frozen=True)
class Training:
    """A training in processes of its own."""

    config: TrainConfig
    """With a checkpoint after every round."""
    folder: Path
    """Of the run; settings and output lie beside it."""

    @property
    def checkpoint(self) -> Path:
        """What a kill leaves."""
        return self.folder / "last_model.zip"

    def kept_rounds(self) -> int:
        """Whole rounds in the checkpoint; 0 without one."""
        if not self.checkpoint.exists():
            return 0
        return read_state(self.checkpoint)["num_timesteps"] // self._round_steps

    @cached_property
    def _round_steps(self) -> int:
        return self.config.n_envs * load_scenario(self.config.scenario).steps

    def finish(self) -> float:
        """Train, or resume, to the end; returns the median time between two checkpoints, s.

        Raises:
            KillError: it did not end well.
        """
        with self._process() as process:
            times = [at for _, at in self._progress(process)]
            if process.wait() != 0:
                raise KillError(f"{self.folder} failed: {self._output()}")
        return float(np.median([after - before for before, after in pairwise(times)])) if times[1:] else 0.0

    def kill(self, moment: float, round_s: float) -> int:
        """Train, or resume, until killed; returns the whole rounds that are kept.

        Args:
            moment: in rounds: 3.25 is a quarter of a round's time after the third is kept. A process lives
                at least until it has kept a round of its own.
            round_s: a round's time.

        Raises:
            KillError: the training ended before.
        """
        before, wanted = self.kept_rounds(), int(moment)
        with self._process() as process:
            for kept, _ in self._progress(process):
                if kept > before and kept >= wanted:
                    break
            time.sleep((moment - wanted) * round_s)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise KillError(f"{self.folder} ended before round {moment:.2f}: {self._output()}")
        return self.kept_rounds()

    @contextmanager
    def _process(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process that begins or continues the run; it does not outlive the block."""
        settings = self.folder.with_suffix(".yaml")
        settings.write_text(yaml.safe_dump(self.config.flat()))
        begin = ["--algo", str(settings), "--log-folder", str(self.folder)]
        arguments = ["--resume", str(self.folder)] if self.checkpoint.exists() else begin
        # Equal bits need MKL to round alike wherever its arrays lie.
        environment = os.environ | {"MKL_CBWR": "AUTO,STRICT"}
        command = [sys.executable, str(ROOT / "train_agent.py"), *arguments]
        with self.folder.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def _progress(self, process: subprocess.Popen[bytes]) -> Iterator[tuple[int, float]]:
        """(rounds kept, time) whenever another checkpoint has been written, while the process lives."""
        known = self._written_ns()
        while process.poll() is None:
            written = self._written_ns()
            if written != known:
                known = written
                yield self.kept_rounds(), time.perf_counter()
            time.sleep(POLL_S)

    def _written_ns(self) -> int:
        """When the checkpoint was written; 0 without one."""
        return self.checkpoint.stat().st_mtime_ns if self.checkpoint.exists() else 0

    def _output(self) -> str:
        return self.folder.with_suffix(".log").read_text(errors="replace", encoding="utf-8")[-2000:]


def arrays(path: Path) -> dict[str, bytes]:
    """The bytes of everything that a checkpoint continues from, by name.

    These are parameters, optimizers, replay buffer and the training state (counters, random generators).
    """
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(".pth"):
                found |= _leaves(torch.load(io.BytesIO(content), weights_only=True), name)
            elif name.startswith("replay/") or name == "training_state.json":
                found[name] = content
    return found


def _leaves(value: Any, name: str) -> dict[str, bytes]:
    """Tensors and numbers in nested containers, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in _leaves(item, f"{name}/{key}").items()}
    return {name: repr(value).encode()}


def differences(one: Path, other: Path) -> list[str]:
    """Names of what is not the same, bit for bit, in two checkpoints."""
    first, second = arrays(one), arrays(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@pytest.mark.parametrize("algo", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
def test_a_killed_training_ends_where_an_undisturbed_one_does(
    algo: str, configs: dict[str, TrainConfig], tmp_path: Path
) -> None:
    """Rounds are short here, so a training has many, and is killed in its first half."""
    config = replace(configs[algo], total_timesteps=24 * UPDATE, eval_freq=10 * UPDATE)
    killed = Training(config, tmp_path / "killed")
    moment = float(np.random.default_rng(7).uniform(0.0, 11.0))
    assert 1 <= killed.kill(moment, round_s=0.05) < 24
    resume(killed.folder, progress=False)
    whole = train(config, tmp_path / "whole", progress=False)
    for name in ("last_model.zip", "best_model.zip"):
        assert differences(killed.folder / name, whole / name) == []


KILLS, ROUNDS_PER_KILL, N_ENVS = 5, 4, 2
SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"n_epochs": 4},
    "sac": {"learning_starts": 600, "batch_size": 64, "buffer_size": 6000},
}
"""Settings in place of the shipped ones: a learner without memory, and one whose replay buffer overflows."""


@pytest.mark.slow
@pytest.mark.parametrize("algo", SMALL)
def test_a_training_killed_five_times_ends_where_an_undisturbed_one_does(algo: str, tmp_path: Path) -> None:
    """docs/results/kill_resume.md: at a random moment in each part, a round at least before the next."""
    round_steps = N_ENVS * load_scenario(load_train_config(algo).scenario).steps
    config = load_train_config(
        algo, n_envs=N_ENVS, seed=0, total_timesteps=KILLS * ROUNDS_PER_KILL * round_steps,
        eval_freq=2 * round_steps, eval_episodes=2, save_freq=1, **SMALL[algo],
    )  # fmt: skip
    whole, killed = Training(config, tmp_path / "whole"), Training(config, tmp_path / "killed")
    round_s, rng = whole.finish(), np.random.default_rng(0)
    for part in range(KILLS):
        moment = ROUNDS_PER_KILL * part + float(rng.uniform(0.0, ROUNDS_PER_KILL - 1))
        kept = killed.kill(moment, round_s)
        print(f"killed at {moment:.2f} rounds, {kept} kept")
    killed.finish()
    assert differences(killed.checkpoint, whole.checkpoint) == []


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
from agents.learning.training import train
from agents.learning.config import load_train_config

settings, *runs = sys.argv[1:]
write, replace, written, where = pathlib.Path.write_bytes, os.replace, 0, ""

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
for where in runs:
    if os.fork() == 0:  # what was imported is imported once
        train(load_train_config(settings), where, progress=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
PLACES = ("amid the bytes", "before the new file is in place")


@pytest.fixture(scope="module")
def killed_and_whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of trainings that were killed in `PLACES`, and of one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "settings.yaml").write_text(yaml.safe_dump(config.flat()))
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, "settings.yaml", *PLACES]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-2:] == 2 * [str(-signal.SIGKILL)], ended.stderr
    train(config, folder / "whole", progress=False)
    return folder


@pytest.mark.parametrize("where", PLACES)
def test_a_kill_while_writing_leaves_the_checkpoint_before(where: str, killed_and_whole: Path) -> None:
    folder = killed_and_whole / where
    assert len(list(folder.glob("last_model.zip.*.part"))) == 1  # the one that it died over
    assert read_state(folder / "last_model.zip")["num_timesteps"] == UPDATE  # written at 0, one round, two
    resume(folder, progress=False)
    assert differences(folder / "last_model.zip", killed_and_whole / "whole" / "last_model.zip") == []


def test_differences_are_found(config: TrainConfig, tmp_path: Path) -> None:
    """Of two seeds, and in what one file lacks."""
    run = train(replace(config, total_timesteps=1), tmp_path / "run", progress=False)
    other = train(replace(config, total_timesteps=1, seed=1), tmp_path / "other", progress=False)
    last, best = run / "last_model.zip", run / "best_model.zip"
    assert differences(last, Path(shutil.copy(last, tmp_path / "copy.zip"))) == []
    assert differences(last, best) == ["training_state.json"]
    found = differences(last, other / "last_model.zip")
    assert {"policy.pth/action_net.weight", "policy.pth/value_net.weight", "training_state.json"} <= {*found}


def test_a_training_told_to_end_says_how_to_go_on(config: TrainConfig, tmp_path: Path) -> None:
    """As `kill` and batch systems tell it; what is continued equals what was never stopped."""
    settings, folder = tmp_path / "settings.yaml", tmp_path / "run"
    long = replace(config, total_timesteps=400 * UPDATE, eval_freq=400 * UPDATE)
    settings.write_text(yaml.safe_dump(long.flat()))
    line = [sys.executable, "train_agent.py", "--algo", str(settings), "-f", str(folder), "--no-progress"]
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as training:
        while not (folder / "monitor.csv").exists() or len((folder / "monitor.csv").read_text()) < 200:
            assert training.poll() is None
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        _, said = training.communicate()
    assert training.returncode == 143
    kept = read_state(folder / "last_model.zip")["num_timesteps"]
    assert 0 < kept < long.total_timesteps
    assert f"stopped, {kept} steps are kept; continue with: python train_agent.py --resume {folder}" in said
    assert "Traceback" not in said
