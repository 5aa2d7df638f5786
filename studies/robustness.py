"""Policies away from what they were tuned or trained on: `python -m studies.robustness --policy runs/ppo`.

Each policy plays the same seeds in the twin under every condition. A cell, one policy under one condition, is
a file, written when it is complete, and one that is there is not played again: a run may be cut and
continued.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tyro
from rich.console import Console
from tqdm import tqdm

from agents.evaluation.command import held_out_seeds
from agents.evaluation.report import wide_console
from agents.files import write_file, write_origin
from agents.load import load_policy, model_file, policy_label
from agents.play.metrics import episode_metrics
from agents.play.rollout import play_twin
from moe.errors import one_line_errors
from studies.robustness_report import BASELINE, Cell, Row, write_report
from studies.tasks import StudyError, read_result
from thermoe_env.configs import load_settings
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is different from the scenario that the policies know."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    scenario: str | None = None
    """Another scenario: name in configs/scenarios or path; none: the one of the arguments."""
    spread: float = 1.0
    """Factor on how much twins differ between episodes (the scenario's `randomize`)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Scenario keys to replace."""

    def apply(self, scenario: str, duration: int | None) -> Scenario:
        """The scenario under this condition."""
        length = {} if duration is None else {"episode_s": duration}
        changed = load_scenario(self.scenario or scenario, **self.overrides | length)
        wider = {name: self.spread * width for name, width in asdict(changed.randomize).items()}
        return load_scenario(changed, randomize=wider)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the study; shipped ones are in configs/studies/robustness.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    conditions: dict[str, Condition]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Play policies under conditions that they were not made for, and compare them with `static` in each."""

    policy: tuple[str, ...] = ("best_constant", "rule_based")
    """Names, run folders or model zips; `static` is always played too."""
    scenario: str = "vision"
    """Name in configs/scenarios or path of a YAML file: what the policies were tuned or trained on."""
    conditions: tuple[str, ...] = ()
    """Conditions of the settings to play; none given: all."""
    seeds: int = 20
    """Episodes per cell."""
    seed: int = 5000
    """First seed; episode i has seed + i, in every cell."""
    duration: int | None = None
    """Length of an episode in seconds, in place of the scenario's."""
    config: str = "robustness"
    """Settings: name in configs/studies, or path of a YAML file."""
    trust_pickle: bool = False
    """Unpickle model zips from outside a run folder. This can run code that they hold."""
    out: Path = Path("runs/robustness")
    """Folder of the cells, the tables and the figure."""

    @property
    def seed_list(self) -> list[int]:
        """Seeds of the episodes."""
        return held_out_seeds(self.seed, self.seeds)


def main(arguments: Arguments, console: Console | None = None) -> list[Row]:
    """Play the cells that are missing and write the report.

    Raises:
        StudyError: unknown conditions, policies of one name, or a cell there of other settings.
        ValueError: unknown policy or scenario, or a policy that cannot play the scenario itself.
    """
    console = console or wide_console()
    known = load_settings(Study, "studies", arguments.config).conditions
    names = arguments.conditions or tuple(known)
    if unknown := sorted(set(names) - set(known)):
        raise StudyError(f"unknown conditions {unknown}; known: {sorted(known)}")
    wanted = dict.fromkeys((BASELINE, *arguments.policy))
    policies = {policy_label(name): name for name in wanted}
    if len(policies) < len(wanted):
        raise StudyError(f"two of the policies {list(wanted)} go by one name: rename the folder of one")
    scenarios = {name: known[name].apply(arguments.scenario, arguments.duration) for name in names}
    home = Problem.of(Condition(title="").apply(arguments.scenario, arguments.duration))
    for name in policies.values():
        load_policy(name, home, arguments.trust_pickle)  # what is wrong with it is said now
    write_origin(arguments.out, {"arguments": asdict(arguments)})
    rows = []
    for name in tqdm(names, desc="conditions", unit="condition"):
        problem = Problem.of(scenarios[name])
        cells = {label: _cell(arguments, name, problem, label, policies[label]) for label in policies}
        rows.append(Row(name, known[name].title, problem, cells))
    write_report(rows, arguments.out, arguments.scenario, arguments.seed_list, console)
    return rows


def _cell(arguments: Arguments, condition: str, problem: Problem, label: str, policy: str) -> Cell:
    """Play one policy under one condition, unless its file is there."""
    path = arguments.out / "cells" / condition / f"{label}.json"
    settings = {
        "scenario": asdict(problem.scenario),
        "seeds": arguments.seed_list,
        "policy": _digest(policy) or policy,
    }
    if path.exists():
        kept = read_result(path)
        plain = json.loads(json.dumps(settings))
        if other := [key for key in plain if kept["settings"].get(key) != plain[key]]:
            raise StudyError(f"{path} was played with another {', '.join(other)}: give another --out")
        return Cell(kept["not_played"], kept["episodes"])
    try:
        player, reason = load_policy(policy, problem, arguments.trust_pickle), ""
    except ValueError as error:  # it could be loaded for the scenario that it was made for
        player, reason = None, str(error)
    episodes = []
    if player is not None:
        recording = play_twin(problem, player, arguments.seed_list, label)
        episodes = episode_metrics(recording).to_dict("records")
    write_file(path, json.dumps({"settings": settings, "not_played": reason, "episodes": episodes}) + "\n")
    return Cell(reason, episodes)


def _digest(policy: str) -> str | None:
    """What identifies a trained model; a policy by name has none."""
    path = model_file(policy)
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else None


if __name__ == "__main__":
    with one_line_errors("interrupted; complete cells are kept, run the command again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
