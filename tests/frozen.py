"""What must not move: digests of a twin episode per scenario and of a short training per kind of algorithm.

`python -m tests.frozen` computes them, `python -m tests.frozen --renew` (or `make freeze`) writes them to
`frozen.json`. A commit that renews them says what moved and why.

Digests are exact on the kind of processor and with the versions that `made_on` names. On others the values
beside them are compared.
"""

from __future__ import annotations

import os

# As in conftest.py; read at the first call of each library.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import hashlib
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import torch
import yaml
from stable_baselines3.common.save_util import load_from_zip_file

from agents.learning.config import load_train_config
from agents.learning.training import train
from agents.load import load_policy
from agents.play.rollout import play_twin
from thermoe_env.configs import configs_dir
from thermoe_env.mdp.fields import FIELD_NAMES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

FILE = Path(__file__).with_name("frozen.json")
PACKAGES = ("numpy", "numba", "scipy", "torch", "stable-baselines3", "sb3-contrib", "gymnasium")
ENVS, SEED = 2, 7
SHORT: dict[str, dict[str, Any]] = {
    "ppo": {"n_minibatches": 2, "n_epochs": 2},
    "recurrent_ppo": {"n_steps": 10, "n_minibatches": 2, "n_epochs": 2, "lstm_hidden_size": 8},
    "dqn": {"learning_starts": 40, "buffer_size": 90, "batch_size": 8, "target_update_interval": 15},
    "sac": {"learning_starts": 40, "buffer_size": 9000, "batch_size": 8, "train_freq": 2, "net_arch": (8,)},
}
"""One algorithm of each kind: whole episodes, a memory, flat actions, box actions."""
EPISODE_S, ROUNDS = 20, 4


def made_on() -> dict[str, str]:
    """The kind of processor and the versions on which results are equal to the last bit."""
    return {
        "processor": f"{platform.machine()} {llvmlite.binding.get_host_cpu_name()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in PACKAGES},
    }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def twin_episode(scenario: str) -> dict[str, Any]:
    """Digests and means of everything a twin returned to random actions over one episode."""
    problem = Problem.of(load_scenario(scenario))
    batch, rng = TwinBatch(problem, ENVS, latencies=True), np.random.default_rng(SEED)
    first = batch.reset([SEED, SEED + 1])
    parts: dict[str, list[np.ndarray]] = {"observation": [first]}
    for _ in range(problem.scenario.steps):
        actions = rng.integers(0, problem.knobs.nvec, (ENVS, len(problem.knobs.nvec)))
        step = batch.step(problem.knobs.indices(actions, "multi_discrete"))
        played = {
            "observation": step.final_observation if step.truncated.any() else step.observation,
            "raw": batch.raw.view(np.float64).reshape(ENVS, -1),
            "work": batch.work.view(np.float64).reshape(ENVS, -1),
            "gpu": batch.gpu.view(np.float64).reshape(ENVS, -1),
            "histogram": batch.histogram,
            "terms": batch.terms,
            "cost": batch.cost,
            "reward": step.reward[:, None],
        }
        for name, rows in played.items():
            parts.setdefault(name, []).append(rows.copy())
    whole = {name: np.stack(rows) for name, rows in parts.items()}  # [steps, envs, columns]
    means = {name: rows.mean(axis=(0, 1)).tolist() for name, rows in whole.items() if name != "observation"}
    means["raw"] = dict(zip(FIELD_NAMES, means["raw"], strict=True))
    del means["histogram"]  # mostly zeros
    return {"digests": {name: _digest(rows) for name, rows in whole.items()}, "means": means}


def short_training(algo: str) -> dict[str, Any]:
    """Digest of the trained policy's parameters, and the return of its episodes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        scenario = yaml.safe_load((configs_dir() / "scenarios" / "vision.yaml").read_text())
        (path / "short.yaml").write_text(yaml.safe_dump({**scenario, "episode_s": EPISODE_S}))
        config = load_train_config(
            algo, scenario=str(path / "short.yaml"), n_envs=4, total_timesteps=4 * EPISODE_S * ROUNDS,
            eval_freq=4 * EPISODE_S, eval_episodes=2, **SHORT[algo],
        )  # fmt: skip
        run = path / "run"
        train(config, run, progress=False)
        problem = Problem.of(load_scenario(path / "short.yaml"))
        episodes = play_twin(problem, load_policy(run, problem), list(range(8)))
        _, weights, _ = load_from_zip_file(run / "last_model.zip", load_data=False, device="cpu")
        state = weights["policy"]
        flat = np.concatenate([state[name].double().numpy().ravel() for name in sorted(state)])
    return {"digest": _digest(flat), "return": float(episodes.reward.sum(axis=0).mean())}


def twin_scenarios() -> list[str]:
    """Names of the shipped scenarios that the twin plays."""
    return sorted(path.stem for path in (configs_dir() / "scenarios").glob("*.yaml"))


def compute() -> dict[str, Any]:
    """Everything that is frozen, as frozen.json holds it."""
    torch.set_num_threads(1)
    scenarios = twin_scenarios()
    short_training("ppo")  # the first of a process loads and compiles on the way
    return {
        "made_on": made_on(),
        "episodes": {name: twin_episode(name) for name in scenarios},
        "trainings": {algo: short_training(algo) for algo in SHORT},
    }


if __name__ == "__main__":
    text = json.dumps(compute(), indent=1) + "\n"
    if sys.argv[1:] == ["--renew"]:
        FILE.write_text(text)
    else:
        print(text)
