"""Measure, train and play live on this machine's GPU, in one go: `python -m benchmarks.live_run`.

1. The base model is loaded (trained on first use) and profiled.
2. While `static` plays live, the rules are tuned and PPO is trained in the twin of that profile, by
   processes pinned to other cores than the service's.
3. `rule_based` and PPO play the same requests live.

The folder holds the profile, both tuned policies, and what `evaluate.py` writes. An interrupted run keeps the
policies that have played.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import tyro
import yaml

from agents.evaluation.command import Results
from agents.evaluation.report import wide_console
from agents.files import new_run_folder, plain, write_origin
from agents.load import load_policy
from agents.play.rollout import Recording, play_live
from agents.policies.policy import Policy
from agents.policies.registry import make_policy
from agents.policies.rules import RuleBased, load_rule_config
from moe.errors import one_line_errors
from moe.model.config import Task
from moe.profiles import save_profile
from moe.profiling.command import Options, measure
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.scenario import load_scenario

SERVICE_CORES = 4
"""Cores kept for the live service while policies are trained beside it."""
START_S = 20.0
"""Time set aside for warming the service up."""


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """What to play, and for how long."""

    out: Path | None = None
    """Folder for everything; runs/live-<time> where none is given."""
    scenario: str = "vision"
    seed: int = 2000
    """Seed of the requests, the same for every policy."""
    seconds: int = 120
    """Length of each policy's episode."""
    within_s: float | None = None
    """Time for everything: episodes are shortened alike to end by then."""
    profile_batches: tuple[int, ...] = (64, 256, 1024, 4096, 8192)
    profile_biases: tuple[float, ...] = (0.0, 1.0)
    profile_shifts: tuple[str, ...] = ("clean", "gaussian_noise@5", "contrast@5", "brightness@5")
    profile_within_s: float = 120.0
    """Time for the profile."""
    timesteps: int = 3_000_000
    """Training steps of PPO."""
    trials: int = 160
    """Settings tried for the rules."""


def main(config: LiveRun) -> None:
    """Run everything."""
    began = time.monotonic()
    folder = new_run_folder("live", config.out).resolve()
    profile = folder / "profile.json"
    named = load_scenario(config.scenario)
    save_profile(
        measure(
            Options(
                task=cast(Task, named.task), size="base", device="cuda", out=profile,
                batch_sizes=config.profile_batches, routing_biases=config.profile_biases,
                shifts=config.profile_shifts, within_s=config.profile_within_s,
            )
        ),
        profile,
    )  # fmt: skip
    scenario = folder / "scenario.yaml"
    scenario.write_text(
        yaml.safe_dump(plain(asdict(named) | {"profile": str(profile)}), sort_keys=False), encoding="utf-8"
    )
    print(f"profile after {time.monotonic() - began:.0f} s: {profile}", flush=True)
    cores = sorted(os.sched_getaffinity(0))
    tuner = _beside(cores, folder / "tune.log", "-m", "agents.tuning.rules", "--scenario", str(scenario),
                    "--trials", str(config.trials), "--out", str(folder / "rule_based.yaml"))  # fmt: skip
    trainer = _beside(cores, folder / "train.log", "train_agent.py", "--algo", "ppo", "--scenario",
                      str(scenario), "-n", str(config.timesteps), "-f", str(folder / "ppo"))  # fmt: skip
    os.sched_setaffinity(0, cores[:SERVICE_CORES])
    seconds = config.seconds
    if config.within_s is not None:
        seconds = min(seconds, int((config.within_s - (time.monotonic() - began) - START_S) / 3.0))
    print(f"{seconds} s per policy, live from {time.monotonic() - began:.0f} s on", flush=True)
    env = ThermalMoEEnv(str(scenario), world="live", overrides={"episode_s": seconds})
    try:
        write_origin(folder, {"live_run": asdict(config), "scenario": asdict(env.problem.scenario)})
        results = Results(folder, env.problem)
        results.add(_play(env, make_policy("static", env.problem), config.seed, "static"))
        _finish(tuner, "agents.tuning.rules")
        rules = RuleBased(env.problem, load_rule_config(folder / "rule_based.yaml"))
        results.add(_play(env, rules, config.seed, "rule_based"))
        trainer.send_signal(signal.SIGINT)  # what it has by now is its best model
        trainer.wait()
        results.add(_play(env, load_policy(folder / "ppo", env.problem), config.seed, "ppo"))
        results.finish(wide_console())
    finally:
        for process in (tuner, trainer):
            process.kill()
        env.close()


def _play(env: ThermalMoEEnv, policy: Policy, seed: int, name: str) -> Recording:
    """One live episode of a policy."""
    recording = play_live(env, policy, seed, name)
    print(f"{name}: {recording.length[0]} s, mean {recording.gpu['power_w'].mean():.0f} W", flush=True)
    return recording


def _beside(cores: list[int], log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Python process on the cores that the service does not use."""
    others = cores[SERVICE_CORES:] or cores
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, others),
    )


def _finish(process: subprocess.Popen[bytes], what: str) -> None:
    if process.wait() != 0:
        raise RuntimeError(
            f"{what} failed with exit status {process.returncode}; its log is beside the results"
        )


if __name__ == "__main__":
    with one_line_errors():
        if shutil.which("nvidia-smi") is None:
            sys.exit("this command needs an NVIDIA GPU; `python evaluate.py` plays in the twin")
        main(tyro.cli(LiveRun, description=__doc__))
