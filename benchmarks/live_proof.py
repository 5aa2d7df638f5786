"""Trained only in the twin, proven on the card: `python -m benchmarks.live_proof --agent runs/x`.

The standard service, the tuned rules, the planner and an agent play the same requests live, seed by seed,
each from the same temperature, in an order drawn per seed. Then the twin plays the same episodes. Whether the
agent saves what it should, and the twin predicted it, is computed and written to live_proof.md.

An episode is saved as it ends; the same command goes on where it was stopped. The report needs no card, and
time that the planner takes: --within-s leaves it to --report-only. A seed's policies are compared
on one card: a seed that was begun on another card, or with other weights, is played again whole.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from agents.evaluation.command import held_out_seeds
from agents.evaluation.report import wide_console
from agents.live.compare import NO_SPREAD, live_problem, play_twins, scenario_differences
from agents.live.episodes import LiveEpisodes, policy_of, recipe_of
from agents.live.segments import recording_beside
from agents.live.session import LiveSession, machine_of
from agents.load import policy_label
from agents.policies.policy import for_episodes
from benchmarks.live_proof_report import write_proof
from benchmarks.live_proof_results import Proof
from moe.errors import one_line_errors
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario

DEFAULT_SECONDS = 100
DOCS = Path("docs/results")


@dataclass(frozen=True, kw_only=True)
class LiveProof:
    """What to play, and for how long."""

    agent: tuple[str, ...] = ()
    """Run folders or zips of agents that were trained in the twin."""
    policies: tuple[str, ...] = ("static", "rule_based", "gate-change", "mpc")
    """What plays beside them; verdicts need `static` and `rule_based`."""
    scenario: str | None = None
    """Name or path; default: the folder's, or `default` for a new folder."""
    seed: int = 3000
    """First seed."""
    seeds: int = 5
    """Episodes per policy: seed, seed + 1, ..."""
    seconds: int | None = None
    """Length of an episode; default: the folder's, or 100 for a new one."""
    within_s: float | None = None
    """No episode begins that would end later than this, by what cool-downs and episodes have taken so far;
    the report is left to --report-only."""
    cool_down_s: float = 60.0
    """Longest wait before an episode for the device to idle back to its first start temperature."""
    order_seed: int = 0
    """Seed of the order in which a seed's policies play."""
    samples_per_s: float = 20.0
    """Telemetry rows per second."""
    out: Path = Path("runs/live-proof")
    """Folder of the episodes; what it holds is kept."""
    report_only: bool = False
    """Play nothing, write the report anew."""
    on_cpu: bool = False
    """Without a GPU, play live on the CPU (measured work, simulated device), to try the command out."""
    docs: bool = False
    """Write the report into docs/results too."""

    def __post_init__(self) -> None:
        held_out_seeds(self.seed, self.seeds)
        if self.cool_down_s < 0.0:
            raise ValueError(f"cool_down_s must not be negative, got {self.cool_down_s}")
        if len(self.specs) < len((*self.policies, *self.agent)):
            raise ValueError(f"policies need different names, got {(*self.policies, *self.agent)}")

    @property
    def specs(self) -> dict[str, str]:
        """What to play by label."""
        return {policy_label(spec): spec for spec in (*self.policies, *self.agent)}


def run(config: LiveProof, console: Console | None = None) -> Proof | None:
    """Play what is missing, compare, and write the report; None where that is left for later.

    Raises:
        ValueError: nothing to compare, no GPU, another scenario than the recorded one, or a bad policy.
        ThermoeError: the live world cannot be built.
    """
    began = time.monotonic()
    console = console or wide_console()
    live = LiveEpisodes.load(config.out)
    if live is not None:
        _refuse_another(live, config)
    if not config.report_only:
        live = _play(config, live, began, console)
        missing = [pair for pair in _pairs(config) if not live.has(*pair)]
        if missing or config.within_s is not None:
            console.print(
                f"{len(missing)} episodes are missing in {live.folder}"
                + ("; the same command goes on" if missing else "")
                + "; what there is, --report-only compares",
                highlight=False, markup=False,
            )  # fmt: skip
            return None
    if live is None or not live.episodes:
        raise ValueError(f"{config.out} holds no whole live episode yet: play first, without --report-only")
    played = [play_twins(live, live.scenario, from_start_c) for from_start_c in (True, False)]
    proof = Proof.from_episodes(live, *played)
    for folder in (config.out, *([DOCS] if config.docs else [])):
        path = write_proof(folder, live, proof)
        console.print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)
    for verdict in proof.all_verdicts:
        console.print(str(verdict), highlight=False, markup=False, soft_wrap=True)
    return proof


def _refuse_another(live: LiveEpisodes, config: LiveProof) -> None:
    """Refuse a folder that was recorded with another scenario than the one asked for."""
    wanted = live.scenario if config.scenario is None else _scenario(config)
    if config.seconds is not None:
        wanted = dataclasses.replace(wanted, episode_s=config.seconds)
    differences = scenario_differences(live.scenario, wanted)
    if differences:
        raise ValueError(
            f"{live.folder} was recorded with another scenario ({'; '.join(differences)}): "
            "leave --scenario and --seconds out, or give another --out"
        )


def _scenario(config: LiveProof) -> Scenario:
    seconds = DEFAULT_SECONDS if config.seconds is None else config.seconds
    return load_scenario(config.scenario or "vision", randomize=NO_SPREAD, episode_s=seconds)


def order(labels: Sequence[str], seed: int, order_seed: int) -> list[str]:
    """The policies in the order in which they play a seed: at random, the same whenever it is asked for."""
    drawn = np.random.default_rng([order_seed, seed]).permutation(len(labels))
    return [sorted(labels)[i] for i in drawn]


def _pairs(config: LiveProof) -> list[tuple[str, int]]:
    """(label, seed) of all episodes in the order of play."""
    seeds = held_out_seeds(config.seed, config.seeds)
    return [(label, seed) for seed in seeds for label in order(list(config.specs), seed, config.order_seed)]


def _play(config: LiveProof, live: LiveEpisodes | None, began: float, say: Console) -> LiveEpisodes:
    """Play what is not recorded yet."""
    if live is not None and all(live.has(*pair) for pair in _pairs(config)):
        return live
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or config.on_cpu):
        raise ValueError(
            "no CUDA GPU here: run this on a machine that has one, write the report of what is recorded with "
            "--report-only, or try the command out with --on-cpu"
        )
    scenario = _scenario(config) if live is None else live.scenario
    problem = live_problem(scenario, "live" if on_gpu else "live-cpu")
    if live is None:
        live = LiveEpisodes(config.out, scenario, problem.capacity_rps)
    live.refuse_other_requests(problem)
    twin, known = Problem.of(scenario), live.recipes
    recipes = {
        label: known.get(label) or recipe_of(spec, problem, twin) for label, spec in config.specs.items()
    }
    for label, recipe in recipes.items():
        for_episodes(policy_of(recipe, problem), [config.seed], "live")  # refused now, not after hours
        say.print(f"{label}: {recipe}", highlight=False, markup=False)
    if on_gpu:
        from moe.training.weights import load_model

        load_model(scenario.task, problem.profile.size, "cuda")  # on first use this trains it
    live.save()  # from here on the folder can be taken up again
    end = math.inf if config.within_s is None else began + config.within_s
    env = ThermalMoEEnv(scenario, world="live")
    try:
        with recording_beside(env, live, config.samples_per_s) as segments:
            session = LiveSession(env, live, recipes, machine_of(env), segments, say, config.cool_down_s, end)
            session.play(_todo(config, session))
    finally:
        env.close()
    return live


def _todo(config: LiveProof, session: LiveSession) -> Iterator[tuple[str, int]]:
    """What is missing, seed by seed. A seed begun elsewhere is set aside as soon as it is its turn."""
    live, pairs = session.live, _pairs(config)
    for seed in held_out_seeds(config.seed, config.seeds):
        missing = [label for label, own in pairs if own == seed and not live.has(label, seed)]
        if missing and session.fits(missing[0]):
            moved = live.set_aside(seed, session.machine)
            if moved:
                session.say.print(f"seed {seed} was begun on another card or model, it is played again whole")
        yield from ((label, own) for label, own in pairs if own == seed and not live.has(label, seed))


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        run(tyro.cli(LiveProof, description=__doc__))


if __name__ == "__main__":
    main()
