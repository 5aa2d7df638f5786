"""Every algorithm from its shipped settings, side by side: `python -m benchmarks.agents`.

Trains one after another in the twin and plays the best models, `random` and `static` on the same requests.
Writes docs/results/agents.md.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd
import tyro
from tqdm import tqdm

from agents.files import new_run_folder, write_file
from agents.learning.algorithms import ALGORITHMS
from agents.learning.checkpoints import read_state
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.training import train
from agents.load import load_policy
from agents.play.metrics import episode_metrics, summarize
from agents.play.rollout import play_twin
from benchmarks.env_speed import cpu_name
from moe.errors import one_line_errors
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

BASELINES = ("random", "static")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train every algorithm and compare them."""

    algos: tuple[str, ...] = tuple(ALGORITHMS)
    scale: float = 1.0
    """Share of each algorithm's own number of steps that is trained, in whole rounds."""
    scenario: str = "vision"
    seed: int = 0
    """Of every training."""
    episodes: int = 32
    """Seeds 0, 1, ... that the best models are compared on; none chose them."""
    log_folder: Path | None = None
    """For the runs; a new one under runs/ by default."""
    out: Path = Path("docs/results/agents.md")


@dataclass(frozen=True)
class Trained:
    """What a training came to."""

    config: TrainConfig
    last_return: float
    """Mean return of the final validation."""
    best_return: float
    seconds: float


def main(options: Options) -> str:
    """Train, compare, write; returns the page."""
    problem = Problem.of(load_scenario(options.scenario))
    folder = new_run_folder("agents", options.log_folder)
    trained: dict[str, Trained] = {}
    tables = [_played(name, name, problem, options) for name in BASELINES]
    for algo in tqdm(options.algos, desc="algorithms", unit="algorithm"):
        trained[algo] = _train(_scaled(algo, problem, options), folder / algo)
        tables.append(_played(algo, folder / algo, problem, options))
        summary = {base: summarize(pd.concat(tables), problem.scenario.feasible, base) for base in BASELINES}
        page = report(trained, summary, problem, options)
        write_file(options.out, page)  # what is there so far, should the next one be stopped
    return page


def _scaled(algo: str, problem: Problem, options: Options) -> TrainConfig:
    """The shipped settings with a share of their steps, and validations and checkpoints as much closer."""
    config = load_train_config(algo, scenario=options.scenario, seed=options.seed)
    rounds = config.n_envs * problem.scenario.steps
    scaled = {
        key: max(1, round(getattr(config, key) * options.scale / rounds)) * rounds
        for key in ("total_timesteps", "eval_freq", "save_freq")
    }
    return load_train_config(algo, scenario=options.scenario, seed=options.seed, **scaled)


def _train(config: TrainConfig, folder: Path) -> Trained:
    returns: list[float] = []
    start = time.perf_counter()
    train(config, folder, watch=lambda _, value: returns.append(value))
    seconds = time.perf_counter() - start
    best = read_state(folder / "last_model.zip")["best_return"]
    return Trained(config, returns[-1], best, seconds)


def _played(name: str, policy: str | Path, problem: Problem, options: Options) -> pd.DataFrame:
    return episode_metrics(play_twin(problem, load_policy(policy, problem), range(options.episodes), name))


_COLUMNS = (
    "policy", "return", "mJ per good answer", "over `random`'s", "over `static`'s", "quality", "late",
    "action mode", "last validation", "best validation", "steps", "steps/s", "wall time",
)  # fmt: skip
_PAGE = """# Learning algorithms side by side

Simulated: the twin ({gpu}), scenario `{scenario}`. Each algorithm was trained once, seed {seed}, with the
settings of its file in [configs/agents](../../configs/agents), for {scale:g} times the steps named there,
{date}, on one thread of {cpu} ({cores} cores). One training says little about an algorithm: settings
were not searched for alike, and other seeds give other results. Return, energy, quality and lateness are
those of the best model by validation on {episodes} episodes of {episode_s} s that neither training nor
validation plays, with 95% bootstrap intervals over episodes. Wall time holds validations and checkpoints.

{table}

Made by `python -m benchmarks.agents --scale {scale:g}`.
"""


def report(
    trained: dict[str, Trained], summary: dict[str, pd.DataFrame], problem: Problem, options: Options
) -> str:
    """The page: a row per policy, best return first."""
    by_name = {base: table.set_index("policy") for base, table in summary.items()}
    rows = [_COLUMNS, ["---"] * len(_COLUMNS)]
    for name, row in by_name["static"].sort_values("return", ascending=False).iterrows():
        ratios = [f"{table.loc[name, f'j_per_good_vs_{base}']:.3f}" for base, table in by_name.items()]
        played = [
            str(name), f"{row['return']:.1f} ({row.return_low:.1f} to {row.return_high:.1f})",
            f"{1e3 * row.j_per_good:.2f}", *ratios, f"{row.quality:.1%}", f"{row.late_fraction:.2%}",
        ]  # fmt: skip
        rows.append(played + _training_cells(trained.get(str(name))))
    return _PAGE.format(
        gpu=problem.twin.gpu, scenario=problem.scenario.name, episode_s=problem.scenario.episode_s,
        seed=options.seed, scale=options.scale, episodes=options.episodes, date=date.today(), cpu=cpu_name(),
        cores=os.cpu_count(), table="\n".join("| " + " | ".join(cells) + " |" for cells in rows),
    )  # fmt: skip


def _training_cells(run: Trained | None) -> list[str]:
    """The columns about training; dashes for what was not trained."""
    if run is None:
        return ["-"] * 6
    steps = run.config.total_timesteps
    return [
        run.config.action_mode, f"{run.last_return:.1f}", f"{run.best_return:.1f}", f"{steps:,}",
        f"{steps / run.seconds:,.0f}", f"{run.seconds:.0f} s",
    ]  # fmt: skip


if __name__ == "__main__":
    with one_line_errors():
        print(main(tyro.cli(Options, description=__doc__)))
