"""When is adaptation worth its energy under power and thermal limits: `python -m studies.ttt_service`.

Gates over one base policy, the staged rules and, where given, a trained agent play the same episodes, in the
twin or live. Twin episodes take seconds and are played anew on every run. Live ones take their time and are
kept: what the folder holds is not played again, so that a run may be cut and continued.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro
from rich.console import Console

from agents.evaluation.command import held_out_seeds, play_live_paired
from agents.evaluation.report import wide_console
from agents.files import write_origin
from agents.load import load_policy, policy_label
from agents.play.archive import load_recordings, save_recordings
from agents.play.rollout import Recording, play_twin
from agents.policies.gates import GATES, Gated, load_gate_config
from agents.policies.policy import Policy
from agents.policies.registry import POLICIES
from moe.errors import one_line_errors
from studies.repeats import StudyError
from studies.ttt_service_report import Played, write_report
from studies.ttt_service_results import BASELINE
from thermoe_env.configs import load_settings
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario

TRAINING = "python train_agent.py --algo ppo --log-folder runs/ppo"
"""The command that makes a run for `--run`."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the service."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    base: Literal["rule_based", "static"] = "rule_based"
    """Policy whose other knobs the gates take."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Scenario keys to replace."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the study; shipped ones are in configs/studies/ttt_service.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    variants: dict[str, Variant]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Play policies that adapt and one that does not side by side, and compare error, energy and heat."""

    world: Literal["twin", "live", "live-cpu"] = "twin"
    """`live` plays in real time on this machine's GPU, `live-cpu` on its CPU with a simulated device."""
    scenario: str = "vision"
    """Name in configs/scenarios or path of a YAML file."""
    variants: tuple[str, ...] = ()
    """Variants of the settings to play; none given: all."""
    policies: tuple[str, ...] = ()
    """Policies to play beside `never`; none given: all."""
    seeds: int = 20
    """Episodes per policy and variant."""
    seed: int = 3000
    """First seed; episode i has seed + i, for every policy."""
    duration: int | None = None
    """Length of an episode in seconds, in place of the scenario's."""
    run: Path | None = None
    """Folder of a training run to play too."""
    config: str = "ttt_service"
    """Settings: name in configs/studies, or path of a YAML file."""
    out: Path = Path("runs/ttt_service")
    """Folder of the report, the tables and the figures."""

    @property
    def seed_list(self) -> list[int]:
        """Seeds of the episodes."""
        return held_out_seeds(self.seed, self.seeds)


def main(arguments: Arguments, console: Console | None = None) -> list[Played]:
    """Play what is missing, write the report and print the table.

    Raises:
        StudyError: an unknown variant, another world than asked for, or episodes there of other settings.
        ValueError, ThermoeError, KeyboardInterrupt: as `evaluate`; live episodes are kept.
    """
    console = console or wide_console()
    study = load_settings(Study, "studies", arguments.config)
    names = arguments.variants or tuple(study.variants)
    unknown = sorted(set(names) - set(study.variants))
    if unknown:
        raise StudyError(f"unknown variants {unknown}; known: {sorted(study.variants)}")
    write_origin(arguments.out, {"arguments": dataclasses.asdict(arguments)})
    results = []
    for name in names:
        variant = study.variants[name]
        overrides = variant.overrides | (
            {} if arguments.duration is None else {"episode_s": arguments.duration}
        )
        scenario = load_scenario(arguments.scenario, **overrides)
        play = _play_twin if arguments.world == "twin" else _play_live
        problem, recordings = play(arguments, name, variant, scenario, console)
        results.append(Played(name, variant.title, variant.base, problem, recordings))
    notes = [] if arguments.run else [f"No trained agent: train one (`{TRAINING}`) and add `--run runs/ppo`."]
    write_report(results, arguments.out, notes, console)
    return results


def policies_of(
    problem: Problem, base: str, run: Path | None, wanted: tuple[str, ...] = ()
) -> dict[str, Policy]:
    """The policies of a variant by label: the gates, `BASELINE` first, then the rules and the trained run.

    Raises:
        StudyError: one of those that are wanted is none of these.
    """
    config = load_gate_config()
    rules = [BASELINE, *(rule for rule in GATES if rule != BASELINE)]
    policies: dict[str, Policy] = {
        rule: Gated(problem, POLICIES[base](problem), rule, config) for rule in rules
    }
    policies["rule_based"] = POLICIES["rule_based"](problem)
    if run is not None:
        policies[policy_label(run)] = load_policy(run, problem)
    if unknown := sorted(set(wanted) - set(policies)):
        raise StudyError(f"unknown policies {unknown}; known: {list(policies)}")
    return {label: of for label, of in policies.items() if not wanted or label in (BASELINE, *wanted)}


def _play_twin(
    arguments: Arguments, name: str, variant: Variant, scenario: Scenario, console: Console
) -> tuple[Problem, list[Recording]]:
    """All episodes of every policy at once."""
    problem = Problem.of(scenario)
    policies = policies_of(problem, variant.base, arguments.run, arguments.policies)
    return problem, [
        play_twin(problem, policy, arguments.seed_list, label) for label, policy in policies.items()
    ]


def _play_live(
    arguments: Arguments, name: str, variant: Variant, scenario: Scenario, console: Console
) -> tuple[Problem, list[Recording]]:
    """What the folder lacks, one episode after another, and what it holds."""
    env = ThermalMoEEnv(scenario, world="live")
    try:
        if env.world != arguments.world:
            raise StudyError(f"this machine plays {env.world!r}, not {arguments.world!r}: ask for that")
        about = {
            "world": env.world,
            "scenario": repr(env.problem.scenario),
            "gates": repr(dataclasses.replace(load_gate_config(), base=variant.base)),
            "run": None if arguments.run is None else str(arguments.run.resolve()),
        }
        path = arguments.out / f"{arguments.world}-{name}.npz"
        recordings = _kept(path, about)
        played = {(recording.policy, int(recording.seeds[0])) for recording in recordings}
        policies = policies_of(env.problem, variant.base, arguments.run, arguments.policies)
        for recording in play_live_paired(env, policies, arguments.seed_list, console, played):
            if recording.error is None:
                recordings.append(recording)
                save_recordings(path, recordings, about)
        order = [*dict.fromkeys([*policies, *(r.policy for r in recordings)])]
        recordings.sort(key=lambda r: (order.index(r.policy), r.seeds[0]))
        return env.problem, recordings
    finally:
        env.close()


def _kept(path: Path, about: dict[str, Any]) -> list[Recording]:
    """Episodes of an earlier run.

    Raises:
        StudyError: they were played with other settings.
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    recordings, earlier = load_recordings(path)
    other = [key for key in about if earlier.get(key) != about[key]]
    if other:
        raise StudyError(f"{path} holds episodes of another {', '.join(other)}: give another --out")
    return recordings


if __name__ == "__main__":
    with one_line_errors("interrupted; what was played live is kept, run the command again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
