"""Search the weights of a scenario's linear rule: `python -m agents.tuning.linear --scenario rack`.

From the best constant setting, several times over; then, from the best rule found, once more as often with
smaller steps. The result is configs/agents/linear-SCENARIO.yaml, which says how it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from agents.policies.linear import LinearConfig, weights_file
from agents.tuning.evolution import Found, Population, SearchConfig, best_constant_weights, tune
from agents.tuning.rules import write_settings
from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

FIRST = SearchConfig(episodes=16, generations=250, patience=80, tolerance=0.002)
AGAIN = SearchConfig(episodes=16, generations=50, patience=50, tolerance=0.002, sigma=0.3)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Search a scenario's linear rule."""

    scenario: str
    """Name in configs/scenarios, or path of a YAML file."""
    restarts: int = 3
    """Searches of each kind."""
    first: SearchConfig = FIRST
    """From the best constant setting."""
    again: SearchConfig = AGAIN
    """From the best rule."""
    out: Path | None = None
    """Where to write; default the shipped configs/agents/linear-SCENARIO.yaml."""

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {self.restarts}")


def search(problem: Problem, arguments: Arguments) -> tuple[Found, int]:
    """Search; returns the best and the twin intervals of all."""
    begin, again = (Population(problem, config.seeds) for config in (arguments.first, arguments.again))
    constant = best_constant_weights(begin)
    firsts = [tune(begin, constant, arguments.first, seed) for seed in range(arguments.restarts)]
    best = max(firsts, key=lambda found: found.value)
    agains = [tune(again, best.weights, arguments.again, seed) for seed in range(arguments.restarts)]
    return max(agains, key=lambda found: found.value), begin.steps + again.steps


def main(arguments: Arguments) -> None:
    """Search and write."""
    problem = Problem.of(load_scenario(arguments.scenario))
    path = arguments.out or weights_file(problem.scenario.name)
    refuse_unwritable(path)
    found, steps = search(problem, arguments)
    note = (
        "Weights of `linear`, in levels of each knob (agents/policies/linear.py): the best tried by\n"
        f"`python -m agents.tuning.linear --scenario {arguments.scenario}`: mean return\n"
        f"{found.value:.2f} on its tuning episodes, {steps / 1e6:.1f} million twin intervals."
    )
    write_settings(path, note, LinearConfig.of(problem, found.weights))
    print(f"mean return {found.value:.2f}; wrote {path}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
