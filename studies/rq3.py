"""What are the trade-offs of performance, energy and thermal stability under test-time adaptation?

Gates that decide when the model adapts, over the same other knobs, under budgets of the energy that
adaptation may spend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pandas as pd

from agents.evaluation.figures import power_temperature
from agents.policies.gates import GATES
from studies.plays import Options, Play, Variant, episodes_of
from studies.rq_figures import ENERGY, P95, PEAK, QUALITY, Axis, Panel, curves, fronts
from studies.rq_report import (
    COLUMNS,
    Change,
    Findings,
    difference,
    of_variant,
    origin_of,
    plays_table,
    summary_of,
    trade,
)
from studies.ttt_service_report import Column
from studies.ttt_service_results import BASELINE, ratio_interval

QUESTION = "What are the trade-offs of performance, energy and thermal stability under test-time adaptation?"
ADAPTING = Axis("adapting_j_per_request", "energy of adapting\nper request (mJ)", 1e3)
HOT = Axis("above_limit_s", "time above the\nvirtual limit (s)")
STABILITY = Axis("temp_sd_c", "spread of temperature\nover time (°C)")
ERROR = Axis("error", "error (%)", 100.0)
_COLUMNS = (Column("adapts %", "adapting_share", 100.0, 0), *COLUMNS, Column("sd °C", "temp_sd_c", 1.0, 2))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the question; see configs/studies/rq3.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    fractions: tuple[float | None, ...]
    """Energy that adaptation may spend over that of serving; None is unlimited and comes last."""
    gates: tuple[str, ...]
    """Names in `agents.policies.gates.GATES`; `never` is always there."""
    answer: tuple[str, float]
    """Gate and fraction that the answer is about."""
    variants: dict[str, Variant]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.gates) - set(GATES))
        if unknown or BASELINE in self.gates:
            raise ValueError(f"gates must be of {sorted(set(GATES) - {BASELINE})}, got {self.gates}")
        if self.fractions[-1] is not None or self.answer[0] not in self.gates or (
            self.answer[1] not in self.fractions):  # fmt: skip
            raise ValueError(
                f"fractions must end with null, and answer must be of gates and fractions; got {self.answer}"
            )

    def tasks(self, options: Options) -> list[Play]:
        """All plays."""
        plays = []
        for key, variant in self.variants.items():
            plays.append(variant.play(f"{key}-{BASELINE}", f"gate-{BASELINE}", options))
            players = {gate: f"gate-{gate}" for gate in self.gates} | variant.players(options)
            for label, policy in players.items():
                for fraction in self.fractions:
                    budget = {} if fraction is None else {"adaptation": {"budget": {"fraction": fraction}}}
                    plays.append(variant.play(_name(key, label, fraction), policy, options, overrides=budget))
        return plays

    def findings(self, results: dict[str, dict[str, Any]], options: Options) -> Findings:
        """The answer from the results."""
        episodes = episodes_of(results, list(results))
        summary, where = summary_of(episodes), next(iter(results.values()))["origin"]
        panels = [
            Panel(variant.title, "budget over the energy of serving", [*map(_text, self.fractions)], {
                BASELINE: [f"{key}-{BASELINE}"] * len(self.fractions),
                **{label: [_name(key, label, fraction) for fraction in self.fractions]
                   for label in (*self.gates, *variant.players(options))},
            })
            for key, variant in self.variants.items()
        ]  # fmt: skip
        figures: list[tuple[str, str, Any]] = [
            (f"Test-time training under energy budgets ({where})", "budgets",
             partial(curves, summary, panels, (ERROR, ENERGY, ADAPTING, PEAK, HOT, STABILITY),
                     f"Test-time training under energy budgets, 95% intervals\n{where}")),
        ]  # fmt: skip
        for (key, variant), panel in zip(self.variants.items(), panels, strict=True):
            groups = {**panel.lines, BASELINE: [f"{key}-{BASELINE}"]}
            title = f"{variant.title}; lines: from the smallest budget to none (largest)\n{where}"
            draw = partial(
                fronts, summary, groups, ENERGY, (QUALITY, P95, PEAK), title, list(panel.lines)[1:]
            )
            caption = f"Accuracy, energy, latency and temperature, {variant.title} ({where})"
            figures.append((caption, f"front-{key}", draw))
        figures.append(self._course(options))
        tables = [
            (variant.title, plays_table(of_variant(summary, key), _COLUMNS))
            for key, variant in self.variants.items()
        ]
        return Findings(
            QUESTION, self._answer(episodes, summary), origin_of(results), tables, figures,
            notes=[f"Gates set `ttt_steps` alone; the other knobs are those of `rule_based`. `{BASELINE}` "
                   "never adapts. The profile of language has no adaptation, so it is not in this study."],
            episodes=episodes,
        )  # fmt: skip

    def _answer(self, episodes: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
        key, variant = next(iter(self.variants.items()))
        gate, fraction = self.answer
        never, free, bound = f"{key}-{BASELINE}", _name(key, gate, None), _name(key, gate, fraction)
        quality = {
            name: episodes[episodes.policy == name].set_index("seed").quality for name in (never, free, bound)
        }
        gains = [(quality[name] - quality[never]).to_numpy() for name in (bound, free)]
        kept = Change(*ratio_interval(gains[0], gains[1]))
        spent = [
            episodes[episodes.policy == name].adapting_j_per_request.to_numpy() for name in (bound, free)
        ]
        share = Change(*ratio_interval(spent[0], spent[1]))
        best = of_variant(summary, key).sort_values("j_per_good").policy.iloc[0]
        peaks = [difference(episodes, name, never, "peak_c").text(1.0, " °C") for name in (free, bound)]
        tight = list(self.variants)[1] if len(self.variants) > 1 else key
        above = [
            difference(episodes, _name(tight, gate, f), f"{tight}-{BASELINE}", "above_limit_s").text(
                1.0, " s"
            )
            for f in (None, fraction)
        ]
        return [
            f"**{variant.title}**: against `{BASELINE}`, unlimited `{gate}` brings "
            f"{trade(episodes, free, never)}; a budget of {_text(fraction)} of serving's energy keeps "
            f"{kept.text(100.0, '%', sign='')} of its gain in accuracy for "
            f"{share.text(100.0, '%', sign='')} of the energy of adapting.",
            f"Least energy per good answer of all: `{best}`, {trade(episodes, f'{key}-{best}', never)}.",
            f"Heat: peak temperature changes by {peaks[0]} unlimited and by {peaks[1]} under the budget; in "
            f"*{self.variants[tight].title}* the time above the limit by {above[0]} and {above[1]}.",
        ]

    def _course(self, options: Options) -> tuple[str, str, Any]:
        """Power and temperature of the first episode, played again: bit for bit."""
        variant = next(iter(self.variants.values()))
        gate, fraction = self.answer
        budget = {"adaptation": {"budget": {"fraction": fraction}}}
        plays = {
            BASELINE: variant.play("", f"gate-{BASELINE}", options),
            f"{gate}, budget {_text(fraction)}": variant.play("", f"gate-{gate}", options, overrides=budget),
            gate: variant.play("", f"gate-{gate}", options),
        }
        where = f"simulated (twin), {variant.title}, seed {options.seeds[0]}"
        problem = next(iter(plays.values())).problem
        return (
            f"Power and temperature over time: {where}", "power",
            lambda: power_temperature(problem, {n: p.record(1) for n, p in plays.items()}, where),
        )  # fmt: skip


def _text(fraction: float | None) -> str:
    return "none" if fraction is None else f"{fraction:g}"


def _name(variant: str, gate: str, fraction: float | None) -> str:
    return f"{variant}-{gate}-{'unlimited' if fraction is None else f'budget-{fraction:g}'}"
