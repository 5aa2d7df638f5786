"""Evaluation: policies on the same episodes, in the twin or live, into a run folder.

The command is `thermalmoe-evaluate`, `python evaluate.py`.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from rich.console import Console

from agents.evaluation.compare import is_results, read_results, refuse_other_world
from agents.evaluation.figures import write_figures
from agents.evaluation.report import print_summary, wide_console, write_report
from agents.evaluation.results import results_table, statistics_table, unit_notes, write_results
from agents.evaluation.tables import Played
from agents.files import new_run_folder, refuse_filled, training_runs, write_file, write_origin
from agents.load import load_policy, long_label, policy_label, trained_otherwise
from agents.play.metrics import episode_metrics, steps_table, summarize, world_of
from agents.play.rollout import COOL_WITHIN_C, Recording, cool_down, device_name, origin, play_live, play_twin
from agents.policies.policy import Policy, for_episodes
from agents.policies.registry import POLICIES
from moe.errors import one_line_errors
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

ALWAYS = ("static", "best_constant")
"""Played beside whatever is asked for, unless results of an earlier evaluation are taken in."""
RESERVED_SEEDS = range(800_000, 1_000_000)
"""Episodes that choose the best model and the best constant action."""
COOL_AT_MOST_S = 120.0
_COOL_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare policies on the same requests."""

    policy: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--compare"])] = ("rule_based",)
    """Names, run folders, model zips and classes of yours (package.module:Class) are played, beside `static`
    and `best_constant`; a folder of a training with --seeds is one entry, its unit the training seed. Folders
    of earlier results on the same scenario and seeds are read, and then only what is named is played."""
    baseline: str = "static"
    """Policy of the comparison against which differences and the probability of improvement are given."""
    scenario: str = "default"
    """Name in configs/scenarios or path of a YAML file."""
    traffic: str | None = None
    """Replay requests as they arrived in production: a name in configs/traces/requests (azure-conv-2023), or
    path of a file like the traces of Azure LLM inference, BurstGPT (CSV) or Mooncake (JSON lines)."""
    seeds: int = 20
    """Episodes per policy."""
    seed: int = 1000
    """First seed; episode i has seed + i, for every policy."""
    live: bool = False
    """Play on this machine's GPU (on a CPU: measured work, simulated device) instead of in the twin."""
    model: str | None = None
    """Folder of a Hugging Face checkpoint to serve, live, instead of the scenario's model (docs/hf.md)."""
    profile: str | None = None
    """Its profile, as `python -m moe.profiling --model` measured it on this machine."""
    out: Path | None = None
    """Folder for the results; runs/eval-<time> where none is given."""
    trust_pickle: bool = False
    """Unpickle model zips from outside a run folder. This can run code that they hold."""
    duration: int | None = None
    """Length of an episode in seconds, in place of the scenario's."""

    def __post_init__(self) -> None:
        if not self.live and (self.model is not None or self.profile is not None):
            raise ValueError("a checkpoint is served live: add --live, or leave --model and --profile out")
        held_out_seeds(self.seed, self.seeds)

    @property
    def seed_list(self) -> list[int]:
        """Seeds of the episodes."""
        return held_out_seeds(self.seed, self.seeds)


def held_out_seeds(seed: int, count: int) -> list[int]:
    """`count` seeds from `seed` on.

    Raises:
        ValueError: None or negative ones, or episodes that chose models or settings are among them.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"seeds must be at least 1 and seed not negative, got {count} and {seed}")
    if seed < RESERVED_SEEDS.stop and seed + count > RESERVED_SEEDS.start:
        raise ValueError(
            f"seeds {RESERVED_SEEDS.start} to {RESERVED_SEEDS.stop - 1} choose models and constant "
            f"actions and would flatter them: seed={seed} with seeds={count} touches them"
        )
    return list(range(seed, seed + count))


@dataclass
class Results:
    """What has been played so far. The tables on disk are whole after every `add`."""

    folder: Path
    problem: Problem
    baseline: str = "static"
    examples: dict[str, Recording] = field(default_factory=dict)
    """First episode of each policy that was played here, of an algorithm's first run."""
    notes: list[str] = field(default_factory=list)
    _episodes: list[pd.DataFrame] = field(default_factory=list)
    _steps: list[pd.DataFrame] = field(default_factory=list)

    @property
    def episodes(self) -> pd.DataFrame:
        """Indicators per episode."""
        return pd.concat(self._episodes, ignore_index=True)

    @property
    def summary(self) -> pd.DataFrame:
        """Indicators per policy."""
        return summarize(self.episodes, self.problem.scenario.feasible)

    def add(self, recording: Recording, run: str = "") -> None:
        """Take a recording in (of one training `run` of its policy) and write the tables anew."""
        if recording.error is not None:
            self.notes.append(
                f"{recording.policy}{run and f'/{run}'}, seed {recording.seeds[-1]}: cut short after "
                f"{recording.length[-1] * recording.interval_s:g} s by {type(recording.error).__name__} "
                f"{recording.error}; left out of the comparison"
            )
        if not len(recording.reward):
            return
        self.examples.setdefault(recording.policy, recording.episode(0))
        self.take(Played(episode_metrics(recording, run), steps_table(recording, self.problem, run)))

    def take(self, played: Played) -> None:
        """Take tables in and write episodes.csv, steps.csv.gz and summary.csv anew."""
        self._episodes.append(played.episodes)
        self._steps.append(played.steps)
        _write_table(self.folder / "episodes.csv", self.episodes)
        _write_table(self.folder / "steps.csv.gz", pd.concat(self._steps, ignore_index=True))
        _write_table(self.folder / "summary.csv", self.summary)

    def finish(self, console: Console) -> None:
        """Draw the figures, write the report, and say what came out and where it is."""
        if not self._episodes:
            console.out("nothing was played")
            return
        episodes, summary = self.episodes, self.summary
        baselines = dict.fromkeys(("static", self.baseline))
        statistics = pd.concat([statistics_table(episodes, name) for name in baselines], ignore_index=True)
        results = results_table(summary, statistics)
        figures = write_figures(
            self.folder / "figures", self.problem, self.examples, episodes, summary, results
        )
        seeds, scenario = episodes.seed, self.problem.scenario
        trace = scenario.traffic.trace
        replayed = "" if trace is None else f"; requests replayed from {Path(trace).name}"
        scope = (
            f"{origin(*world_of(episodes))}; scenario {scenario.name}; "
            f"{seeds.nunique()} seeds from {seeds.min()}; {scenario.episode_s} s each{replayed}; "
            f"virtual temperature limit {self.problem.limit_c:.3g} °C"
        )
        notes = [*unit_notes(summary), *self.notes]
        title = f"{', '.join(episodes.policy.unique())}: {scenario.name}"
        report = write_report(self.folder, title, scope, summary, figures, notes)
        _write_table(self.folder / "statistics.csv", statistics)
        write_results(self.folder, results, scope, notes)
        console.out(scope, highlight=False)
        print_summary(summary, console)
        for note in notes:
            console.out(note, highlight=False)
        console.out(
            f"results: {self.folder} (for a paper: results.md, results.tex, results.csv)\nreport:  {report}",
            highlight=False,
        )


def _write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file in one step; the same table gives the same bytes."""
    text = table.to_csv(index=False, float_format="%.9g").encode()
    write_file(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Results:
    """Play every policy on every seed and write everything into the run folder.

    Raises:
        ValueError: unknown policy, baseline or scenario, unusable model (`agents.load.load_policy`).
        ResultsError: earlier results that cannot be compared (`agents.evaluation.compare.read_results`).
        RunFolderError: `out` holds results already.
        ThermoeError: the live world failed; what was played until then is written.
        KeyboardInterrupt: stopped by the user; likewise.
    """
    console = console or wide_console()
    overrides: dict[str, Any] = {} if config.duration is None else {"episode_s": config.duration}
    if config.traffic is not None:
        overrides["traffic"] = {"kind": "trace", "trace": config.traffic}
    scenario = load_scenario(config.scenario, **overrides)
    env = None
    if config.live:
        env = ThermalMoEEnv(scenario, world="live", model=config.model, profile=config.profile)
    try:
        problem = Problem.of(scenario) if env is None else env.problem
        twin = problem if config.model is not None else Problem.of(scenario)
        earlier = [name for name in config.policy if is_results(name)]
        read = read_results(earlier, problem.scenario, config.seed_list)
        named = _named(config, twin)
        _refuse_misfits(config, read, set(named.values()), *_world(problem, env))
        players = _players(config, problem, twin, named)
        folder = new_run_folder("eval", config.out)
        write_origin(folder, {"evaluate": asdict(config), "scenario": asdict(problem.scenario)})
        results = Results(folder, problem, config.baseline)
        for played in read:
            results.take(played)
        if read and players and env is not None:
            results.notes.append("Earlier results were measured on another occasion.")
        if not earlier and twin.profile.energy_j is None:
            results.notes.append(
                "best_constant is left out: it is searched in a twin, and the profile of the "
                "checkpoint holds no energies; measure it on a card with NVML"
            )
        results.notes += [
            f"{label} was trained on other contents of {', '.join(player.changed)}."
            for label, player in players.items()
            if player.changed
        ]
        policies = {label: player.policy for label, player in players.items()}
        if env is None:
            play = _play_twin(config, problem, policies)
        else:
            play = play_live_paired(env, policies, config.seed_list, console)
        try:
            for recording in play:
                player = players[recording.policy]
                results.add(replace(recording, policy=player.name), player.run)
        finally:
            results.finish(console)
    finally:
        if env is not None:
            env.close()
    return results


@dataclass(frozen=True)
class _Player:
    """What plays, and as what it counts."""

    policy: Policy
    name: str
    run: str = ""
    """Which training, where the policy is an algorithm that was trained several times."""
    changed: tuple[str, ...] = ()
    """What it was trained on that is played otherwise."""


def _named(config: EvaluateConfig, twin: Problem) -> dict[str, str]:
    """What is to be played -> as what it counts; without earlier results those always played, first."""
    named = [name for name in config.policy if not is_results(name)]
    if len(named) == len(config.policy):
        named = [*(ALWAYS if twin.profile.energy_j is not None else ALWAYS[:1]), *named]
    labels: dict[str, str] = {}
    for name in dict.fromkeys(named):
        label = policy_label(name)
        labels[name] = long_label(name) if label in labels.values() else label
    return labels


def _players(
    config: EvaluateConfig, problem: Problem, twin: Problem, named: dict[str, str]
) -> dict[str, _Player]:
    """Label -> what is played."""
    players: dict[str, _Player] = {}
    for name in sorted(named, key="best_constant".__eq__):  # last: its search takes minutes, refusals none
        # It plays the twin, of another machine where this one has no energy meter: levels stand for each
        # other in order. A checkpoint has no other machine's profile.
        home = twin if name == "best_constant" else problem
        runs = [] if name in POLICIES else training_runs(name)
        for path in runs or [name]:
            policy, run = load_policy(path, home, config.trust_pickle), Path(path).name if runs else ""
            label = "/".join(filter(None, (named[name], run)))
            players[label] = _Player(policy, named[name], run, trained_otherwise(path, twin))
            if config.live:
                for_episodes(policy, config.seed_list, "live")  # refused now, not after hours
    order = list(named.values())
    return dict(sorted(players.items(), key=lambda item: order.index(item[1].name)))


def _refuse_misfits(
    config: EvaluateConfig, read: Sequence[Played], names: set[str], world: str, device: str
) -> None:
    """Refuse what does not fit together, before anything is searched or played."""
    if config.out is not None:
        refuse_filled(config.out)
    earlier = {str(name) for played in read for name in played.episodes.policy}
    if names:
        for played in read:
            refuse_other_world("earlier results", played.episodes, world, device)
    if twice := sorted(names & earlier):
        raise ValueError(
            f"{', '.join(twice)}: in the earlier results already; leave it out here, or play it into a "
            "folder of its own and compare the folders"
        )
    if config.baseline not in names | earlier:
        known = ", ".join(sorted(names | earlier))
        raise ValueError(f"baseline {config.baseline!r} is not among what is compared: {known}")


def _world(problem: Problem, env: ThermalMoEEnv | None) -> tuple[str, str]:
    return ("twin", problem.twin.gpu) if env is None else (env.world, device_name(env))


def _play_twin(config: EvaluateConfig, problem: Problem, policies: dict[str, Policy]) -> Iterator[Recording]:
    """All seeds at once, policy by policy."""
    for label, policy in policies.items():
        yield play_twin(problem, policy, config.seed_list, label)


def play_live_paired(
    env: ThermalMoEEnv,
    policies: dict[str, Policy],
    seeds: Sequence[int],
    console: Console,
    played: Collection[tuple[str, int]] = (),
) -> Iterator[Recording]:
    """Seed by seed, the policies one after another on each, from the same temperature.

    The order rotates from seed to seed, so that what drifts in between favours nobody.

    Args:
        env: a live one.
        policies: by label.
        seeds: of the episodes.
        console: told where an episode starts warmer than the first.
        played: (label, seed) of episodes to leave out.

    Raises:
        ThermoeError, RuntimeError, KeyboardInterrupt: what cut an episode short, after it has been yielded.
    """
    start_c: float | None = None
    order = list(policies)
    for number, seed in enumerate(seeds):
        turn = number % len(order)
        for label in order[turn:] + order[:turn]:
            if (label, seed) in played:
                continue
            reached_c = _cool_down(env, seed, start_c, label, console)
            start_c = reached_c if start_c is None else start_c
            recording = play_live(env, policies[label], seed, label)
            yield recording
            if recording.error is not None:
                raise recording.error


def _cool_down(env: ThermalMoEEnv, seed: int, start_c: float | None, label: str, console: Console) -> float:
    """Wait until the device is as cool as at the first start; returns its temperature."""
    wanted_c = math.inf if start_c is None else start_c + COOL_WITHIN_C
    reached_c = cool_down(env, seed, wanted_c, COOL_AT_MOST_S, _COOL_EVERY_S)
    if reached_c > wanted_c:
        console.out(
            f"{label}, seed {seed}: starts at {reached_c:g} °C, not at {start_c:g} °C as the first",
            highlight=False,
        )
    return reached_c


def main() -> None:
    """Parse the command line and evaluate."""
    flags = (tyro.conf.FlagCreatePairsOff,)
    with one_line_errors():
        evaluate(tyro.cli(EvaluateConfig, prog=Path(sys.argv[0]).name, config=flags))
