"""How well do real-time GPU signals steer routing to save energy without losing quality?

Policies are played as they are and with the device's signals late or never; constant routing biases show what
no signal can.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pandas as pd

from agents.evaluation.figures import experts, power_temperature
from agents.play.rollout import Recording
from studies.plays import Options, Play, Trained, Variant, episodes_of
from studies.rq_figures import ENERGY, P95, QUALITY, changes, fronts
from studies.rq_report import (
    COLUMNS,
    Change,
    Findings,
    difference,
    of_variant,
    origin_of,
    plays_table,
    relative,
    summary_of,
    trade,
)
from thermoe_env.problem.problem import Problem

QUESTION = "How well do real-time GPU signals steer routing to save energy without losing quality?"
SEES_ALL, SEES_NONE = "sees all", "blind"
SHOWN = {
    "energy per good answer": (partial(relative, name="j_per_good"), 100.0, "energy per good answer (%)"),
    "quality": (partial(difference, name="quality"), 100.0, "quality (points)"),
    "power": (partial(difference, name="over_budget_j"), 1e-3, "energy above the power budget (kJ)"),
    "heat": (partial(difference, name="above_limit_s"), 1.0, "time above the virtual limit (s)"),
}
"""What signals change, a figure each: how it is compared, factor to the shown unit, label."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the question; see configs/studies/rq1.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    signals: dict[str, tuple[str, ...]]
    """Fields of the observation by group."""
    delays_s: tuple[float, ...]
    """How late all groups come together."""
    variants: dict[str, Variant]
    bases: tuple[str, ...]
    """Policies over which constant routing biases are held; the first is drawn over time."""
    drawn: tuple[str, ...]
    """Policies drawn over time."""

    def conditions(self) -> dict[str, dict[str, Any]]:
        """What the policies see: label -> fields of `Play`."""
        everything = tuple(name for group in self.signals.values() for name in group)
        blind = {f"blind to {group}": {"late_fields": names} for group, names in self.signals.items()}
        late = {f"{delay:g} s late": {"late_fields": everything, "delay_s": delay} for delay in self.delays_s}
        return {SEES_ALL: {}, **blind, SEES_NONE: {"late_fields": everything}, **late}

    def tasks(self, options: Options) -> list[Play]:
        """All plays."""
        plays = []
        for key, variant in self.variants.items():
            for label, policy in variant.players(options).items():
                for condition, seen in self.conditions().items():
                    plays.append(variant.play(_name(key, label, condition), policy, options, **seen))
            for base in self.bases:
                for bias in _biases(variant, options):
                    name = _name(key, base, f"bias {bias:g}")
                    plays.append(variant.play(name, base, options, levels={"routing_bias": bias}))
        return plays

    def findings(self, results: dict[str, dict[str, Any]], options: Options) -> Findings:
        """The answer from the results."""
        episodes = episodes_of(results, list(results))
        summary, origin = summary_of(episodes), origin_of(results)
        where = next(iter(results.values()))["origin"]
        figures = []
        for name, (compare, factor, label) in SHOWN.items():
            columns = {
                v.title: self._changes(k, options, episodes, compare) for k, v in self.variants.items()
            }
            title = f"Change of {label} against the same policy that sees all\n{where}"
            draw = partial(changes, columns, factor, f"change of {label}", title)
            caption = f"{name.capitalize()} without signals, or with late ones ({where})"
            figures.append((caption, f"signals-{name.split()[0]}", draw))
        for key, variant in self.variants.items():
            groups = {
                label: [_name(key, label, condition) for condition in self.conditions()]
                for label in variant.players(options)
            }
            for base in self.bases:
                names = [_name(key, base, f"bias {bias:g}") for bias in _biases(variant, options)]
                groups[f"{base}, constant bias"] = names
            joined = [f"{base}, constant bias" for base in self.bases]
            title = (
                f"{variant.title}: every condition; lines: constant routing bias, larger is stronger\n{where}"
            )
            draw = partial(fronts, summary, groups, ENERGY, (QUALITY, P95), title, joined)
            figures.append((f"Accuracy, energy and latency, {variant.title} ({where})", f"front-{key}", draw))
        tables = [("Changes without any signals", self._blind_table(options, episodes))]
        tables += [
            (variant.title, plays_table(of_variant(summary, key), COLUMNS))
            for key, variant in self.variants.items()
        ]
        return Findings(
            QUESTION, self._answer(options, episodes), origin, tables, figures + self._courses(options),
            notes=["Blind: the field stays at the value that the episode began with (a cool, idle device, an "
                   "empty queue, the normal power budget). A star: on the front of energy per good answer, "
                   "error and 95th percentile latency."],
            episodes=episodes,
        )  # fmt: skip

    def _changes(
        self, key: str, options: Options, episodes: pd.DataFrame, compare: Any
    ) -> dict[str, dict[str, Change]]:
        """Policy -> condition -> change against the same policy that sees all."""
        return {
            label: {
                condition: compare(episodes, _name(key, label, condition), _name(key, label, SEES_ALL))
                for condition in self.conditions()
                if condition != SEES_ALL
            }
            for label in self.variants[key].players(options)
        }

    def _answer(self, options: Options, episodes: pd.DataFrame) -> list[str]:
        pairs = [(key, label) for key, v in self.variants.items() for label in v.players(options)]
        energy = [
            relative(episodes, _name(key, label, SEES_NONE), _name(key, label, SEES_ALL))
            for key, label in pairs
        ]
        dearer, cheaper = (sum(c.sure and c.mean * sign > 0.0 for c in energy) for sign in (1, -1))
        key, variant = next(iter(self.variants.items()))
        blind = [
            f"`{label}` {trade(episodes, _name(key, label, SEES_NONE), _name(key, label, SEES_ALL))}"
            for label in variant.players(options)
        ]
        biases = _biases(variant, options)
        low, high = (_name(key, self.bases[-1], f"bias {bias:g}") for bias in (biases[0], biases[-1]))
        return [
            f"Without any of the signals energy per good answer surely rises for {dearer} of {len(pairs)} "
            f"pairs of policy and variant, and surely falls for {cheaper}; what else changes is in the first "
            "table.",
            f"In *{variant.title}* without signals: {'; '.join(blind)}.",
            f"The strongest constant routing bias against none, over `{self.bases[-1]}`: "
            f"{trade(episodes, high, low)}.",
        ]

    def _blind_table(self, options: Options, episodes: pd.DataFrame) -> list[str]:
        """What all signals together are worth: `SHOWN`, per variant and policy."""
        heads = ("variant", "policy", *(label for _, _, label in SHOWN.values()))
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for key, variant in self.variants.items():
            for label in variant.players(options):
                ends = _name(key, label, SEES_NONE), _name(key, label, SEES_ALL)
                texts = [compare(episodes, *ends).text(factor, "") for compare, factor, _ in SHOWN.values()]
                lines.append(f"| {variant.title} | {label} | {' | '.join(texts)} |")
        return lines

    def _courses(self, options: Options) -> list[tuple[str, str, Any]]:
        """Power, temperature and use of the experts over the first episode, played again: bit for bit."""
        found = []
        for key, variant in self.variants.items():
            players: dict[str, str | Trained] = {name: name for name in self.drawn}
            players |= {k: v for k, v in variant.players(options).items() if not isinstance(v, str)}
            plays = {label: variant.play(label, policy, options) for label, policy in players.items()}
            episode = partial(_first, plays)
            where = f"simulated (twin), {variant.title}, seed {options.seeds[0]}"
            problem = next(iter(plays.values())).problem
            for name, draw in (("power", power_temperature), ("experts", experts)):
                found.append((f"{name.capitalize()} over time: {where}", f"{name}-{key}",
                              partial(_draw, draw, problem, episode, where)))  # fmt: skip
        return found


def _draw(draw: Any, problem: Problem, episode: Any, where: str) -> Any:
    return draw(episode(), where) if draw is experts else draw(problem, episode(), where)


def _first(plays: dict[str, Play]) -> dict[str, Recording]:
    return {label: play.record(1) for label, play in plays.items()}


def _biases(variant: Variant, options: Options) -> tuple[float, ...]:
    return variant.play("", "static", options).problem.knobs.levels["routing_bias"]


def _name(variant: str, policy: str, condition: str) -> str:
    return f"{variant}-{policy}-{condition.replace(' ', '-')}"
