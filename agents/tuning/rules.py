"""Tune a rule's settings in the twin: `python -m agents.tuning.rules --policy pid`.

Differential evolution over every number that the rule has, on episodes that evaluation never plays. The
result is a configs/agents/<policy>.yaml that says how it was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro
import yaml
from scipy.optimize import differential_evolution
from tqdm import tqdm

from agents.files import write_file
from agents.play.rollout import play_twin
from agents.policies.belief import MpcConfig
from agents.policies.greedy import Greedy, GreedyConfig
from agents.policies.mpc import Mpc
from agents.policies.policy import Policy
from agents.policies.rules import RuleBased, RuleConfig
from agents.policies.throttles import THROTTLES, Throttle, ThrottleConfig
from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from thermoe_env.configs import configs_dir
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

T = TypeVar("T")

TUNING_SEEDS = tuple(range(910_000, 910_016))
Bounds = dict[str, tuple[float, float]]
RULE_BOUNDS: Bounds = {
    "normal_experts": (0, 3),
    "shifted_experts": (0, 3),
    "saving_experts": (0, 3),
    "normal_bias": (0, 4),
    "saving_bias": (0, 4),
    "quiet_batch": (0, 5),
    "busy_batch": (0, 5),
    "busy_load": (0.2, 1.3),
    "low_confidence": (0.4, 1.0),
    "budget_margin_w": (-50.0, 150.0),
    "full_queue_s": (0.1, 10.0),
    "late_share": (0.0, 0.1),
    "adapt_change": (0.002, 0.15),
    "adapt_for_s": (0.0, 15.0),
    "adapt_steps": (0, 2),
    "adapt_max_stage": (0, 3),
    "release_s": (0.0, 10.0),
}
THROTTLE_BOUNDS: Bounds = {
    "proportional": (0.0, 5.0),
    "integral": (0.0, 2.0),
    "derivative": (0.0, 2.0),
    "budget_margin": (-1.5, 0.5),
    "heat_margin_c": (-2.0, 12.0),
}
GREEDY_BOUNDS: Bounds = {
    "load_margin": (0.5, 2.0),
    "budget_margin_w": (-100.0, 150.0),
    "heat_margin_c": (-2.0, 6.0),
}
MPC_BOUNDS: Bounds = {"load_memory_s": (2.0, 60.0), "answer_noise": (0.001, 0.1)}


@dataclass(frozen=True)
class Tunable:
    """A rule whose settings can be searched."""

    start: Any
    """Where the search begins: a dataclass. What `bounds` does not name stays."""
    bounds: Bounds
    build: Callable[[Problem, Any], Policy]


def _throttle(name: str) -> Tunable:
    start, bounds = ThrottleConfig(knobs=THROTTLES[name]), THROTTLE_BOUNDS
    if "ttt_steps" in start.knobs:
        start, bounds = replace(start, adapt_steps=0), bounds | {"adapt_steps": (0, 2)}
    return Tunable(start, bounds, lambda problem, config: Throttle(problem, config, name))


TUNABLE: dict[str, Tunable] = {
    "rule_based": Tunable(RuleConfig(), RULE_BOUNDS, RuleBased),
    **{name: _throttle(name) for name in THROTTLES},
    "greedy": Tunable(GreedyConfig(), GREEDY_BOUNDS, Greedy),
    "mpc": Tunable(MpcConfig(), MPC_BOUNDS, Mpc),
}
"""By the names of the policies."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Search for a rule's settings."""

    policy: str = "rule_based"
    scenario: str = "default"
    knobs: tuple[str, ...] | None = None
    """Controlled knobs, in place of the scenario's."""
    trials: int = 600
    """Settings to play, each on all tuning seeds."""
    seed: int = 0
    out: Path | None = None
    """Where to write; default the shipped configs/agents/<policy>.yaml."""

    def __post_init__(self) -> None:
        if self.policy not in TUNABLE:
            raise ValueError(f"policy {self.policy!r} has no settings to search; these have: {list(TUNABLE)}")


def mean_return(problem: Problem, policy: Policy, seeds: tuple[int, ...]) -> float:
    """Mean return of a policy over one episode of each seed in the twin."""
    return float(play_twin(problem, policy, seeds, "rules").reward.sum(axis=0).mean())


def search(
    start: T, bounds: dict[str, tuple[float, float]], value: Callable[[T], float], trials: int, seed: int
) -> tuple[T, float]:
    """Look for the settings of the highest value by differential evolution; returns both.

    Args:
        start: where to begin, a dataclass; what `bounds` does not name stays.
        bounds: fields to vary, and their limits. A field that is an integer in `start` stays one.
        value: of settings.
        trials: settings to try, about.
        seed: of the search.
    """
    whole = {name: isinstance(getattr(start, name), int) for name in bounds}

    def settings(x: np.ndarray) -> T:
        values: dict[str, Any] = {}
        for name, number in zip(bounds, x, strict=True):
            values[name] = int(number) if whole[name] else round(float(number), 4)
        return replace(start, **values)  # type: ignore[type-var]

    population = max(5, 3 * len(bounds))  # the method needs five
    with tqdm(total=trials, desc=f"tune {', '.join(bounds)}"[:40], unit="trial") as progress:

        def loss(x: np.ndarray) -> float:
            progress.update()
            return -value(settings(x))

        found = differential_evolution(
            loss,
            list(bounds.values()),
            integrality=[whole[name] for name in bounds],
            popsize=3,
            maxiter=max(1, trials // population - 1),
            x0=[float(getattr(start, name)) for name in bounds],
            rng=np.random.default_rng(seed),
            polish=False,
            tol=0.0,
        )
    return settings(found.x), -float(found.fun)


def tune(config: TuneConfig) -> tuple[Any, float]:
    """Search; returns the best settings and their mean return on the tuning seeds."""
    overrides = {} if config.knobs is None else {"knobs": config.knobs}
    problem, rule = Problem.of(load_scenario(config.scenario, **overrides)), TUNABLE[config.policy]

    def value(settings: Any) -> float:
        return mean_return(problem, rule.build(problem, settings), TUNING_SEEDS)

    return search(rule.start, rule.bounds, value, config.trials, config.seed)


def write_settings(path: Path, note: str, settings: Any) -> None:
    """Write a dataclass as YAML below a comment."""
    lines = "".join(f"# {line}\n" for line in note.splitlines())
    write_file(path, lines + yaml.safe_dump(asdict(settings), sort_keys=False))


def main() -> None:
    """Tune and write."""
    config = tyro.cli(TuneConfig, description=__doc__)
    path = config.out or configs_dir() / "agents" / f"{config.policy}.yaml"
    refuse_unwritable(path)
    settings, value = tune(config)
    knobs = "" if config.knobs is None else f"--knobs {' '.join(config.knobs)} "
    note = (
        f"Settings of `{config.policy}`: the best of those tried by `python -m agents.tuning.rules\n"
        f"--policy {config.policy} --scenario {config.scenario} {knobs}--trials {config.trials} "
        f"--seed {config.seed}`,\nmean return {value:.2f} on its tuning seeds."
    )
    write_settings(path, note, settings)
    print(f"mean return {value:.2f}; wrote {path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
