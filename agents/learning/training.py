"""Training in the twin with Stable-Baselines3, in runs that can be stopped and continued bit for bit.

A run goes in rounds of one whole episode in each environment. Between rounds it is its parameters, its
optimizers, its replay buffer, three random generators and some counters; `last_model.zip` holds them, written
whole each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numba
import torch
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import HParam, HumanOutputFormat, Logger, TensorBoardOutputFormat
from tqdm import tqdm

from agents.files import command, locked, new_run_folder, plain, write_file, write_origin
from agents.learning.algorithms import (
    ALGORITHMS,
    lean_to_static,
)
from agents.learning.callbacks import EpisodeLog, RolloutLog, Updates, Watch
from agents.learning.checkpoints import CheckpointError, read_state, restore, save_model
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.interface import INTERFACE_FILE, changed_inputs, interface_of, mismatch
from agents.learning.models import begin_with, run_model
from agents.learning.validation import COMPARED, Validation
from agents.learning.vec import TwinVecEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


def train(
    config: TrainConfig,
    folder: str | Path | None = None,
    *,
    progress: bool = True,
    verbose: bool = False,
    watch: Watch | None = None,
) -> Path:
    """Train a policy in the twin.

    Args:
        config: the run.
        folder: where it goes; a new one under runs/ by default.
        progress: whether to show a progress bar.
        verbose: whether to print what is logged.
        watch: told of every validation.

    Returns:
        The folder: config.yaml, scenario.yaml, interface.json, command.txt, versions.json, best_model.zip (by
        validation), last_model.zip (the checkpoint), evaluations.npz and monitor.csv (as
        Stable-Baselines3's `EvalCallback` and `Monitor` write them) and tb/.

    Raises:
        RunFolderError: the folder exists and is not empty.
        ModelFileError: the model to begin with is damaged, or made for something else.
        KeyboardInterrupt: stopped by the user; the message says how to continue.
    """
    scenario = load_scenario(config.scenario)
    problem = Problem.of(scenario)
    run = _Run(config, problem)
    began_with = None
    if config.trained_agent is not None:
        began_with = begin_with(run.model, run_model(config.trained_agent), problem)
    folder = new_run_folder(f"train-{config.algo}", folder)
    with locked(folder):
        # A copy of the scenario, so that a run continues with what it began with.
        write_file(folder / "scenario.yaml", yaml.safe_dump(plain(asdict(scenario)), sort_keys=False))
        write_file(folder / INTERFACE_FILE, interface_of(problem, began_with))
        write_origin(folder, config.flat())
        state = {"best_return": None, "validated_at": 0, "episodes": 0}
        save_model(run.model, folder / "last_model.zip", state)
        run.learn(folder, state, progress, verbose, watch)
    return folder


def resume(
    folder: str | Path, *, progress: bool = True, verbose: bool = False, watch: Watch | None = None
) -> Path:
    """Continue a stopped run from its last checkpoint; the result equals that of a run never stopped.

    Raises:
        CheckpointError: no run is there, its checkpoint is cut, it is complete, it was trained for other
            observations or knobs, or what it was trained on has changed.
        InterfaceError: its interface.json is missing or damaged.
        FolderInUseError: another process trains there.
        KeyboardInterrupt: stopped by the user; the message says how to continue.
    """
    folder = Path(folder)
    read_run(folder)  # refuses what is no run before a lock is left there
    with locked(folder):
        config, state = read_run(folder)
        if is_complete(config, state):
            raise CheckpointError(f"{folder} is complete ({state['num_timesteps']} steps): begin a new run")
        problem = Problem.of(load_scenario(folder / "scenario.yaml"))
        if changed := mismatch(folder, problem):
            raise CheckpointError(f"{folder} was trained for something else: {changed}; begin a new run")
        refuse_changed_inputs(folder, problem)
        run = _Run(config, problem)
        restore(run.model, folder / "last_model.zip", state)
        run.learn(folder, state, progress, verbose, watch)
    return folder


def refuse_changed_inputs(folder: Path, problem: Problem) -> None:
    """Refuse to continue in another world than a run, or a search, began in.

    Raises:
        CheckpointError: names the files that changed.
        InterfaceError: the folder's interface.json is missing or damaged.
    """
    if changed := changed_inputs(folder, problem):
        raise CheckpointError(
            f"{folder} was begun with other contents of {', '.join(changed)}: put back what was there, or "
            "begin anew in another folder"
        )


def train_or_resume(
    config: TrainConfig,
    folder: Path,
    *,
    progress: bool = True,
    verbose: bool = False,
    watch: Watch | None = None,
) -> None:
    """Train in `folder`, or do what is left of the run that is there; nothing where it is complete."""
    if not folder.exists():
        train(config, folder, progress=progress, verbose=verbose, watch=watch)
    elif not is_complete(*read_run(folder)):
        resume(folder, progress=progress, verbose=verbose, watch=watch)


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Settings and training state of a run's folder.

    Raises:
        CheckpointError: no run is there, or its checkpoint is cut.
    """
    for name in ("config.yaml", "scenario.yaml"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: name the folder of a training run")
    return load_train_config(folder / "config.yaml"), read_state(folder / "last_model.zip")


def is_complete(config: TrainConfig, state: dict[str, Any]) -> bool:
    """Whether a run has played all its steps."""
    return state["num_timesteps"] >= config.total_timesteps


class _Run:
    """Environments and model of a configuration."""

    def __init__(self, config: TrainConfig, problem: Problem) -> None:
        self.config = config
        self.env = TwinVecEnv(problem, config.n_envs, config.seed, config.action_mode)
        self.model = build_model(config, self.env)

    def learn(
        self, folder: Path, state: dict[str, Any], progress: bool, verbose: bool, watch: Watch | None
    ) -> None:
        """Learn until the configured number of steps, from the training `state` of a checkpoint on."""
        config, model, done = self.config, self.model, self.model.num_timesteps
        validation = Validation(config, self.env.batch.problem, folder, state)
        episodes = EpisodeLog(folder, state["episodes"])
        events = str(tensorboard_folder(config, folder))
        printed = [HumanOutputFormat(sys.stdout)] if verbose else []
        logger = Logger(events, [TensorBoardOutputFormat(events), *printed])
        model.set_logger(logger)
        _log_hyperparameters(logger, config)
        bar = tqdm(
            total=config.total_timesteps,
            initial=done,
            desc=config.algo,
            unit="step",
            unit_scale=True,
            disable=not progress,
        )
        updates = Updates(config, self.env, validation, episodes, folder, bar, watch)
        callbacks = CallbackList([RolloutLog(self.env), episodes, updates])
        log_interval = config.settings.log_interval(self.env.batch.problem.scenario.steps, config.n_envs)
        try:
            with _threads(config.torch_threads):
                model.learn(config.total_timesteps - done, callbacks, log_interval, reset_num_timesteps=False)
        except KeyboardInterrupt as stop:
            kept = read_state(folder / "last_model.zip")["num_timesteps"]
            remedy = f"continue with: {command('train')} --resume {folder}"
            raise KeyboardInterrupt(f"stopped, {kept} steps are kept; {remedy}") from stop
        finally:
            bar.close()
            logger.close()
            episodes.close()


def tensorboard_folder(config: TrainConfig, run: Path) -> Path:
    """Where a run's TensorBoard files are."""
    return run / "tb" if config.tensorboard_log is None else Path(config.tensorboard_log) / run.resolve().name


def _log_hyperparameters(logger: Logger, config: TrainConfig) -> None:
    """Fill TensorBoard's tab of hyper-parameters, which shows them beside the last of these validations.

    A continued run says them again: one that was killed early may not have written them.
    """
    shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.flat().items()}
    metrics = dict.fromkeys((f"eval/{name}" for name in COMPARED), 0.0)  # names alone: the values are scalars
    logger.record("hparams", HParam(shown, metrics))
    logger.dump(0)


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


def build_model(config: TrainConfig, env: TwinVecEnv) -> BaseAlgorithm:
    """The untrained model of a configuration.

    Raises:
        ValueError: settings that do not fit the environments.
    """
    chosen = ALGORITHMS[config.algo]
    # The first weights are orthogonal, and their decomposition depends on the number of threads.
    with _threads(config.torch_threads):
        model = chosen.model(
            chosen.networks[config.action_mode],
            env,
            seed=config.seed,
            stats_window_size=config.n_envs,
            device="cpu",
            **config.settings.arguments(env),
        )
    bias = getattr(config.settings, "static_bias", 0.0)
    if bias:
        lean_to_static(model, config.action_mode, env.batch.problem.knobs, bias)
    return model
