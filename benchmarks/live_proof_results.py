"""What the live proof shows: numbers per policy in both worlds, and whether each requirement is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from agents.live.compare import Pair, Quantity
from agents.live.episodes import LiveEpisodes
from agents.play.metrics import episode_metrics, student_interval
from agents.play.rollout import Recording
from agents.policies.registry import POLICIES

SEEDS, SECONDS = 5, 100
SAVING = 0.25
"""Least share of the standard service's energy per good answer that an agent must save."""
QUALITY_POINTS = 1.0
TWIN_PERCENT = 5.0
NUMBERS = (
    Quantity("j_per_good", "mJ per good answer", 1e3, 2),
    Quantity("energy_j", "energy, kJ", 1e-3, 2),
    Quantity("mean_power_w", "mean power, W", 1.0, 1),
    Quantity("quality", "quality, %", 100.0, 2),
    Quantity("goodput_rps", "good answers/s", 1.0, 0),
    Quantity("late_fraction", "late, %", 100.0, 3),
    Quantity("latency_p95_s", "p95 latency, ms", 1e3, 1),
    Quantity("peak_c", "peak temperature, °C", 1.0, 1),
    Quantity("above_limit_s", "above the virtual limit, s", 1.0, 1),
)
"""What the twin has to predict."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% Student interval; NaN limits from one seed."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """Of independent repeats."""
        if not len(values):
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(*student_interval(values), len(values))

    @classmethod
    def of_ratio(cls, own: np.ndarray, base: np.ndarray) -> Estimate:
        """Geometric mean of paired ratios: the interval of the mean logarithm, taken back."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = cls.of(np.log(own / base))
        return cls(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.n)

    def text(self, factor: float = 1.0, digits: int = 1, sign: str = "") -> str:
        """`mean [low, high]`."""
        mean, low, high = (f"{v * factor:{sign},.{digits}f}" for v in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if self.n > 1 else mean


@dataclass(frozen=True)
class Verdict:
    """Whether a requirement is met, and the number that says so."""

    policy: str
    requirement: str
    met: bool
    found: str

    def __str__(self) -> str:
        return f"{self.policy}: {self.requirement}: {'met' if self.met else 'NOT MET'}: {self.found}"


@dataclass(frozen=True)
class Proof:
    """All episodes in three tables of the same rows."""

    live: Any
    """DataFrame: `metrics.episode_metrics`, an episode's circumstances, and `j_drawn_per_good`."""
    twin: Any
    """The twin, begun at the live episode's start temperature."""
    blind: Any
    """The twin as calibrated, told nothing of the day."""
    examples: dict[str, Recording]
    """One live episode per policy, all of one seed."""
    agents: tuple[str, ...]
    """Trained policies."""
    origin: str
    limit_c: float
    """Virtual temperature limit."""

    @classmethod
    def from_episodes(cls, live: LiveEpisodes, pairs: Sequence[Pair], blind: Sequence[Pair]) -> Proof:
        """From the recorded episodes, and from what the twin makes of them (`compare.play_twins`)."""
        episodes = live.episodes
        tables = []
        for recordings in (
            [e.recording for e in episodes],
            [pair.twin for pair in pairs],
            [pair.twin for pair in blind],
        ):
            tables.append(pd.concat([episode_metrics(r) for r in recordings], ignore_index=True))
        rows = tables[0]
        rows["began"], rows["start_c"] = [e.began for e in episodes], [e.start_c for e in episodes]
        rows["card"] = ["/".join((e.bench[1], e.bench[2][:8])) for e in episodes]
        rows["wall_s"] = [math.nan if e.wall_s is None else e.wall_s for e in episodes]
        for name, q in (("decision_p50_ms", 0.5), ("decision_p95_ms", 0.95)):
            rows[name] = [1e3 * np.quantile(e.decision_s, q) if e.decision_s else math.nan for e in episodes]
        # A card's power is its mean from reading to reading, decisions included, so a slow policy's is too
        # low: what it is judged by counts all that was drawn while it decided.
        deciding_s = [sum(e.decision_s) if e.recording.world == "live" else 0.0 for e in episodes]
        rows["j_drawn_per_good"] = rows.j_per_good * (1.0 + np.array(deciding_s) / rows.time_s)
        seeds = rows.groupby("seed").policy.nunique()
        shown = int(seeds.index[seeds.argmax()])
        named = sorted(rows.policy.unique(), key=_place)
        of_seed = {e.recording.policy: e.recording for e in episodes if e.recording.seeds[0] == shown}
        return cls(
            *tables,
            examples={name: of_seed[name] for name in named if name in of_seed},
            agents=tuple(name for name in named if name not in POLICIES),
            origin=episodes[0].recording.origin,
            limit_c=float(live.scenario.limits.temperature_c),
        )

    @property
    def policies(self) -> list[str]:
        """Labels, the compared ones first."""
        return sorted(self.live.policy.unique(), key=_place)

    @property
    def candidates(self) -> list[str]:
        """What is held against the standard service and the rules, agents first."""
        others = [p for p in self.policies if p not in ("static", "rule_based")]
        return sorted(others, key=lambda p: (p not in self.agents, p))

    @property
    def all_verdicts(self) -> list[Verdict]:
        """Every requirement for every candidate."""
        return [verdict for policy in self.candidates for verdict in self.verdicts(policy)]

    def of(self, policy: str) -> Any:
        """Live rows of a policy by seed, DataFrame."""
        return self.live[self.live.policy == policy].sort_values(by=["seed"], ignore_index=True)

    def estimate(self, policy: str, name: str) -> Estimate:
        """A live number over seeds."""
        return Estimate.of(self.of(policy)[name].to_numpy(float))

    def predicted(self, policy: str, name: str, blind: bool = False) -> float:
        """The twin's mean over the same seeds."""
        table = self.blind if blind else self.twin
        return float(table.loc[table.policy == policy, name].mean())

    def error_percent(self, policy: str, name: str, blind: bool = False) -> float:
        """The twin's over the live number less one; 0 where both are 0, infinite where live alone is."""
        live, twin = self.estimate(policy, name).mean, self.predicted(policy, name, blind)
        if live == 0.0:
            return 0.0 if twin == 0.0 else math.inf
        return 100.0 * (twin / live - 1.0)

    def paired(self, own: str, base: str) -> Any:
        """Live rows of both, `_own` and `_base`, DataFrame, on the seeds that both played on one card."""
        keys = ["seed", "card"]
        return self.of(own).merge(self.of(base), on=keys, suffixes=("_own", "_base"))

    def ratio(self, own: str, base: str) -> Estimate:
        """Energy per good answer, with what was drawn during decisions, over another policy's; paired."""
        pairs = self.paired(own, base)
        return Estimate.of_ratio(*(pairs[f"j_drawn_per_good_{s}"].to_numpy(float) for s in ("own", "base")))

    def verdicts(self, policy: str) -> list[Verdict]:
        """Whether a policy, and the twin's prediction of it, meet what is required."""
        static, rules = self.paired(policy, "static"), self.paired(policy, "rule_based")
        seeds = len(set(static.seed) & set(rules.seed))
        shortest_s = float(self.live.loc[self.live.policy == policy, "time_s"].min())
        saved, less = self.ratio(policy, "static"), self.ratio(policy, "rule_based")
        quality = Estimate.of((static.quality_own - static.quality_base).to_numpy(float))
        above = (rules.above_limit_s_own - rules.above_limit_s_base).to_numpy(float)
        most_above = float(above.max()) if len(above) else math.nan
        verdicts = [
            Verdict(
                policy, f"live on an H100, at least {SEEDS} paired seeds of at least {SECONDS} s",
                self.origin.startswith("measured (live, NVIDIA H100")
                and seeds >= SEEDS
                and shortest_s >= SECONDS,
                f"{seeds} paired seeds of at least {shortest_s:g} s, {self.origin}",
            ),
            Verdict(
                policy, f"energy per good answer at least {SAVING:.0%} below `static`",
                saved.mean <= 1.0 - SAVING,
                f"{_change(saved)}; the interval is {_clear(saved, 1.0 - SAVING)}",
            ),
            Verdict(
                policy, f"quality no more than {QUALITY_POINTS:g} point below `static`",
                quality.mean >= -QUALITY_POINTS / 100.0,
                f"{quality.text(100.0, 2, '+')} points; the worst seed "
                f"{100.0 * float((static.quality_own - static.quality_base).min()):+.2f}",
            ),
            Verdict(
                policy, "energy per good answer below `rule_based`, outside the 95% interval",
                less.high < 1.0, _change(less),
            ),
            Verdict(
                policy, "no seconds above the virtual limit beyond those of `rule_based`",
                most_above <= 0.0,
                f"at most {most_above:+g} s in a seed, {self.estimate(policy, 'above_limit_s').mean:g} s on "
                f"average against {self.estimate('rule_based', 'above_limit_s').mean:g} s",
            ),
        ]  # fmt: skip
        for blind, how in (
            (False, "begun at the card's start temperature"),
            (True, "told nothing of the day"),
        ):
            errors = {q.head: self.error_percent(policy, q.name, blind) for q in NUMBERS}
            missed = {head: e for head, e in errors.items() if not abs(e) <= TWIN_PERCENT}
            found = ", ".join(f"{head.partition(',')[0]} {e:+.1f}%" for head, e in missed.items())
            verdicts.append(
                Verdict(
                    policy, f"the twin, {how}, within {TWIN_PERCENT:g}% of every number", not missed,
                    f"beyond it: {found}" if missed
                    else f"at most {max(abs(e) for e in errors.values()):.1f}% off",
                )
            )  # fmt: skip
        return verdicts

    def document(self) -> dict[str, Any]:
        """All of it as plain JSON; what has no value is null."""
        policies = {
            policy: {
                q.name: {
                    "live": asdict(self.estimate(policy, q.name)),
                    "twin": self.predicted(policy, q.name),
                    "twin_error_percent": self.error_percent(policy, q.name),
                    "blind_twin": self.predicted(policy, q.name, blind=True),
                    "blind_twin_error_percent": self.error_percent(policy, q.name, blind=True),
                }
                for q in NUMBERS
            }
            for policy in self.policies
        }
        ratios = {
            policy: {base: asdict(self.ratio(policy, base)) for base in ("static", "rule_based")}
            for policy in self.candidates
        }
        return _plain(
            {
                "origin": self.origin,
                "agents": self.agents,
                "verdicts": [asdict(verdict) for verdict in self.all_verdicts],
                "j_per_good_ratios": ratios,
                "policies": policies,
                "episodes": self.live.to_dict("records"),
            }
        )


def _place(policy: str) -> tuple[bool, int, str]:
    """Named policies in their usual order, then agents."""
    names = list(POLICIES)
    return (policy not in names, names.index(policy) if policy in names else 0, policy)


def _change(ratio: Estimate) -> str:
    """A ratio as a change in percent."""
    mean, low, high = (100.0 * (v - 1.0) for v in (ratio.mean, ratio.low, ratio.high))
    return f"{Estimate(mean, low, high, ratio.n).text(sign='+')} % over paired seeds: {ratio.n}"


def _clear(ratio: Estimate, bound: float) -> str:
    """Where an interval lies."""
    if ratio.n < 2:
        return "unknown"
    return "clear of the bound" if ratio.high <= bound or ratio.low > bound else "not clear of the bound"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
