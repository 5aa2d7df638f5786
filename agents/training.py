"""Training in the twin: Stable-Baselines3 PPO, with runs that can be stopped and continued bit for bit.

Every update plays one whole episode in each environment, on seeds that follow from the run's seed and the
number of the update. So between updates a run is its parameters, its random generators and its counters,
and nothing else: `last_model.zip` holds them, written whole after every update.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import shlex
import sys
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import LinearSchedule
from tqdm import tqdm

from agents.callbacks import RolloutLog, Validator, log_validation
from agents.policies import make_policy
from agents.vec import TwinVecEnv, fresh_seed
from thermoe_env.errors import ScenarioError
from thermoe_env.problem import Problem
from thermoe_env.scenario import Scenario, config_path, load_scenario

ALGOS = ("ppo",)
_STATE = "training_state.json"
_PACKAGES = ("torch", "numpy", "numba", "gymnasium", "stable_baselines3")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be continued; the message names the file and the remedy."""


class RunFolderError(ValueError):
    """A run folder is taken, or is none; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Shipped values: configs/agents/ppo.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    algo: str
    scenario: str
    """Name in configs/scenarios or path of a YAML file."""
    seed: int
    total_timesteps: int
    """Steps over all environments; rounded up to whole updates."""
    n_envs: int
    """Environments, and episodes per update."""
    n_minibatches: int
    n_epochs: int
    learning_rate: float
    """At the start; falls linearly to 0."""
    gamma: float
    gae_lambda: float
    clip_range: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    net_arch: tuple[int, ...]
    """Hidden layers of the policy and, apart, of the value function."""
    static_bias: float
    """Added to the initial logits of the static service's levels: 0 starts with uniform choices."""
    eval_freq: int
    """Steps between validations; each keeps the best model so far."""
    eval_episodes: int
    torch_threads: int

    def __post_init__(self) -> None:
        if self.algo not in ALGOS:
            raise ValueError(f"unknown algo {self.algo!r}; known: {ALGOS}")
        for name in (
            "total_timesteps",
            "n_envs",
            "n_minibatches",
            "n_epochs",
            "eval_freq",
            "eval_episodes",
            "torch_threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0 or self.learning_rate <= 0.0:
            raise ValueError(
                f"seed must be >= 0 and learning_rate > 0, got {self.seed}, {self.learning_rate}"
            )


def load_train_config(algo: str | Path = "ppo", **overrides: Any) -> TrainConfig:
    """Read the settings of an algorithm by name (configs/agents) or path, with `overrides` in place of its keys.

    Raises:
        ValueError: an unknown algorithm, an unknown or missing key, a value its rule refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    if not Path(algo).is_file() and algo not in ALGOS:
        raise ValueError(f"unknown algo {str(algo)!r}; known: {ALGOS}, or the path of a YAML file")
    file = config_path("agents", str(algo), ".yaml")
    try:
        return TypeAdapter(TrainConfig).validate_python({**yaml.safe_load(file.read_text()), **overrides})
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise ScenarioError(
            f"{file}: {error}\nknown keys: {sorted(TrainConfig.__dataclass_fields__)}"
        ) from error


def train(config: TrainConfig, folder: str | Path, *, progress: bool = True) -> Path:
    """Train into `folder` and return it.

    Raises:
        RunFolderError: the folder holds files already.
        KeyboardInterrupt: stopped by the user; its message says how to continue.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(
            f"{folder} exists and is not empty: name another folder, or continue it with --resume {folder}"
        )
    scenario = load_scenario(config.scenario)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "command.txt", f"{shlex.join(sys.argv)}\n".encode())
    versions = {name: version(name) for name in _PACKAGES}
    machine = {"python": platform.python_version(), "machine": platform.platform(), **versions}
    _write(folder / "versions.json", json.dumps(machine, indent=1).encode())
    _write(folder / "scenario.yaml", _scenario_yaml(scenario))
    # Last: a folder with a configuration is a run.
    _write(folder / "config.yaml", yaml.safe_dump(_plain(asdict(config)), sort_keys=False).encode())
    return _learn(config, folder, None, progress)


def resume(folder: str | Path, *, progress: bool = True) -> Path:
    """Continue a stopped run where its last whole update ended; equal to one that was never stopped.

    Raises:
        RunFolderError: no run is there.
        CheckpointError: its checkpoint is cut, or the run is complete.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(
            f"{folder} holds no config.yaml: name the folder of a run that train_agent.py started"
        )
    config = load_train_config(folder / "config.yaml")
    state = read_state(folder / "last_model.zip")
    if state["num_timesteps"] >= config.total_timesteps:
        raise CheckpointError(
            f"{folder} is complete ({state['num_timesteps']} steps): start a new run for more"
        )
    return _learn(config, folder, state, progress)


def read_state(path: str | Path) -> dict[str, Any]:
    """Counters and random generators in a checkpoint.

    Raises:
        CheckpointError: the file is absent, cut, or a model that was not saved by a training run.
    """
    remedy = "continue from a copy that is whole, or start the run again"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            if broken is not None:
                raise CheckpointError(f"{path}: {broken} in it is damaged; {remedy}")
            return json.loads(archive.read(_STATE))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {remedy}") from error
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is cut or no checkpoint of a training run ({error}); {remedy}"
        ) from error


def build_model(config: TrainConfig, env: TwinVecEnv) -> PPO:
    """The untrained model of a configuration.

    Raises:
        ValueError: an update that does not divide into the minibatches.
    """
    problem = env.batch.problem
    n_steps = problem.scenario.steps
    if (n_steps * config.n_envs) % config.n_minibatches:
        raise ValueError(
            f"an update of n_envs x steps = {config.n_envs} x {n_steps} does not divide into n_minibatches="
            f"{config.n_minibatches}; choose a divisor"
        )
    model = PPO(
        "MlpPolicy", env, learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0), n_steps=n_steps,
        batch_size=n_steps * config.n_envs // config.n_minibatches, n_epochs=config.n_epochs, gamma=config.gamma,
        gae_lambda=config.gae_lambda, clip_range=config.clip_range, ent_coef=config.ent_coef, vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm, policy_kwargs={"net_arch": list(config.net_arch)}, seed=config.seed,
        device="cpu", stats_window_size=config.n_envs,
    )  # fmt: skip
    first = np.cumsum(problem.knobs.nvec) - problem.knobs.nvec
    with torch.no_grad():
        model.policy.action_net.bias[torch.as_tensor(first + problem.knobs.action())] += config.static_bias
    return model


class _Updates(BaseCallback):
    """What happens between updates: validation, checkpoint, fresh episodes."""

    def __init__(self, config: TrainConfig, folder: Path, state: dict[str, Any] | None, bar: tqdm) -> None:
        super().__init__()
        self._config, self._folder, self._bar = config, folder, bar
        self._best = state["best_return"] if state else None
        self._validated_at = state["validated_at"] if state else 0

    def _on_training_start(self) -> None:
        self._env: TwinVecEnv = self.training_env  # type: ignore[assignment]
        self._validator = Validator(self._env.batch.problem, self._config.eval_episodes)

    def _on_rollout_start(self) -> None:
        self._between()
        update = self.num_timesteps // (self.model.n_steps * self._env.num_envs)
        self._env.seed(fresh_seed(self._config.seed, update))
        self.model._last_obs = self._env.reset()
        self.model._last_episode_starts = np.ones(self._env.num_envs, bool)

    def _on_step(self) -> bool:
        self._bar.update(self._env.num_envs)
        return True

    def _on_training_end(self) -> None:
        self._between(last=True)

    def _between(self, last: bool = False) -> None:
        config, steps = self._config, self.model.num_timesteps
        due = steps // config.eval_freq > self._validated_at // config.eval_freq
        if (due or last) and steps > self._validated_at:
            result = self._validator(self.model)
            log_validation(self.logger, result)
            self.logger.dump(steps)
            self._validated_at = steps
            if self._best is None or result.mean_return > self._best:
                self._best = result.mean_return
                _save_model(self.model, self._folder / "best_model.zip")
            self._bar.set_postfix({"return": f"{result.mean_return:.1f}", "best": f"{self._best:.1f}"})
        _save_model(
            self.model, self._folder / "last_model.zip", _state(self.model, self._best, self._validated_at)
        )


def _learn(config: TrainConfig, folder: Path, state: dict[str, Any] | None, progress: bool) -> Path:
    torch.set_num_threads(config.torch_threads)
    problem = Problem.of(load_scenario(folder / "scenario.yaml"))
    env = TwinVecEnv(problem, config.n_envs, config.seed)
    model = build_model(config, env)
    logger = Logger(str(folder / "tb"), [TensorBoardOutputFormat(str(folder / "tb"))])
    model.set_logger(logger)
    if state is None:
        _save_model(model, folder / "last_model.zip", _state(model, None, 0))
    else:
        _restore(model, folder / "last_model.zip", state)
    done = model.num_timesteps
    bar = tqdm(
        total=config.total_timesteps,
        initial=done,
        unit="step",
        unit_scale=True,
        desc=config.algo,
        disable=not progress,
    )
    callbacks = CallbackList([RolloutLog(env, model.n_steps), _Updates(config, folder, state, bar)])
    try:
        model.learn(config.total_timesteps - done, callbacks, reset_num_timesteps=False)
    except KeyboardInterrupt as stop:
        kept = read_state(folder / "last_model.zip")["num_timesteps"]
        raise KeyboardInterrupt(
            f"stopped; {kept} steps are kept in {folder}, continue with: python train_agent.py --resume {folder}"
        ) from stop
    finally:
        bar.close()
        logger.close()
    return folder


def _state(model: PPO, best_return: float | None, validated_at: int) -> dict[str, Any]:
    """What a run is between updates, apart from its parameters and its optimizer, as JSON."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "best_return": best_return,
        "validated_at": validated_at,
        "numpy_rng": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def _restore(model: PPO, path: Path, state: dict[str, Any]) -> None:
    """Set parameters, optimizer, counters and random generators; nothing is unpickled."""
    model.set_parameters(str(path), device="cpu")
    model.num_timesteps, model._n_updates = state["num_timesteps"], state["n_updates"]
    np.random.set_state(tuple(state["numpy_rng"]))
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch_rng"])), dtype=torch.uint8))


def _save_model(model: PPO, path: Path, state: dict[str, Any] | None = None) -> None:
    """Write a model, with the training state beside its parameters, in one step."""
    buffer = io.BytesIO()
    model.save(buffer, exclude=["_last_obs", "_last_episode_starts", "ep_info_buffer"])
    if state is not None:
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(_STATE, json.dumps(state))
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _plain(value: Any) -> Any:
    """The value with tuples as lists, as YAML writes them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _scenario_yaml(scenario: Scenario) -> bytes:
    return yaml.safe_dump(_plain(asdict(scenario)), sort_keys=False).encode()
