"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stable_baselines3 import PPO

from agents.evaluation import command as evaluation
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.interface import INTERFACE_FILE, interface_of
from agents.learning.vec import TwinVecEnv
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

STEPS = 12
"""Of an episode of `short_scenario`."""
UPDATES, ENVS = 5, 3
UPDATE = ENVS * STEPS


TINY: dict[str, dict[str, Any]] = {
    "ppo": {"n_minibatches": 2, "n_epochs": 2},
    "recurrent_ppo": {"n_steps": STEPS // 2, "n_minibatches": 2, "n_epochs": 2, "lstm_hidden_size": 8},
    "dqn": {"learning_starts": 40, "buffer_size": 90, "batch_size": 8, "target_update_interval": 15},
    "sac": {"learning_starts": 40, "buffer_size": 9000, "batch_size": 8, "train_freq": 2, "net_arch": (8,)},
}
"""One of each kind: whole episodes, a memory, flat actions with a buffer that overflows, box actions."""


@pytest.fixture(scope="session")
def short_scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the default scenario with short episodes and a profile made up for tests."""
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "vision", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "episode_s": STEPS}
    (folder / "short.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "short.yaml")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of its own for what is kept between calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMALMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a scenario of 20 s with two knobs."""
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "vision", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "episode_s": 20, "knobs": ["batch_size", "expert_count"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "tiny.yaml")


@pytest.fixture(scope="session")
def problem(scenario: str) -> Problem:
    return Problem.of(load_scenario(scenario))


@pytest.fixture(scope="session")
def run_folder(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a training run leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    folder.mkdir()
    model = PPO(
        "MlpPolicy",
        TwinVecEnv(problem, 2),
        n_steps=8,
        batch_size=16,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
    )
    model.save(folder / "best_model.zip")
    (folder / "config.yaml").write_text("algo: ppo\n")
    (folder / INTERFACE_FILE).write_text(interface_of(problem))
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "write_figures", lambda *_: [])


@pytest.fixture(scope="session")
def configs(short_scenario: str) -> dict[str, TrainConfig]:
    common: dict[str, Any] = {
        "scenario": short_scenario,
        "total_timesteps": UPDATES * UPDATE,
        "n_envs": ENVS,
        "eval_freq": 2 * UPDATE,
        "eval_episodes": 2,
        "save_freq": 1,
    }
    return {algo: load_train_config(algo, **common, **own) for algo, own in TINY.items()}


@pytest.fixture(scope="session")
def config(configs: dict[str, TrainConfig]) -> TrainConfig:
    return configs["ppo"]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the user press Ctrl-C at the given step of the environments."""
    step_wait, played = TwinVecEnv.step_wait, 0

    def interrupted(self: TwinVecEnv) -> Any:
        nonlocal played
        played += 1
        if played > steps:
            raise KeyboardInterrupt
        return step_wait(self)

    monkeypatch.setattr(TwinVecEnv, "step_wait", interrupted)
