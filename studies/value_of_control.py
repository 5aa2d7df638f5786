"""What each knob and each signal of a scenario is worth: `python -m studies.value_of_control`.

Per scenario the best constant setting and linear rules (`agents.policies.linear`) are searched on tuning
episodes. From the best rule each knob is held at its best level, or a signal hidden (its features show their
means), and the rest searched again, several times over; so is the rule itself, with nothing held: what that
gains is no value of control. All is judged on other episodes, the same for all. Searches that are there are
not made again. `--small` is a form of a minute for continuous integration.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tyro

from agents.evaluation.command import held_out_seeds
from agents.policies.linear import Signal
from agents.tuning.evolution import SearchConfig
from moe.errors import one_line_errors
from studies.tasks import StudyError, Task, load_results, run_tasks
from studies.value_of_control_report import worth_of, write_report
from studies.value_of_control_search import FIRST, SIGHTED, Baselines, Search, Variant
from thermoe_env.configs import load_settings
from thermoe_env.problem.scenario import load_scenario


@dataclass(frozen=True, kw_only=True)
class Small:
    """The form for continuous integration."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    scenarios: tuple[str, ...]
    restarts: int
    evaluation_seeds: int
    episode_s: int
    first: SearchConfig
    again: SearchConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study; shipped values are in configs/studies/value_of_control.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    scenarios: tuple[str, ...]
    restarts: int
    """Searches of each kind."""
    evaluation_seeds: int
    """Episodes on which all is judged."""
    first: SearchConfig
    """From the best constant setting."""
    again: SearchConfig
    """From the best rule."""
    blind: tuple[Signal, ...]
    small: Small
    overrides: dict[str, Any] = field(default_factory=dict)
    """Scenario keys to replace, in all scenarios."""

    def __post_init__(self) -> None:
        if self.restarts < 1 or not self.scenarios:
            raise ValueError(f"a study needs scenarios and at least 1 restart, got {self}")

    def made_small(self) -> Study:
        """The same in a minute."""
        changes = {name: value for name, value in vars(self.small).items() if name != "episode_s"}
        return dataclasses.replace(self, **changes, overrides={"episode_s": self.small.episode_s})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what control is worth in scenarios."""

    scenarios: tuple[str, ...] = ()
    """Names in configs/scenarios or paths; none given: those of the settings."""
    price: float = 1.0
    """Of energy, over the scenario's own."""
    seed: int = 5000
    """First seed of the episodes on which all is judged."""
    out: Path = Path("runs/value_of_control")
    """Folder of the searches, the table and the figure."""
    config: str = "value_of_control"
    """Settings: name in configs/studies, or path of a YAML file."""
    ray: str | None = None
    """Where Ray runs the searches: local, auto, or ray://host:10001. None given: this process."""
    small: bool = False
    """The form of a minute that the settings describe."""
    report_only: bool = False
    """Only report searches that are there."""
    json: bool = False
    """End with one line of JSON."""

    def __post_init__(self) -> None:
        if not self.price > 0.0:
            raise StudyError(f"price must be above 0, got {self.price}")


def main(arguments: Arguments) -> dict[str, Any]:
    """Search what is missing, report, and return what `--json` prints.

    Raises:
        StudyError: settings or results that cannot be used.
        ScenarioError: a scenario cannot be used.
    """
    study = load_settings(Study, "studies", arguments.config)
    study = study.made_small() if arguments.small else study
    seeds = tuple(held_out_seeds(arguments.seed, study.evaluation_seeds))
    found, folder = {}, arguments.out / "searches"
    for name in arguments.scenarios or study.scenarios:
        scenario = load_scenario(name, **study.overrides)
        energy = arguments.price * scenario.reward.energy
        scenario = load_scenario(scenario, reward={"energy": energy})
        label = Path(name).stem if arguments.price == 1.0 else f"{Path(name).stem}-price{arguments.price:g}"
        common: dict[str, Any] = {"label": label, "scenario": scenario, "seeds": seeds}
        (baselines,) = _results([Baselines(**common, search=study.first)], folder, arguments)
        first = partial(Search, **common, search=study.first)
        firsts = _results(_searches(first, [FIRST], study.restarts, baselines), folder, arguments)
        best = max(firsts, key=lambda result: result["value"])
        held, blind = [Variant("held", k) for k in scenario.knobs], [Variant("blind", s) for s in study.blind]
        again = partial(Search, **common, search=study.again)
        tasks = _searches(again, [SIGHTED, *held, *blind], study.restarts, best)
        found[label] = worth_of(scenario, baselines, firsts, _results(tasks, folder, arguments))
    command = shlex.join(["python", "-m", "studies.value_of_control", *sys.argv[1:]])
    document = write_report(found, arguments.out, command)
    if arguments.json:
        print(json.dumps(document))
    return document


def _searches(
    make: Callable[..., Search], variants: Sequence[Variant], restarts: int, start: dict[str, Any]
) -> list[Search]:
    """Searches of every variant from what a result found."""
    weights = tuple(map(tuple, start["weights"]))
    return [
        make(restart=restart, variant=variant, start=weights)
        for variant in variants
        for restart in range(restarts)
    ]


def _results(tasks: Sequence[Task], folder: Path, arguments: Arguments) -> list[dict[str, Any]]:
    """Make the results that are missing, and read all, in the tasks' order."""
    if not arguments.report_only:
        run_tasks(tasks, folder, arguments.ray)
    return list(load_results(tasks, folder).values())


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; searches are kept, run the command again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
