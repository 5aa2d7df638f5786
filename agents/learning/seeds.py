"""One training per seed, in sub-folders of one folder, that can be stopped and continued as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agents.files import locked, new_run_folder
from agents.learning.checkpoints import CheckpointError, read_state
from agents.learning.config import TrainConfig
from agents.learning.interface import began_with
from agents.learning.models import run_model
from agents.learning.training import read_run, refuse_changed_inputs, train_or_resume
from agents.play.metrics import student_interval
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


def train_seeds(
    config: TrainConfig,
    seeds: Sequence[int],
    folder: str | Path | None = None,
    *,
    progress: bool = True,
    verbose: bool = False,
) -> Path:
    """Train with several seeds, one after another: complete runs are skipped, cut ones continued.

    Args:
        config: the run; its own seed is not used.
        seeds: different ones.
        folder: where the runs go, as seed-<seed>; may hold runs of an earlier call. A new one by default.
        progress: whether to show progress bars.
        verbose: whether to print what is logged.

    Returns:
        The folder.

    Raises:
        ValueError: a seed is given twice.
        CheckpointError: a run that is there already is damaged, or was made with other settings.
        FolderInUseError: another process trains there.
        RunFolderError: the folder holds something else.
        KeyboardInterrupt: stopped by the user; the message says how to continue.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, got {list(seeds)}")
    runs = [replace(config, seed=seed) for seed in seeds]
    began = folder is not None and any(Path(folder).glob("seed-*"))
    folder = Path(folder) if folder is not None and began else new_run_folder(f"train-{config.algo}", folder)
    with locked(folder):
        for run in runs:
            if (run_folder := seed_folder(folder, run.seed)).exists():
                refuse_other_settings(run_folder, run)
        try:
            for run in runs:
                train_or_resume(run, seed_folder(folder, run.seed), progress=progress, verbose=verbose)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"{stop}\nor with the same command and --log-folder {folder}") from stop
    returns = [read_state(seed_folder(folder, seed) / "last_model.zip")["best_return"] for seed in seeds]
    mean, low, high = student_interval(returns)
    print(f"best validation return: {mean:.2f} ({low:.2f} to {high:.2f}, 95% over {len(seeds)} seeds)")
    return folder


def seed_folder(folder: Path, seed: int) -> Path:
    """Where the run of a seed is."""
    return folder / f"seed-{seed}"


def refuse_other_settings(folder: Path, config: TrainConfig) -> None:
    """Refuse a run's folder of other settings, or of files that have changed since.

    They are the scenario's, and the trained model that the run began with.

    Raises:
        CheckpointError: names what differs.
    """
    kept, wanted = read_run(folder)[0].flat(), config.flat()
    scenario = wanted.pop("scenario")
    del kept["scenario"]  # it may be named by another path; what it says counts
    changed = [f"{key} {kept.get(key)} there, {wanted.get(key)} asked for"
               for key in sorted({*kept, *wanted}) if kept.get(key) != wanted.get(key)]  # fmt: skip
    if changed:
        raise CheckpointError(f"{folder} was made otherwise: {'; '.join(changed)}. Give another folder")
    refuse_changed_inputs(folder, Problem.of(load_scenario(scenario)))
    if config.trained_agent is not None:
        model = run_model(config.trained_agent)
        if began_with(folder) != hashlib.sha256(model.read_bytes()).hexdigest():
            raise CheckpointError(
                f"{folder} began with another model than {model} now is: put back what was there, or give "
                "another folder"
            )
