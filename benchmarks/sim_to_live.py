"""The same policies on the same requests in both worlds: `python -m benchmarks.sim_to_live --out runs/x`.

The live half plays on this machine's GPU what the folder does not hold yet, and records the GPU's telemetry
beside it. The twin half plays the recorded episodes again in the twin and compares. On a machine without a
GPU only the second half runs, so a changed twin or profile is judged on the same recordings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import arg

from agents.evaluation.report import wide_console
from agents.files import new_run_folder, write_file
from agents.live.compare import NO_SPREAD, compare, document, live_problem, play_twins, scenario_differences
from agents.live.episodes import LiveEpisodes, recipe_of
from agents.live.report import print_comparison, write_fidelity
from agents.live.segments import recording_beside
from agents.live.session import PER_EPISODE_S, LiveSession, machine_of
from agents.load import policy_label
from moe.errors import one_line_errors
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario

START_S = 25.0
"""Time set aside for building the service and warming it up."""
DEFAULT_SECONDS = 100
MIN_EPISODE_S = 10


@dataclass(frozen=True, kw_only=True)
class SimToLive:
    """What to play, and for how long."""

    out: Path | None = None
    """Folder of the recordings; what it holds is kept. runs/sim-to-live-<time> where none is given."""
    policies: tuple[str, ...] = ("static", "best_constant", "rule_based", "small_batches")
    """Names, run folders or model zips."""
    scenario: str | None = None
    """Name or path; default: the folder's, or `default` for a new folder."""
    profile: str | None = None
    """Profile to use in place of the scenario's; name or path."""
    twin: str | None = None
    """Twin to use in place of the scenario's; name or path."""
    seed: int = 2000
    """First seed."""
    seeds: int = 1
    """Episodes per policy: seed, seed + 1, ..."""
    seconds: int | None = None
    """Length of an episode; default: the folder's, or 100 for a new one."""
    within_s: float | None = None
    """Time for the live half: the episodes of a new folder are shortened alike, and none begins that would
    end later."""
    cool_down_s: float = 60.0
    """Longest wait before an episode for the device to idle back to its first start temperature."""
    order_seed: int = 0
    """Seed of the order in which policies and seeds are played."""
    samples_per_s: float = 20.0
    """Telemetry rows per second."""
    only: Literal["live", "compare"] | None = None
    """One half alone."""
    on_cpu: bool = False
    """Without a GPU, play live on the CPU (measured work, simulated device), to try the command out."""
    docs: Path | None = None
    """Folder for fidelity.md and its figures; default: the folder of the recordings."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print one JSON document instead of the table."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.seed < 0 or not self.policies:
            raise ValueError(
                f"needs a policy, seeds >= 1 and seed >= 0, got {self.policies}, {self.seeds}, {self.seed}"
            )
        if self.cool_down_s < 0.0:
            raise ValueError(f"cool_down_s must not be negative, got {self.cool_down_s}")


def run(config: SimToLive, console: Console | None = None) -> dict[str, Any] | None:
    """Run the halves that can be run here; returns the comparison as JSON, None after the live half alone.

    Raises:
        ValueError: nothing to compare and no GPU, another scenario than the recorded one, or a bad policy.
        ThermoeError: the live world cannot be built.
    """
    # What the live half says goes to stderr, so that --json leaves one document on stdout.
    console = console or wide_console()
    say = Console(stderr=True, width=console.width, highlight=False, markup=False)
    live = None if config.out is None else LiveEpisodes.load(config.out)
    if live is not None:
        _refuse_another(live, config)
    if config.only != "compare" and (config.on_cpu or _gpu_answers()):
        live = _play(config, live, say)
    elif config.only == "live":
        raise ValueError(
            "no CUDA GPU here: run the live half on a machine that has one and bring its folder back, "
            "or try the command out with --on-cpu"
        )
    if live is None or not live.episodes:
        reasons = "".join(f"\n  {reason}" for reason in live.lost) if live is not None else ""
        raise ValueError(
            f"{config.out or 'a new folder'} holds no whole live episode to compare, and none was played "
            f"here: run this command on a machine with a CUDA GPU and bring the folder back{reasons}"
        )
    if config.only == "live":
        say.print(f"{len(live.episodes)} live episodes in {live.folder}; compare them with --only compare")
        return None
    scenario = dataclasses.replace(live.scenario, **_names(config))
    pairs = play_twins(live, scenario)
    comparison = compare(pairs)
    result = {"lost": live.lost, **document(comparison)}
    docs = config.docs or live.folder
    path = write_fidelity(docs, live, scenario, pairs, comparison)
    write_file(docs / "fidelity" / "comparison.json", json.dumps(result, indent=1) + "\n")
    if config.as_json:
        print(json.dumps(result, indent=1))
    else:
        print_comparison(comparison, console)
        for reason in live.lost:
            console.print(f"missing: {reason}", highlight=False, markup=False)
        console.print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)
    return result


def _gpu_answers() -> bool:
    import torch

    return torch.cuda.is_available()


def _names(config: SimToLive) -> dict[str, str]:
    """Profile and twin that replace the scenario's."""
    names = {"profile": config.profile, "twin": config.twin}
    return {key: name for key, name in names.items() if name is not None}


def _refuse_another(live: LiveEpisodes, config: SimToLive) -> None:
    """Refuse a folder that was recorded with another scenario than the one asked for."""
    seconds = live.scenario.episode_s if config.seconds is None else config.seconds
    if config.scenario is None:
        wanted = dataclasses.replace(live.scenario, episode_s=seconds)
    else:
        wanted = load_scenario(config.scenario, randomize=NO_SPREAD, episode_s=seconds)
    differences = scenario_differences(live.scenario, wanted)
    if differences:
        raise ValueError(
            f"{live.folder} was recorded with another scenario ({'; '.join(differences)}): "
            "leave --scenario and --seconds out, or give another --out"
        )


# ---------------------------------------------------------------- the live half


def _play(config: SimToLive, live: LiveEpisodes | None, say: Console) -> LiveEpisodes:
    """Play what is not recorded yet."""
    began = time.monotonic()
    end = math.inf if config.within_s is None else began + config.within_s
    labels = {policy_label(spec): spec for spec in config.policies}
    if len(labels) < len(config.policies):
        raise ValueError(f"policies need different names, got {config.policies}")
    order = [(label, config.seed + i) for label in labels for i in range(config.seeds)]
    order = [order[i] for i in np.random.default_rng(config.order_seed).permutation(len(order))]
    todo = [pair for pair in order if live is None or not live.has(*pair)]
    if not todo and live is not None:
        return live
    scenario = _scenario(config, live)
    problem = live_problem(scenario, "live" if _gpu_answers() else "live-cpu")
    if live is not None:
        live.refuse_other_requests(problem)
    known = {} if live is None else live.recipes
    twin = Problem.of(scenario)
    recipes = {label: known.get(label) or recipe_of(spec, problem, twin) for label, spec in labels.items()}
    for label, recipe in recipes.items():
        say.print(f"{label}: {recipe}")
    if _gpu_answers():
        from moe.training.weights import load_model

        # On first use this trains the model, for a time that nobody knows before.
        load_model(scenario.task, problem.profile.size, "cuda")
    if live is None:
        scenario = load_scenario(scenario, episode_s=_seconds(config, len(todo), end))
        folder = config.out or new_run_folder("sim-to-live")
        live = LiveEpisodes(folder, scenario, problem.capacity_rps)
        live.save()  # from here on the folder can be taken up again
    say.print(f"{len(todo)} episodes of {scenario.episode_s} s into {live.folder}")
    env = ThermalMoEEnv(scenario, world="live")
    try:
        with recording_beside(env, live, config.samples_per_s) as segments:
            session = LiveSession(env, live, recipes, machine_of(env), segments, say, config.cool_down_s, end)
            session.play(todo)
    finally:
        env.close()
    return live


def _scenario(config: SimToLive, live: LiveEpisodes | None) -> Scenario:
    """The scenario to play, not yet shortened to the time there is."""
    if live is not None:
        return dataclasses.replace(live.scenario, **_names(config))
    name, seconds = (
        config.scenario or "vision",
        DEFAULT_SECONDS if config.seconds is None else config.seconds,
    )
    return load_scenario(name, randomize=NO_SPREAD, episode_s=seconds, **_names(config))


def _seconds(config: SimToLive, count: int, end: float) -> int:
    """Length of each of `count` episodes, so that they end in time."""
    wanted = DEFAULT_SECONDS if config.seconds is None else config.seconds
    if end == math.inf:
        return wanted
    left_s = end - time.monotonic() - START_S - config.cool_down_s
    room_s = math.floor(left_s / count - config.cool_down_s - PER_EPISODE_S)
    if room_s < MIN_EPISODE_S:
        raise ValueError(
            f"within_s={config.within_s} leaves {room_s} s for each of {count} episodes, at least "
            f"{MIN_EPISODE_S} are needed: take fewer policies or seeds, or a shorter cool_down_s"
        )
    return min(wanted, room_s)


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        run(tyro.cli(SimToLive, description=__doc__))


if __name__ == "__main__":
    main()
