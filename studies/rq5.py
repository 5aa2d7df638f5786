"""What does each throttle do to efficiency and latency?

Batch size, experts per token, routing bias, clock and pace: each as a controller of power and heat, and held
at each of its levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from agents.evaluation.figures import power_temperature
from agents.policies.registry import make_policy
from agents.policies.throttles import THROTTLES
from studies.plays import Options, Play, Variant, episodes_of
from studies.rq_figures import ENERGY, GOODPUT, P95, P99, POWER, QUALITY, Panel, curves, fronts
from studies.rq_report import (
    Findings,
    difference,
    of_variant,
    origin_of,
    plays_table,
    relative,
    summary_of,
    trade,
)
from thermoe_env.mdp.fields import FIELDS
from thermoe_env.twin.score import KNOBS_READ

QUESTION = "What does each throttle do to efficiency and latency?"
STANDARD = "static"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the question; see configs/studies/rq5.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    knobs: dict[str, str]
    """Throttle -> the knob that it steers."""
    bases: tuple[str, ...]
    """Policies that never change, over which each knob is held at each of its levels."""
    variants: dict[str, Variant]

    def __post_init__(self) -> None:
        wrong = {name: knob for name, knob in self.knobs.items() if THROTTLES.get(name) != (knob,)}
        if wrong:
            raise ValueError(
                f"knobs must name throttles of agents.policies.throttles and their knob, got {wrong}"
            )

    def tasks(self, options: Options) -> list[Play]:
        """All plays."""
        plays = []
        for key, variant in self.variants.items():
            names, every = [STANDARD, *variant.policies], _all_knobs(variant, options)
            plays += [variant.play(f"{key}-{name}", name, options, overrides=every) for name in names]
            for base in self.bases:
                held = _levels_of(variant, base, options)
                for knob, values in self._values(variant, options).items():
                    for value in values:
                        levels = held | {knob: value}
                        name = _name(key, base, knob, value)
                        plays.append(variant.play(name, STANDARD, options, overrides=every, levels=levels))
        return plays

    def findings(self, results: dict[str, dict[str, Any]], options: Options) -> Findings:
        """The answer from the results."""
        episodes = episodes_of(results, list(results))
        summary, where = summary_of(episodes), next(iter(results.values()))["origin"]
        figures: list[tuple[str, str, Any]] = []
        for key, variant in self.variants.items():
            values = self._values(variant, options)
            panels = [
                Panel(knob, knob, [f"{value:g}" for value in own], {
                    f"over {base}": [_name(key, base, knob, value) for value in own] for base in self.bases})
                for knob, own in values.items()
            ]  # fmt: skip
            title = f"{variant.title}: each knob held at each level, 95% intervals\n{where}"
            draw = partial(curves, summary, panels, (ENERGY, QUALITY, GOODPUT, P95, P99, POWER), title)
            figures.append(
                (f"Each knob held at each level, {variant.title} ({where})", f"levels-{key}", draw)
            )
            for base in self.bases:
                lines = {
                    knob: [_name(key, base, knob, value) for value in own] for knob, own in values.items()
                }
                throttles = {name: [f"{key}-{name}"] for name in variant.policies} if base == STANDARD else {}
                title = f"{variant.title}: each knob's levels over {base}, the last is largest\n{where}"
                draw = partial(fronts, summary, lines | throttles, ENERGY, (QUALITY, P95), title, list(lines))
                caption = f"Accuracy, energy and latency over {base}, {variant.title} ({where})"
                figures.append((caption, f"front-{key}-{base}", draw))
        figures.append(self._course(options))
        tables = [(v.title, plays_table(of_variant(summary, key))) for key, v in self.variants.items()]
        return Findings(
            QUESTION, self._answer(options, episodes), origin_of(results), tables, figures,
            notes=[f"Throttles start from `{STANDARD}`, which does not adapt, and lower their knob when "
                   "power or heat strain (docs/design.md). A star: on the front of energy per good "
                   "answer, error and 95th percentile latency."],
            episodes=episodes,
        )  # fmt: skip

    def _answer(self, options: Options, episodes: pd.DataFrame) -> list[str]:
        sentences = []
        for key, variant in self.variants.items():
            base, parts = f"{key}-{STANDARD}", []
            for name in variant.policies:
                own = f"{key}-{name}"
                latency = relative(episodes, own, base, "latency_p95_s").text(100.0, "%", 0)
                over = difference(episodes, own, base, "over_budget_j").text(1e-3, " kJ")
                parts.append(
                    f"`{name}` {trade(episodes, own, base)}, p95 latency {latency}, over budget {over}"
                )
            sentences.append(f"**{variant.title}**, throttles against `{STANDARD}`: {'; '.join(parts)}.")
        key, variant = next(iter(self.variants.items()))
        parts = []
        standard = _levels_of(variant, STANDARD, options, **_all_knobs(variant, options))
        for knob, values in self._values(variant, options).items():
            plays = {_name(key, self.bases[-1], knob, value): value for value in values}
            own = episodes[episodes.policy.isin(list(plays))].groupby("policy").j_per_good.mean()
            best = str(own.idxmin())
            change = trade(episodes, best, _name(key, self.bases[-1], knob, standard[knob]))
            parts.append(f"`{knob}` from {standard[knob]:g} to {plays[best]:g}: {change}")
        sentences.append(
            f"Each knob moved from the standard service's level to its most frugal, all else as in "
            f"`{self.bases[-1]}` ({variant.title}): {'; '.join(parts)}."
        )
        return sentences

    def _values(self, variant: Variant, options: Options) -> dict[str, tuple[float, ...]]:
        """Levels of the swept knobs."""
        levels = variant.play("", STANDARD, options).problem.knobs.levels
        return {knob: levels[knob] for knob in self.knobs.values()}

    def _course(self, options: Options) -> tuple[str, str, Any]:
        """Power and temperature of the first episode, played again: bit for bit."""
        variant = next(iter(self.variants.values()))
        every = _all_knobs(variant, options)
        plays = {n: variant.play("", n, options, overrides=every) for n in (STANDARD, *variant.policies)}
        where = f"simulated (twin), {variant.title}, seed {options.seeds[0]}"
        problem = plays[STANDARD].problem
        return (
            f"Power and temperature over time: {where}", "power",
            lambda: power_temperature(problem, {n: p.record(1) for n, p in plays.items()}, where),
        )  # fmt: skip


def _all_knobs(variant: Variant, options: Options) -> dict[str, list[str]]:
    """Overrides by which a policy sets every knob that can be moved."""
    levels = variant.play("", STANDARD, options).problem.knobs.levels
    return {"knobs": [name for name in KNOBS_READ if len(levels[name]) > 1]}


def _levels_of(variant: Variant, base: str, options: Options, **overrides: Any) -> dict[str, float]:
    """What a policy that never changes sets; without overrides, the scenario's own knobs alone."""
    problem = variant.play("", base, options, overrides=overrides).problem
    action, _ = make_policy(base, problem).predict(np.zeros((1, len(FIELDS)), np.float32))
    pairs = zip(problem.knobs.controlled, action[0].tolist(), strict=True)
    return {name: problem.knobs.levels[name][level] for name, level in pairs}


def _name(variant: str, base: str, knob: str, value: float) -> str:
    return f"{variant}-{base}-{knob}-{value:g}"
