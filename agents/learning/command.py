"""The training command: `thermalmoe-train`, `python train_agent.py`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from tyro.conf import arg

from agents.files import command
from agents.learning.config import load_train_config, train_config
from agents.learning.seeds import train_seeds
from agents.learning.training import resume, tensorboard_folder, train
from agents.learning.tuning import tune
from moe.errors import one_line_errors
from thermoe_env.problem.scenario import load_scenario

_TWIN = "ThermalMoETwin-v0"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train an agent in the twin and keep the best model; what is not given comes from configs/agents.

    The best is the one whose deterministic policy has the highest mean return in validation.
    """

    algo: str = "ppo"
    """ppo, a2c, recurrent_ppo, trpo, dqn, qrdqn, sac, td3, tqc or crossq, or the path of a YAML file like
    configs/agents/ppo.yaml."""
    env: str = _TWIN
    """Training is in the twin, so ThermalMoETwin-v0 alone."""
    action_mode: str | None = None
    """multi_discrete, discrete or box; by default what fits the algorithm best."""
    scenario: str | None = None
    """Name in configs/scenarios, or the path of a YAML file."""
    n_timesteps: Annotated[float | None, arg(aliases=["-n"])] = None
    """Environment steps in all, a whole number (1e6 is one)."""
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
    trained_agent: Annotated[Path | None, arg(aliases=["-i"])] = None
    """Run folder or zip of a trained model whose weights a new run begins with."""
    log_folder: Annotated[Path | None, arg(aliases=["-f", "--out"])] = None
    """Folder of this run; a new one under runs/ by default."""
    tensorboard_log: Annotated[Path | None, arg(aliases=["-tb"])] = None
    """Folder for TensorBoard's files, by run; tb/ in the run's folder by default."""
    resume: Path | None = None
    """Folder of a stopped run to continue; takes no other flag but --progress and --verbose."""
    progress: Annotated[bool, arg(aliases=["-P"])] = True
    """Show a progress bar."""
    verbose: int = 0
    """1 prints what TensorBoard is given, 0 does not."""
    device: str = "cpu"
    """cpu alone: the networks are too small for a GPU to help, and only there runs repeat bit for bit."""
    live: bool = False
    """Train on the live device: refused, for the time it would take."""


_SETTINGS = {
    "action_mode": "action_mode", "scenario": "scenario", "n_timesteps": "total_timesteps", "seed": "seed",
    "n_envs": "n_envs", "eval_freq": "eval_freq", "save_freq": "save_freq", "trained_agent": "trained_agent",
    "tensorboard_log": "tensorboard_log",
}  # fmt: skip
"""Flags that stand for keys of the algorithm's file."""


def defaults(algo: str) -> Options:
    """What is not given: the values of an algorithm's file."""
    values = asdict(load_train_config(algo))
    return Options(algo=algo, **{flag: values[key] for flag, key in _SETTINGS.items()})


def run(options: Options, default: Options = Options()) -> None:
    """Do what the options say and print where the results are.

    Args:
        options: as given; what equals `default` is not.
        default: as the options are where nothing is given.

    Raises:
        ValueError: options that do not go together, or what a training refuses.
    """
    shown: dict[str, Any] = {"progress": options.progress, "verbose": _verbose(options.verbose)}
    if options.resume is not None:
        with_it = replace(default, resume=options.resume, progress=options.progress, verbose=options.verbose)
        if options != with_it:
            raise ValueError("--resume continues a run with its own settings: give no other flag beside it")
        return _show(resume(options.resume, **shown))
    _refuse_elsewhere(options)
    if (options.seed != default.seed) + bool(options.seeds) > 1 or (
        options.seeds and options.tune is not None
    ):
        raise ValueError("--seeds goes neither with --seed nor with --tune: give one of them")
    config = load_train_config(options.algo)
    given = {
        flag: value
        for flag in _SETTINGS
        if (value := getattr(options, flag)) != getattr(default, flag) and value is not None
    }
    if "n_timesteps" in given:
        given["n_timesteps"] = _whole(float(given["n_timesteps"]))
    if given:
        said = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in given.items())
        values = {_SETTINGS[flag]: value for flag, value in given.items()}
        paths = {key: str(value.absolute()) for key, value in values.items() if isinstance(value, Path)}
        config = train_config({**config.flat(), **values, **paths}, said)
    if options.live:
        days = config.total_timesteps * load_scenario(config.scenario).interval_s / 86_400
        raise ValueError(
            f"the live device plays in real time, {config.total_timesteps} steps take {days:.1f} days: "
            "train in the twin (without --live), then play the run on the device with "
            f"{command('evaluate')} --live"
        )
    if options.tune is not None:
        best, folder = tune(config, options.tune, options.log_folder, progress=options.progress)
        print(yaml.safe_dump(best.flat(), sort_keys=False))
        print(f"results in {folder}: best.yaml (train with it: --algo {folder / 'best.yaml'}), study.db")
    elif options.seeds:
        folder = train_seeds(config, options.seeds, options.log_folder, **shown)
        print(f"results in {folder}: a run per seed; TensorBoard with: tensorboard --logdir {folder}")
    else:
        _show(train(config, options.log_folder, **shown))


def _whole(steps: float) -> int:
    """A number of steps.

    Raises:
        ValueError: it is no whole number.
    """
    if not steps.is_integer():
        raise ValueError(f"--n-timesteps must be a whole number, got {steps}")
    return int(steps)


def _verbose(level: int) -> bool:
    if level not in (0, 1):
        raise ValueError(f"--verbose must be 0 or 1, got {level}")
    return level == 1


def _refuse_elsewhere(options: Options) -> None:
    """Refuse environments and devices that are known from elsewhere.

    Raises:
        ValueError: says why.
    """
    if options.env.removeprefix("thermoe_env:") != _TWIN:
        raise ValueError(
            f"--env {options.env}: training is in the twin, {_TWIN}; choose the problem by --scenario, "
            "its actions by --action-mode"
        )
    if options.device != "cpu":
        raise ValueError(
            f"--device {options.device}: training is on the CPU, where it repeats bit for bit, and its "
            "networks are too small to gain from a GPU; leave --device out"
        )


def _show(run: Path) -> None:
    events = tensorboard_folder(load_train_config(run / "config.yaml"), run)
    print(f"results in {run}: best_model.zip (by deterministic validation), TensorBoard with: tensorboard "
          f"--logdir {events}")  # fmt: skip


def main() -> None:
    """Parse the command line and run."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", default=Options.algo)
    with one_line_errors(interrupted=""):
        default = defaults(first.parse_known_args()[0].algo)
        run(tyro.cli(Options, prog=Path(sys.argv[0]).name, default=default), default)
