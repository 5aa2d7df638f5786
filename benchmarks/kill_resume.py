"""Trainings killed at random moments and resumed: `python -m benchmarks.kill_resume --kills 10`.

Each training is a process of its own, `train_agent.py`, ended by SIGKILL: nothing in it can react. It is
resumed until it is complete, then compared bit for bit with a training that nobody stopped. Writes
docs/results/kill_resume.md.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from tqdm import tqdm

from agents.files import new_run_folder, write_file
from agents.learning.checkpoints import read_state
from agents.learning.config import TrainConfig, load_train_config
from benchmarks.env_speed import cpu_name
from moe.errors import one_line_errors
from moe.terminal import plain_terminal
from thermoe_env.problem.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"n_epochs": 4},
    "sac": {"learning_starts": 600, "batch_size": 64, "buffer_size": 6000},
}
"""Settings in place of the shipped ones: a learner without memory, and one whose replay buffer overflows."""
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill trainings and resume them."""

    kills: int = 10
    """Divided evenly among the algorithms."""
    rounds_per_kill: int = 4
    """Length of a training: so many rounds, an episode of each environment, per kill."""
    seed: int = 0
    """Of the moments and of the trainings."""
    log_folder: Path | None = None
    """For the runs; a new one under runs/ by default."""
    out: Path = Path("docs/results/kill_resume.md")

    def __post_init__(self) -> None:
        if self.kills < len(SMALL) or self.rounds_per_kill < 3:
            raise ValueError(
                f"kills must be at least {len(SMALL)} and rounds_per_kill 3, for two kills never to meet, "
                f"got {self.kills} and {self.rounds_per_kill}"
            )


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
        write_file(settings, yaml.safe_dump(self.config.flat()))
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
            time.sleep(_POLL_S)

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


def moments_of(kills: int, rounds_per_kill: int, rng: np.random.Generator) -> list[float]:
    """A random moment in each of `kills` equal parts of a training, in rounds; the part's last is left out.

    So there is always a round to go, and no kill meets the one before.
    """
    return [rounds_per_kill * k + float(rng.uniform(0.0, rounds_per_kill - 1)) for k in range(kills)]


def main(options: Options) -> str:
    """Train, kill, resume, compare, write; returns the page."""
    folder, rng = new_run_folder("kill-resume", options.log_folder), np.random.default_rng(options.seed)
    rows: list[Sequence[object]] = []
    verdicts: list[str] = []
    with tqdm(total=options.kills, desc="kills", unit="kill") as bar:
        for part, algo in enumerate(SMALL):
            kills = options.kills // len(SMALL) + (part < options.kills % len(SMALL))
            config = _config(algo, kills * options.rounds_per_kill, options.seed)
            whole, killed = (Training(config, folder / f"{algo}-{name}") for name in ("whole", "killed"))
            round_s = whole.finish()
            for moment in moments_of(kills, options.rounds_per_kill, rng):
                rows.append([len(rows) + 1, algo, f"{moment:.2f}", killed.kill(moment, round_s)])
                bar.update()
            killed.finish()
            differ = differences(killed.checkpoint, whole.checkpoint)
            count = len(arrays(whole.checkpoint))
            verdicts.append(
                f"* `{algo}`, {config.total_timesteps} steps, {kills} kills: "
                + (
                    f"**{len(differ)} of {count} differ**: {differ[:5]}"
                    if differ
                    else f"all {count} are equal."
                )
            )
    page = _PAGE.format(
        kills=options.kills, date=date.today(), cpu=cpu_name(), cores=os.cpu_count(), n_envs=_N_ENVS,
        verdicts="\n".join(verdicts), seed=options.seed, rounds_per_kill=options.rounds_per_kill,
        rows="\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows),
    )  # fmt: skip
    write_file(options.out, page)
    return page


_N_ENVS = 2


def _config(algo: str, rounds: int, seed: int) -> TrainConfig:
    """A small training: two environments, a validation every second round, a checkpoint after each."""
    base = load_train_config(algo)
    round_steps = _N_ENVS * load_scenario(base.scenario).steps
    return load_train_config(
        algo, n_envs=_N_ENVS, seed=seed, total_timesteps=rounds * round_steps, eval_freq=2 * round_steps,
        eval_episodes=2, save_freq=1, **SMALL[algo],
    )  # fmt: skip


_PAGE = """# Training, killed and resumed

{kills} times a training was ended by SIGKILL at a random moment and resumed from what it had left,
{date}, on {cpu} ({cores} cores). Then the checkpoint was compared with that of the same training, never
stopped: every tensor of parameters and optimizers, every array of the replay buffer, counters and random
generators, bit for bit.

{verdicts}

A moment is in rounds, an episode in each of the {n_envs} environments: 3.25 is a quarter of a round's time
after the third round was kept. What the kill left is whole rounds; what was played of the next one is played
again.

| kill | algorithm | moment | rounds kept |
|---|---|---|---|
{rows}

Made by `python -m benchmarks.kill_resume --kills {kills} --rounds-per-kill {rounds_per_kill}
--seed {seed}`, with `MKL_CBWR=AUTO,STRICT`: without it MKL may round by where in memory an array lies, and
even two trainings that nobody stopped may differ in their last bits.
"""


if __name__ == "__main__":
    plain_terminal()
    with one_line_errors():
        print(main(tyro.cli(Options, description=__doc__)))
