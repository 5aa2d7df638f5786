"""How well the twin predicts the card: recorded live episodes against the same ones played in the twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from agents.live.episodes import LiveEpisode, LiveEpisodes, policy_of
from agents.play.metrics import episode_metrics
from agents.play.rollout import Recording, play_twin
from thermoe_env.configs import validated
from thermoe_env.device.parameters import TwinParams
from thermoe_env.device.physics import sensor_c
from thermoe_env.problem.problem import Problem, profile_of
from thermoe_env.problem.scenario import Randomize, Scenario

NO_SPREAD = {f.name: 0.0 for f in fields(Randomize)}
"""`randomize` of a twin that stands for one device."""
_TWIN_SIDE = ("profile", "twin")
"""Scenario keys that say how the twin predicts, not what was asked of the card."""


def scenario_differences(recorded: Scenario, wanted: Scenario) -> list[str]:
    """What a scenario asks of the card other than the recorded one did, as `key: wanted, recorded`."""
    return [
        f"{f.name}: {getattr(wanted, f.name)!r} is wanted, {getattr(recorded, f.name)!r} was recorded"
        for f in fields(Scenario)
        if f.name not in _TWIN_SIDE and getattr(wanted, f.name) != getattr(recorded, f.name)
    ]


# ---------------------------------------------------------------- the twin's half


def live_problem(scenario: Scenario, world: str) -> Problem:
    """What is played live: on a CPU with that machine's profile."""
    if world != "live-cpu":
        return Problem.of(scenario)
    return Problem.of(scenario, profile_of(scenario, f"cpu-{scenario.task}"))


def with_requests_of(capacity_rps: float, problem: Problem) -> Problem:
    """The problem at such loads that its requests are those of another one of that capacity."""
    ratio, traffic = capacity_rps / problem.capacity_rps, problem.scenario.traffic
    traffic = replace(traffic, low_load=traffic.low_load * ratio, high_load=traffic.high_load * ratio)
    return replace(problem, scenario=replace(problem.scenario, traffic=traffic))


def twin_problem(scenario: Scenario, world: str, capacity_rps: float, idle_c: float | None) -> Problem:
    """The twin of one live episode: the same requests, and one device in the room of that day.

    Args:
        scenario: as recorded, or with another profile or twin.
        world: of the recording; a `live-cpu` one is predicted with the profile of that CPU.
        capacity_rps: of the recording: a new profile must not change the requests.
        idle_c: temperature of the real die when it has settled at idle. The inlet is set so that the twin
            idles there; None leaves it as calibrated. The slow drift, which nobody can predict, is off.
    """
    problem = live_problem(scenario, world)
    problem = with_requests_of(capacity_rps, replace(problem, profile=problem.metered_profile))
    scenario, twin = replace(problem.scenario, randomize=Randomize(**NO_SPREAD)), problem.twin
    inlet_c = twin.inlet_c if idle_c is None else idle_c - twin.idle_rise_c
    room = {**vars(twin), "inlet_drift_c": 0.0, "inlet_c": inlet_c}
    twin = validated(TwinParams, room, f"twin {scenario.twin!r} in a room where it idles at {idle_c} degC")
    return replace(problem, scenario=scenario, twin=twin)


def with_residual_heat(recording: Recording, excess_c: float, tau_sink_s: float) -> Recording:
    """A twin's episode as from a heatsink that had not cooled down.

    The thermal model is linear, so heat left in the sink adds to the temperatures and decays with the sink's
    time constant. What it adds to leakage, under 1 W per degree on an H100, is left out.

    Args:
        recording: one episode of the twin from a settled start.
        excess_c: how much warmer than settled the real die was when its episode began.
        tau_sink_s: time constant of the sink.
    """
    time_s = (np.arange(len(recording.reward)) + 1) * recording.interval_s
    residual_c = excess_c * np.exp(-time_s / tau_sink_s)
    gpu = recording.gpu.copy()
    for name in ("temp_c", "mem_temp_c", "temp_mean_c"):
        gpu[name][:, 0] = [sensor_c(c) for c in gpu[name][:, 0] + residual_c]
    return replace(recording, gpu=gpu)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One episode in both worlds."""

    live: LiveEpisode
    twin: Recording
    idle_c: float
    """Temperature at which the twin idles."""
    inlet_c: float
    """Inlet temperature that gives it."""


def play_twins(live: LiveEpisodes, scenario: Scenario, from_start_c: bool = True) -> list[Pair]:
    """Play every recorded episode again in the twin.

    Args:
        live: what was recorded.
        scenario: its scenario, or that with another profile or twin.
        from_start_c: begin at the temperature at which the card began, in a room in which the twin idles as
            the card does (`LiveEpisodes.settled_c`); else settled, in the room of the calibration.

    Raises:
        ValueError: `scenario` asks something else of the card than was recorded.
    """
    differences = scenario_differences(live.scenario, scenario)
    if differences:
        raise ValueError(f"{live.folder} was recorded with another scenario: {'; '.join(differences)}")
    pairs = []
    for episode in live.episodes:
        recording = episode.recording
        settled_c = live.settled_c(episode) if from_start_c else None
        problem = twin_problem(scenario, recording.world, live.capacity_rps, settled_c)
        idle_c = problem.twin.inlet_c + problem.twin.idle_rise_c
        policy = policy_of(episode.recipe, problem)
        twin = play_twin(problem, policy, [int(recording.seeds[0])], recording.policy)
        if settled_c is not None:
            twin = with_residual_heat(twin, episode.start_c - settled_c, problem.twin.tau_sink_s)
        pairs.append(Pair(live=episode, twin=twin, idle_c=idle_c, inlet_c=problem.twin.inlet_c))
    return pairs


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Quantity:
    """A compared indicator, in the unit in which it is shown."""

    name: str
    """In `agents.play.metrics.KPIS`."""
    head: str
    factor: float = 1.0
    digits: int = 1
    relative: bool = True
    """The gap is twin over live less one, in %; otherwise twin less live, in the unit shown."""
    aim: float | None = None
    """Largest gap that is aimed at, up or down, in every episode."""
    gap_unit: str = "%"

    def gap(self, live: pd.Series, twin: pd.Series) -> pd.Series:
        """Gap per episode; NaN where there is none, as over nothing."""
        if not self.relative:
            return (twin - live) * self.factor
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = 100.0 * (twin / live - 1.0)
        return gap.where(np.isfinite(gap))


QUANTITIES = (
    Quantity("energy_j", "energy, kJ", 1e-3, 2, aim=5.0),
    Quantity("mean_power_w", "mean power, W", 1.0, 1),
    Quantity("peak_c", "peak temperature, °C", 1.0, 0, relative=False, aim=2.0, gap_unit="°C"),
    Quantity("mean_c", "mean temperature, °C", 1.0, 1, relative=False, gap_unit="°C"),
    Quantity("latency_p50_s", "p50 latency, ms", 1e3, 1),
    Quantity("latency_p95_s", "p95 latency, ms", 1e3, 1, aim=15.0),
    Quantity("quality", "quality, %", 100.0, 2, relative=False, aim=1.0, gap_unit="pp"),
    Quantity("late_fraction", "late, %", 100.0, 2, relative=False, gap_unit="pp"),
    Quantity("goodput_rps", "good answers/s", 1.0, 0),
    Quantity("j_per_good", "mJ per good answer", 1e3, 2),
)
"""What is compared, and what is aimed at."""


@dataclass(frozen=True)
class Ranking:
    """Policies by energy per good answer, on the seeds that all of them played."""

    live: list[str]
    twin: list[str]
    seeds: list[int]

    @property
    def same(self) -> bool:
        """Whether both worlds rank alike; False where no seed is common to all."""
        return bool(self.live) and self.live == self.twin


@dataclass(frozen=True)
class Comparison:
    """Both worlds side by side."""

    episodes: Any
    """DataFrame, a row per episode: what identifies it, and per quantity `<name>_live`, `_twin`, `_gap`."""
    ranking: Ranking

    @property
    def policies(self) -> list[str]:
        """Compared policies in the order of the live ranking."""
        return sorted(
            self.episodes.policy.unique(), key=lambda p: (p not in self.ranking.live, self._place(p))
        )

    def _place(self, policy: str) -> int:
        return self.ranking.live.index(policy) if policy in self.ranking.live else 0

    def gaps(self, policy: str, quantity: Quantity) -> np.ndarray:
        """Gaps of a policy's episodes, float [episodes]."""
        return self.episodes.loc[self.episodes.policy == policy, f"{quantity.name}_gap"].to_numpy(float)

    def met(self, policy: str, quantity: Quantity) -> bool | None:
        """Whether every episode's gap is within the aim; None where nothing is aimed at."""
        if quantity.aim is None:
            return None
        return bool(np.all(np.abs(self.gaps(policy, quantity)) <= quantity.aim))  # a NaN is not met

    @property
    def all_met(self) -> bool:
        """Whether every aim is met, the ranking's too."""
        cells = [self.met(policy, quantity) for policy in self.policies for quantity in QUANTITIES]
        return self.ranking.same and False not in cells


def compare(pairs: Sequence[Pair]) -> Comparison:
    """Compare episodes played in both worlds.

    Raises:
        ValueError: there are none.
    """
    if not pairs:
        raise ValueError("no episode to compare")
    live: Any = pd.concat([episode_metrics(pair.live.recording) for pair in pairs], ignore_index=True)
    twin: Any = pd.concat([episode_metrics(pair.twin) for pair in pairs], ignore_index=True)
    table: Any = live[["policy", "seed", "time_s"]].copy()
    table["idle_c"] = [pair.idle_c for pair in pairs]
    table["start_c"] = [pair.live.start_c for pair in pairs]
    table["inlet_c"] = [pair.inlet_c for pair in pairs]
    for side, recordings in (
        ("live", [pair.live.recording for pair in pairs]),
        ("twin", [p.twin for p in pairs]),
    ):
        table[f"arrived_{side}"] = [float(r.work["arrived"].sum()) for r in recordings]
    for quantity in QUANTITIES:
        name = quantity.name
        table[f"{name}_live"], table[f"{name}_twin"] = live[name], twin[name]
        table[f"{name}_gap"] = quantity.gap(live[name], twin[name])
    table = table.sort_values(["policy", "seed"], ignore_index=True)
    return Comparison(table, _rank(table))


def _rank(episodes: Any) -> Ranking:
    """Rank by energy per good answer over the seeds that every policy played."""
    played = [set(rows.seed) for _, rows in episodes.groupby("policy")]
    seeds = sorted(set.intersection(*played))
    if not seeds:
        return Ranking([], [], [])
    mean = (
        episodes[episodes.seed.isin(seeds)].groupby("policy")[["j_per_good_live", "j_per_good_twin"]].mean()
    )
    order = {
        side: list(mean[f"j_per_good_{side}"].sort_values(kind="stable").index) for side in ("live", "twin")
    }
    return Ranking(order["live"], order["twin"], [int(seed) for seed in seeds])


def document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON; what has no value is null."""

    def plain(value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    policies: dict[str, Any] = {}
    for policy in comparison.policies:
        own = comparison.episodes[comparison.episodes.policy == policy]
        cells: dict[str, Any] = {}
        for quantity in QUANTITIES:
            gaps = comparison.gaps(policy, quantity)
            cells[quantity.name] = {
                "live": plain(own[f"{quantity.name}_live"].mean()),
                "twin": plain(own[f"{quantity.name}_twin"].mean()),
                "gap": plain(gaps.mean()), "gap_low": plain(gaps.min()), "gap_high": plain(gaps.max()),
                "gap_unit": quantity.gap_unit, "aim": quantity.aim, "met": comparison.met(policy, quantity),
            }  # fmt: skip
        policies[policy] = {"episodes": len(own), **cells}
    records = comparison.episodes.to_dict("records")
    return {
        "all_met": comparison.all_met,
        "ranking": {**asdict(comparison.ranking), "same": comparison.ranking.same},
        "policies": policies,
        "episodes": [{str(k): plain(v) for k, v in record.items()} for record in records],
    }
