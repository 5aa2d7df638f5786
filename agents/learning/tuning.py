"""Search for an algorithm's settings with Optuna: one training per trial, judged by its best validation.

Trial k is proposed from the trials before it and a seed that follows from the run's and k, and a trial that
was cut is continued from its checkpoint: a search stopped and continued equals one never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from agents.files import locked, new_run_folder, write_file, write_origin
from agents.learning.checkpoints import CheckpointError, read_state
from agents.learning.config import TrainConfig, load_train_config, train_config
from agents.learning.interface import INTERFACE_FILE, interface_of
from agents.learning.training import refuse_changed_inputs, train_or_resume
from agents.learning.vec import fresh_seed
from thermoe_env.configs import configs_dir, read_yaml
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

Range = FloatDistribution | IntDistribution | CategoricalDistribution

_FIRST = 4
"""Trials at random before the search learns from them, and before any is cut short."""


def tune(
    config: TrainConfig,
    trials: int,
    folder: str | Path | None = None,
    *,
    ranges: Path | None = None,
    progress: bool = True,
) -> tuple[TrainConfig, Path]:
    """Search until `trials` trials are finished; the first one has the settings of `config`.

    Args:
        config: settings outside the ranges, and the seed of every training.
        trials: in all, those of an earlier call included.
        folder: holds study.db, a run folder per trial and best.yaml; may be that of an earlier call.
        ranges: YAML file like configs/agents/ranges.yaml, the default.
        progress: whether to show progress bars.

    Returns:
        The best settings, which best.yaml holds as well, and the folder.

    Raises:
        ValueError: no trials.
        CheckpointError: the folder's search has other settings or began in another world, or its database is
            damaged.
        FolderInUseError: another process searches there.
        ScenarioError: the algorithm has no ranges, or one that is not understood.
        KeyboardInterrupt: stopped by the user; the message says how to continue.
    """
    if trials < 1:
        raise ValueError(f"a search needs at least 1 trial, got {trials}")
    space = read_ranges(config, ranges or configs_dir() / "agents" / "ranges.yaml")
    problem = Problem.of(load_scenario(config.scenario))
    began = folder is not None and (Path(folder) / "study.db").is_file()
    folder = Path(folder) if folder is not None and began else new_run_folder(f"tune-{config.algo}", folder)
    with locked(folder), _database(folder / "study.db"):
        if not began:
            write_origin(folder, config.flat())
            write_file(folder / INTERFACE_FILE, interface_of(problem))
        elif load_train_config(folder / "config.yaml") != config:
            raise CheckpointError(f"{folder} holds a search with other settings: give another folder")
        else:
            refuse_changed_inputs(folder, problem)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="tune",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(_FIRST, n_warmup_steps=config.total_timesteps // 4),
        )
        try:
            while (number := _finished(study)) < trials:
                print(f"trial {number}: {_play(study, config, space, number, folder, progress)}", flush=True)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"stopped; continue with the same command and --log-folder {folder}"
            ) from stop
        best = _with(config, study.best_trial.params)
        note = (
            f"# Best of {trials} trials of `thermalmoe-train --algo {config.algo} --tune {trials}`: mean "
            f"return {study.best_value:.2f} on the validation episodes, which chose it.\n"
        )
        write_file(folder / "best.yaml", note + yaml.safe_dump(best.flat(), sort_keys=False))
    return best, folder


@contextmanager
def _database(file: Path) -> Iterator[None]:
    """Name the file where Optuna or its database fail.

    Raises:
        CheckpointError: it is no database of a search, or cannot be read or written.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise CheckpointError(
            f"{file} is no database of a search ({str(error).splitlines()[0]}): put a whole copy "
            "in its place, or begin the search anew in another folder"
        ) from error


def read_ranges(config: TrainConfig, file: Path) -> dict[str, Range]:
    """Ranges of an algorithm's settings.

    Raises:
        ScenarioError: none for the algorithm, an unknown setting, or no range.
    """
    of_algo = read_yaml(file).get(config.algo)
    if of_algo is None:
        raise ScenarioError(f"{file} has no ranges for {config.algo!r}")
    unknown = sorted(set(of_algo) - set(config.flat()))
    if unknown:
        raise ScenarioError(f"{file}: {config.algo} has no settings {unknown}; known: {list(config.flat())}")
    try:
        return {name: _distribution(**entry) for name, entry in of_algo.items()}
    except (TypeError, ValueError) as error:
        raise ScenarioError(
            f"{file}, {config.algo}: a range has low and high, and may have log: true, or choices; {error}"
        ) from error


def _distribution(
    *, low: float | None = None, high: float | None = None, log: bool = False, choices: Any = None
) -> Range:
    if choices is not None:
        return CategoricalDistribution([json.dumps(choice) for choice in choices])  # Optuna takes no lists
    if low is None or high is None:
        raise ValueError(f"low and high are needed, got {low} and {high}")
    if type(low) is int and type(high) is int:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _with(config: TrainConfig, params: dict[str, Any]) -> TrainConfig:
    """`config` with a trial's settings."""
    chosen = {name: json.loads(value) if isinstance(value, str) else value for name, value in params.items()}
    return train_config({**config.flat(), **chosen}, "trial")


def _given(config: TrainConfig, space: dict[str, Range]) -> dict[str, Any]:
    """The settings of `config` as a trial's, as far as they lie within the ranges."""
    flat, given = config.flat(), {}
    for name, kind in space.items():
        if isinstance(kind, CategoricalDistribution):
            if (choice := json.dumps(flat[name])) in kind.choices:
                given[name] = choice
        elif kind.low <= flat[name] <= kind.high:
            given[name] = flat[name]
    return given


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _play(
    study: optuna.Study,
    config: TrainConfig,
    space: dict[str, Range],
    number: int,
    folder: Path,
    progress: bool,
) -> str:
    """Play a trial, or what a cut one has left; returns what became of it in words."""
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=_FIRST, seed=fresh_seed(config.seed, number) % 2**32
    )
    cut = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if cut:
        trial = Trial(study, cut[0]._trial_id)
    else:
        if number == 0:
            study.enqueue_trial(_given(config, space), skip_if_exists=True)
        trial = study.ask(dict(space))
    reported = set(study.trials[-1].intermediate_values)

    def watch(steps: int, value: float) -> None:
        if steps not in reported:  # validated again after a continuation
            trial.report(value, steps)
        if trial.should_prune():
            raise optuna.TrialPruned

    run = folder / f"trial-{number:03d}"
    try:
        train_or_resume(_with(config, trial.params), run, progress=progress, watch=watch)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return "cut short, below the median of the others at the same step"
    value = read_state(run / "last_model.zip")["best_return"]
    study.tell(trial, value)
    return f"best validation return {value:.2f}"
