"""How fast the twin is: `python -m benchmarks.env_speed [--json]`.

Steps per second after warm-up, with random actions and with the resets that whole episodes bring: the single
environment through `gymnasium.make` and the batched core, each by turns with Gymnasium's CartPole and over
its rate; what the parts of an interval take (`benchmarks.env_parts`); time of the first call, compiled and
from the cache; PPO's training rate on the twin over its rate on an environment that costs nothing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import gymnasium
import numba
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import thermoe_env  # noqa: F401  (registers the ids)
from agents.learning.config import load_train_config
from agents.learning.training import build_model
from agents.learning.vec import TwinVecEnv
from benchmarks.env_parts import interval_parts
from moe.errors import one_line_errors
from thermoe_env.mdp.fields import FIELDS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

_FIRST_CALL = {
    "single environment": "env = gymnasium.make('ThermalMoETwin-v0'); env.reset(seed=0); "
    "env.step(env.action_space.sample())",
    "64 environments": "env = gymnasium.make_vec('ThermalMoETwin-v0', num_envs=64); env.reset(seed=0); "
    "env.step(env.action_space.sample())",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure on this machine; nothing else should run on it."""

    json: bool = False
    """Print JSON instead of tables."""
    repeats: int = 7
    sizes: tuple[int, ...] = (1, 64, 1024, 4096)
    threads: tuple[int, ...] = (1, 2)
    ppo_updates: int = 3
    """Updates per repeat of the training rate."""


def main(options: Options) -> dict[str, Any]:
    """Measure everything; returns what `--json` prints."""
    scenario = load_scenario("vision")
    problem = Problem.of(scenario)
    threads = [n for n in options.threads if n <= numba.get_num_threads()]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {
            name: version(name) for name in ("gymnasium", "numba", "numpy", "stable-baselines3", "torch")
        }
        | {"python": platform.python_version()},
        "first_call_s": {name: _first_call(code) for name, code in _FIRST_CALL.items()},
        "single": _by_turns({"twin": _single(scenario.steps), "CartPole": _cartpole()}, options.repeats),
        "batch": {
            f"{n} copies": _by_turns(
                {f"{count} threads": _batch(problem, n, count) for count in threads}
                | {"CartPole": _cartpoles(n, scenario.steps)},
                options.repeats,
            )
            for n in options.sizes
        },
        "interval_ns": interval_parts(problem, max(options.sizes), episodes=options.repeats),
        "ppo": _ppo(problem, options),
    }


def _by_turns(plays: dict[str, Callable[[], float]], repeats: int) -> dict[str, Any]:
    """Steps per second of each, by turns after a round to warm up, and over CartPole's in the same round."""
    rounds = [{name: play() for name, play in plays.items()} for _ in range(repeats + 1)][1:]
    return {
        "steps_per_s": {name: _spread([rates[name] for rates in rounds]) for name in plays},
        "over_cartpole": {
            name: _spread([rates[name] / rates["CartPole"] for rates in rounds])
            for name in plays
            if name != "CartPole"
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


def _single(steps: int) -> Callable[[], float]:
    env = gymnasium.make("ThermalMoE-v0", world="twin")
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(64)]

    def play(episodes: int = 20) -> float:
        start = time.perf_counter()
        for _ in range(episodes):
            env.reset()
            for t in range(steps):
                env.step(actions[t % 64])
        return episodes * steps / (time.perf_counter() - start)

    return play


def _batch(problem: Problem, n: int, threads: int) -> Callable[[], float]:
    """Whole episodes of `n` environments, with the autoreset at their end."""
    batch = TwinBatch(problem, n)
    batch.reset(np.arange(n))
    rng = np.random.default_rng(0)
    nvec = problem.knobs.nvec
    actions = rng.integers(0, nvec, (16, n, len(nvec)))
    indices = [problem.knobs.indices(action, "multi_discrete") for action in actions]
    steps = problem.scenario.steps
    episodes = max(1, 20_000 // (n * steps))

    def play() -> float:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            start = time.perf_counter()
            for t in range(episodes * steps):
                batch.step(indices[t % 16])
            return episodes * steps * n / (time.perf_counter() - start)
        finally:
            numba.set_num_threads(before)

    return play


def _cartpole(steps: int = 6000) -> Callable[[], float]:
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 2, steps).tolist()

    def play() -> float:
        start = time.perf_counter()
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return steps / (time.perf_counter() - start)

    return play


def _cartpoles(n: int, steps: int) -> Callable[[], float]:
    env = gymnasium.make_vec("CartPole-v1", num_envs=n, vectorization_mode="vector_entry_point")
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 2, (16, n))

    def play() -> float:
        start = time.perf_counter()
        for t in range(steps):
            env.step(actions[t % 16])
        return steps * n / (time.perf_counter() - start)

    return play


class _ZeroCost(TwinVecEnv):
    """The same spaces, episodes of the same length, and no work at all."""

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """The same numbers over and over."""
        return self._observation, self._reward, self._done, self._infos

    def prepare(self) -> None:
        """Draw the numbers."""
        n = self.num_envs
        rng = np.random.default_rng(0)
        self._observation = rng.uniform(-1.0, 1.0, (n, len(FIELDS))).astype(np.float32)
        self._reward, self._done = np.zeros(n, np.float32), np.zeros(n, np.bool_)
        self._infos: list[dict[str, Any]] = [{}] * n

    def step_async(self, actions: np.ndarray) -> None:
        """Nothing to do."""


def _ppo(problem: Problem, options: Options) -> dict[str, Any]:
    """Training rates side by side: rounds on the twin and on nothing alternate."""
    config = load_train_config("ppo")
    twin, nothing = (kind(problem, config.n_envs, config.seed) for kind in (TwinVecEnv, _ZeroCost))
    assert isinstance(nothing, _ZeroCost)
    nothing.prepare()
    models = {"twin": build_model(config, twin), "zero_cost": build_model(config, nothing)}
    steps = options.ppo_updates * config.n_envs * problem.scenario.steps
    rates: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(config.torch_threads)
    numba.set_num_threads(1)  # as in training
    try:
        for round_ in range(options.repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model.learn(steps, reset_num_timesteps=False)
                if round_:  # the first one warms up
                    rates[name].append(steps / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
    ratio = np.array(rates["twin"]) / np.array(rates["zero_cost"])
    return {
        "steps_per_s": {name: _spread(r) for name, r in rates.items()},
        "share_of_zero_cost": _spread(ratio.tolist()),
    }


def _first_call(code: str) -> dict[str, float]:
    """Seconds until the first step is done, imports aside: compiled, then from the cache of that."""
    program = (
        "import gymnasium, time, thermoe_env, thermoe_env.env, thermoe_env.vector\n"
        f"start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        seconds = [
            float(
                subprocess.run(
                    [sys.executable, "-c", program],
                    env={**os.environ, "NUMBA_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(2)
        ]
    return dict(zip(("compiled", "cached"), seconds, strict=True))


def cpu_name() -> str:
    """Name of the processor, empty where nobody knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _show(result: dict[str, Any]) -> None:
    """Print tables."""
    console = Console()
    table = Table("steps per second", "median", "low", "high", title=f"{result['machine']['cpu']}")
    groups = {"single": result["single"], **result["batch"], "PPO": result["ppo"]}
    rows = {
        f"{group}, {name}": row
        for group, measured in groups.items()
        for name, row in measured["steps_per_s"].items()
    }
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:,.0f}" for key in ("median", "low", "high")))
    console.print(table)
    table = Table("over Gymnasium's CartPole, same round", "median", "low", "high")
    for group in ("single", *result["batch"]):
        for name, row in groups[group]["over_cartpole"].items():
            table.add_row(f"{group}, {name}", *(f"{row[key]:.3f}" for key in ("median", "low", "high")))
    console.print(table)
    parts = ", ".join(f"{name} {spent:,.0f}" for name, spent in result["interval_ns"].items())
    console.print(f"ns of one thread per interval and copy, each part over all copies: {parts}")
    share = result["ppo"]["share_of_zero_cost"]
    console.print(
        f"PPO on the twin over PPO on nothing: {share['median']:.1%} "
        f"({share['low']:.1%} to {share['high']:.1%})"
    )
    for name, row in result["first_call_s"].items():
        console.print(f"first call, {name}: {row['compiled']:.1f} s compiled, {row['cached']:.2f} s cached")


if __name__ == "__main__":
    with one_line_errors():
        chosen = tyro.cli(Options, description=__doc__)
        measured = main(chosen)
        if chosen.json:
            print(json.dumps(measured, indent=2))
        else:
            _show(measured)
