"""The training command: `thermalmoe-train`, `python train_agent.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from agents.files import command
from agents.learning.checkpoints import CheckpointError
from agents.learning.config import load_train_config
from agents.learning.seeds import train_seeds
from agents.learning.training import resume, train
from agents.learning.tuning import tune
from moe.errors import one_line_errors
from thermoe_env.errors import ThermoeError
from thermoe_env.problem.scenario import load_scenario


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train an agent in the twin and keep the best model; what is not given comes from configs/agents."""

    algo: str = "ppo"
    """ppo, a2c, recurrent_ppo, trpo, dqn, qrdqn, sac, td3, tqc or crossq, or the path of a YAML file like
    configs/agents/ppo.yaml."""
    action_mode: str | None = None
    """multi_discrete, discrete or box; by default what fits the algorithm best."""
    scenario: str | None = None
    """Name in configs/scenarios, or the path of a YAML file."""
    n_timesteps: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Environment steps in all."""
    seed: int | None = None
    """Seed of the run."""
    seeds: tuple[int, ...] = ()
    """Several seeds, one run after another in sub-folders; with an earlier --log-folder, what is missing."""
    n_envs: int | None = None
    """Parallel environments; each plays one episode per round."""
    eval_freq: int | None = None
    """Steps between validations."""
    save_freq: int | None = None
    """Steps between checkpoints."""
    tune: int | None = None
    """Search for settings in this many trainings (configs/agents/ranges.yaml); with an earlier --log-folder,
    those that are missing."""
    log_folder: Annotated[Path | None, tyro.conf.arg(aliases=["-f", "--out"])] = None
    """Folder of this run; a new one under runs/ by default."""
    resume: Path | None = None
    """Folder of a stopped run to continue; takes no other flag."""
    live: bool = False
    """Train on the live device: refused, for the time it would take."""


def run(options: Options) -> None:
    """Do what the options say and print where the results are.

    Raises:
        ValueError: options that do not go together, or what a training refuses.
    """
    if options.resume is not None:
        if options != Options(resume=options.resume):
            raise ValueError("--resume continues a run with its own settings: give no other flag beside it")
        return _show(resume(options.resume))
    if (options.seed is not None) + bool(options.seeds) > 1 or (options.seeds and options.tune is not None):
        raise ValueError("--seeds goes neither with --seed nor with --tune: give one of them")
    given = {
        "action_mode": options.action_mode,
        "scenario": options.scenario,
        "total_timesteps": options.n_timesteps,
        "seed": options.seed,
        "n_envs": options.n_envs,
        "eval_freq": options.eval_freq,
        "save_freq": options.save_freq,
    }
    given = {key: value for key, value in given.items() if value is not None}
    config = load_train_config(options.algo, **given)
    if options.live:
        days = config.total_timesteps * load_scenario(config.scenario).interval_s / 86_400
        raise ValueError(
            f"the live device plays in real time, {config.total_timesteps} steps take {days:.1f} days: "
            "train in the twin (without --live), then play the run on the device with "
            f"{command('evaluate')} --live"
        )
    if options.tune is not None:
        best, folder = tune(config, options.tune, options.log_folder)
        print(yaml.safe_dump(best.flat(), sort_keys=False))
        print(f"results in {folder}: best.yaml (train with it: --algo {folder / 'best.yaml'}), study.db")
    elif options.seeds:
        folder = train_seeds(config, options.seeds, options.log_folder)
        print(f"results in {folder}: a run per seed; TensorBoard with: tensorboard --logdir {folder}")
    else:
        _show(train(config, options.log_folder))


def _show(run: Path) -> None:
    print(f"results in {run}: best_model.zip, TensorBoard with: tensorboard --logdir {run / 'tb'}")


def main() -> None:
    """Parse the command line and run."""
    options = tyro.cli(Options, prog=Path(sys.argv[0]).name)
    with one_line_errors(CheckpointError, ThermoeError, interrupted=""):
        run(options)
