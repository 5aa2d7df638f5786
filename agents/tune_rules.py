"""Tune the rules' thresholds in the twin: `python -m agents.tune_rules`.

Differential evolution over every threshold, on episodes that evaluation never plays. The result is a
configs/agents/rule_based.yaml that says how it was found.
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

from agents.policies import Policy
from agents.rollout import play_twin
from agents.rules import RuleBased, RuleConfig
from agents.runs import write_file
from thermoe_env.problem import Problem
from thermoe_env.scenario import configs_dir, load_scenario

T = TypeVar("T")

TUNING_SEEDS = tuple(range(910_000, 910_016))
BOUNDS: dict[str, tuple[float, float]] = {
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


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Search for the rules' thresholds."""

    scenario: str = "default"
    trials: int = 600
    """Rule settings to play, each on all tuning seeds."""
    seed: int = 0
    out: Path | None = None
    """Where to write; default the shipped configs/agents/rule_based.yaml."""


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


def tune(config: TuneConfig) -> tuple[RuleConfig, float]:
    """Search; returns the best thresholds and their mean return on the tuning seeds."""
    problem = Problem.of(load_scenario(config.scenario))

    def value(rules: RuleConfig) -> float:
        return mean_return(problem, RuleBased(problem, rules), TUNING_SEEDS)

    return search(RuleConfig(), BOUNDS, value, config.trials, config.seed)


def write_settings(path: Path, note: str, settings: Any) -> None:
    """Write a dataclass as YAML below a comment."""
    lines = "".join(f"# {line}\n" for line in note.splitlines())
    write_file(path, lines + yaml.safe_dump(asdict(settings), sort_keys=False))


def main() -> None:
    """Tune and write."""
    config = tyro.cli(TuneConfig, description=__doc__)
    rules, value = tune(config)
    path = config.out or configs_dir() / "agents" / "rule_based.yaml"
    note = (
        "Thresholds of the staged rules: the best of those tried by `python -m agents.tune_rules\n"
        f"--scenario {config.scenario} --trials {config.trials} --seed {config.seed}`, "
        f"mean return {value:.2f} on its tuning seeds."
    )
    write_settings(path, note, rules)
    print(f"mean return {value:.2f}; wrote {path}")


if __name__ == "__main__":
    main()
