"""Tune the settings of the gates in the twin: `python -m agents.tuning.gates`.

Each gate that has settings is searched alone, over its base policy, as `agents.tuning.rules` searches the
rules: for the mean return on episodes that evaluation never plays. `thermal` takes the settings of `change`,
so that the two differ by the heat alone. The result is a configs/agents/gates.yaml, in which the settings of
gates that were not searched stay as shipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from agents.policies.gates import GateConfig, Gated, load_gate_config
from agents.policies.policy import Policy
from agents.policies.registry import POLICIES
from agents.tuning.rules import TUNING_SEEDS, mean_return, search, write_settings
from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from thermoe_env.configs import configs_dir
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "periodic": {"every": (1, 60)},
    "entropy": {"entropy_above": (0.0, 0.3)},
    "change": {"change_threshold": (0.001, 0.5), "change_tolerance": (0.0, 0.03), "adapt_for": (1, 40)},
    "shift": {"shift_threshold": (0.001, 0.5), "shift_tolerance": (0.0, 0.03), "shift_for": (1, 40)},
}


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Search for the settings of the gates."""

    rules: tuple[str, ...] = tuple(BOUNDS)
    """Gates to search."""
    scenario: str = "default"
    trials: int = 60
    """Settings to play per gate and setting that it has, each on all tuning seeds."""
    seed: int = 0
    out: Path | None = None
    """Where to write; default the shipped configs/agents/gates.yaml."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rules) - set(BOUNDS))
        if unknown or not self.rules:
            raise ValueError(f"rules must be of {list(BOUNDS)}, the gates with settings; got {self.rules}")


def tune(config: TuneConfig) -> tuple[GateConfig, dict[str, float]]:
    """Search; returns the best settings and the mean return of each gate searched on the tuning seeds."""
    problem = Problem.of(load_scenario(config.scenario))
    best, returns = load_gate_config(), {}
    for rule in config.rules:
        bounds, base = BOUNDS[rule], POLICIES[best.base_of(rule)](problem)

        def value(settings: GateConfig, rule: str = rule, base: Policy = base) -> float:
            return mean_return(problem, Gated(problem, base, rule, settings), TUNING_SEEDS)

        trials = config.trials * len(bounds)
        found, returns[rule] = search(GateConfig(steps=best.steps), bounds, value, trials, config.seed)
        best = replace(best, **{name: getattr(found, name) for name in bounds})
    return best, returns


def main() -> None:
    """Tune and write."""
    config = tyro.cli(TuneConfig, description=__doc__)
    path = config.out or configs_dir() / "agents" / "gates.yaml"
    refuse_unwritable(path)
    gates, returns = tune(config)
    shown = ", ".join(f"{rule} {value:.2f}" for rule, value in returns.items())
    rules = " ".join(config.rules)
    note = (
        "Settings of the gates: the best of those tried by `python -m agents.tuning.gates\n"
        f"--rules {rules} --scenario {config.scenario} --trials {config.trials} --seed {config.seed}`.\n"
        f"Mean return on its tuning seeds: {shown}."
    )
    write_settings(path, note, gates)
    print(f"mean return: {shown}; wrote {path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
