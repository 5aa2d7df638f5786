"""Training in the twin: Stable-Baselines3 PPO, with runs that can be stopped and continued bit for bit.

Every update plays one whole episode in each environment. Between updates a run is its parameters, its
optimizer, two random generators and some counters; `last_model.zip` holds them, written whole each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import LinearSchedule
from tqdm import tqdm

from agents.callbacks import RolloutLog, Updates
from agents.checkpoints import CheckpointError, read_state, restore, save_model
from agents.knob_policy import KnobPolicy
from agents.runs import new_run_folder, write_file, write_origin
from agents.vec import TwinVecEnv
from thermoe_env.errors import ScenarioError
from thermoe_env.problem import Problem
from thermoe_env.scenario import config_path, load_scenario

ALGOS = ("ppo",)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; shipped values are in configs/agents/ppo.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    algo: str
    scenario: str
    """Name in configs/scenarios or path of a YAML file."""
    seed: int
    total_timesteps: int
    """Steps over all environments; the last update is played to its end."""
    n_envs: int
    """Environments, each playing one episode per update."""
    n_minibatches: int
    """Parts an update's steps are divided into."""
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
    """Hidden layers of the policy and, apart from it, of the value function."""
    static_bias: float
    """Added to the first logits of the static service's levels; 0 starts with even choices."""
    eval_freq: int
    """Steps between validations."""
    eval_episodes: int
    torch_threads: int
    """More than one is a little faster on an idle machine, and many times slower on a busy one."""

    def __post_init__(self) -> None:
        if self.algo not in ALGOS:
            raise ValueError(f"unknown algo {self.algo!r}; known: {ALGOS}")
        for name, value in asdict(self).items():
            if type(value) is int and name != "seed" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0 or self.learning_rate <= 0.0:
            raise ValueError(f"seed must be >= 0, learning_rate > 0, got {self.seed}, {self.learning_rate}")


def load_train_config(algo: str | Path = "ppo", **overrides: Any) -> TrainConfig:
    """Read the settings of an algorithm, with `overrides` in place of single keys.

    Args:
        algo: a known algorithm (its file in configs/agents), or the path of a YAML file.
        overrides: keys of `TrainConfig`.

    Raises:
        ValueError: unknown algorithm; unknown, missing or refused key.
    """
    from pydantic import TypeAdapter, ValidationError

    if str(algo) not in ALGOS and not Path(algo).is_file():
        raise ValueError(f"unknown algo {str(algo)!r}; known: {ALGOS}, or the path of a YAML file")
    file = config_path("agents", str(algo), ".yaml")
    known = sorted(TrainConfig.__dataclass_fields__)
    try:
        raw = yaml.safe_load(file.read_text())
        if not isinstance(raw, dict):
            raise ScenarioError(f"{file}: settings are a mapping of keys, got {type(raw).__name__}")
        return TypeAdapter(TrainConfig).validate_python({**raw, **overrides})
    except (ValidationError, yaml.YAMLError) as error:
        raise ScenarioError(f"{file}: {error}\nknown keys: {known}") from error


def train(config: TrainConfig, folder: str | Path | None = None, *, progress: bool = True) -> Path:
    """Train a policy in the twin.

    Args:
        config: the run.
        folder: where it goes; a new one under runs/ by default.
        progress: whether to show a progress bar.

    Returns:
        The folder: config.yaml, scenario.yaml, command.txt, versions.json, best_model.zip (by validation),
        last_model.zip (the checkpoint) and tb/.

    Raises:
        RunFolderError: the folder exists and is not empty.
        KeyboardInterrupt: stopped by the user; the message says how to continue.
    """
    scenario = load_scenario(config.scenario)
    run = _Run(config, Problem.of(scenario))
    folder = new_run_folder(f"train-{config.algo}", folder)
    # A copy of the scenario, so that a run continues with what it began with.
    write_file(folder / "scenario.yaml", yaml.safe_dump(_plain(asdict(scenario)), sort_keys=False))
    write_origin(folder, asdict(config))
    save_model(run.model, folder / "last_model.zip", {"best_return": None, "validated_at": 0})
    run.learn(folder, None, progress)
    return folder


def resume(folder: str | Path, *, progress: bool = True) -> Path:
    """Continue a stopped run from its last whole update; the result equals that of a run never stopped.

    Raises:
        CheckpointError: no run is there, its checkpoint is cut, or it is complete.
        KeyboardInterrupt: stopped by the user; the message says how to continue.
    """
    folder = Path(folder)
    for name in ("config.yaml", "scenario.yaml"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: name the folder of a training run")
    config = load_train_config(folder / "config.yaml")
    state = read_state(folder / "last_model.zip")
    if state["num_timesteps"] >= config.total_timesteps:
        raise CheckpointError(f"{folder} is complete ({state['num_timesteps']} steps): begin a new run")
    run = _Run(config, Problem.of(load_scenario(folder / "scenario.yaml")))
    restore(run.model, folder / "last_model.zip", state)
    run.learn(folder, state, progress)
    return folder


class _Run:
    """Environments and model of a configuration."""

    def __init__(self, config: TrainConfig, problem: Problem) -> None:
        self.config = config
        self.env = TwinVecEnv(problem, config.n_envs, config.seed)
        self.model = build_model(config, self.env)

    def learn(self, folder: Path, state: dict[str, Any] | None, progress: bool) -> None:
        """Learn until the configured number of steps."""
        config, model, done = self.config, self.model, self.model.num_timesteps
        logger = Logger(str(folder / "tb"), [TensorBoardOutputFormat(str(folder / "tb"))])
        model.set_logger(logger)
        bar = tqdm(
            total=config.total_timesteps,
            initial=done,
            desc=config.algo,
            unit="step",
            unit_scale=True,
            disable=not progress,
        )
        callbacks = CallbackList([RolloutLog(self.env), Updates(config, self.env, folder, state, bar)])
        try:
            with _threads(config.torch_threads):
                model.learn(config.total_timesteps - done, callbacks, reset_num_timesteps=False)
        except KeyboardInterrupt as stop:
            kept = read_state(folder / "last_model.zip")["num_timesteps"]
            remedy = f"continue with: python train_agent.py --resume {folder}"
            raise KeyboardInterrupt(f"stopped, {kept} steps are kept; {remedy}") from stop
        finally:
            bar.close()
            logger.close()


@contextmanager
def _threads(torch_threads: int) -> Iterator[None]:
    """Use `torch_threads` threads for the networks and one for the environments.

    A few dozen environments gain little from a second thread, and threads of two libraries that wait for
    each other actively slow training down by an order of magnitude on a busy machine.
    """
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(torch_threads)
    numba.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def build_model(config: TrainConfig, env: TwinVecEnv) -> PPO:
    """The untrained model of a configuration.

    Raises:
        ValueError: an update does not divide into the minibatches.
    """
    knobs, n_steps = env.batch.problem.knobs, env.batch.problem.scenario.steps
    if (n_steps * config.n_envs) % config.n_minibatches:
        raise ValueError(
            f"n_minibatches={config.n_minibatches} does not divide an update of {config.n_envs} environments "
            f"x {n_steps} steps; choose a divisor of {n_steps * config.n_envs}"
        )
    same = ("n_epochs", "gamma", "gae_lambda", "clip_range", "ent_coef", "vf_coef", "max_grad_norm", "seed")
    model = PPO(
        KnobPolicy,
        env,
        learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0),
        n_steps=n_steps,
        batch_size=n_steps * config.n_envs // config.n_minibatches,
        policy_kwargs={"net_arch": list(config.net_arch)},
        stats_window_size=config.n_envs,
        device="cpu",
        **{name: getattr(config, name) for name in same},
    )
    first_logit = np.cumsum(knobs.nvec) - knobs.nvec
    bias = model.policy.get_parameter("action_net.bias")
    with torch.no_grad():
        bias[torch.as_tensor(first_logit + knobs.action())] += config.static_bias
    return model


def _plain(value: Any) -> Any:
    """The value with lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
