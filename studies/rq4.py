"""How do expert specialisation and load balance behave under thermal limits and changing load?

A standard service, one that steers its routing by the device, and staged rules, at constant loads and under
virtual temperature limits, on one device and on two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from studies.plays import Options, Play, Variant, episodes_of
from studies.repeats import range_text, select
from studies.rq_figures import ENERGY, QUALITY, Axis, Panel, curves, usage
from studies.rq_report import Findings, difference, of_variant, origin_of, plays_table, summary_of
from studies.tasks import read_table
from studies.ttt_service_report import Column

QUESTION = "How do expert specialisation and load balance behave under thermal limits and changing load?"
INDICATORS = (
    Axis("expert_entropy", "entropy of use\n(1 = even)"),
    Axis("load_imbalance", "imbalance (variation\nof tokens per expert)"),
    Axis("narrow_share", "tokens to narrow\nexperts (%)", 100.0),
    Axis("stage_bits", "expert and thermal\nstage (millibits)", 1e3),
    Axis("device_spread_c", "hottest less coolest\ndevice (°C)"),
    QUALITY,
    ENERGY,
)
_COLUMNS = (
    Column("entropy", "expert_entropy", 1.0, 3), Column("imbalance", "load_imbalance", 1.0, 3),
    Column("narrow %", "narrow_share", 100.0, 1), Column("millibits of stage", "stage_bits", 1e3, 2),
    Column("device spread °C", "device_spread_c", 1.0, 1), Column("quality %", "quality", 100.0, 1),
    Column("mJ per good", "j_per_good", 1e3, 2), Column("peak °C", "peak_c", 1.0, 1),
)  # fmt: skip
_COOL, _HOT = slice(0, 1), slice(2, 4)
"""Thermal stages before and after heat: NOMINAL; HOT and CRITICAL."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the question; see configs/studies/rq4.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    loads: tuple[float, ...]
    """Constant loads, over the standard service's capacity."""
    limits_c: tuple[float, ...]
    """Virtual temperature limits under the scenario's own load, the tightest first."""
    variants: dict[str, Variant]
    drawn: str
    """Policy whose use of the experts is drawn cool and hot."""
    drawn_limit_c: float
    """Under this limit, one of `limits_c`."""

    def __post_init__(self) -> None:
        if self.drawn_limit_c not in self.limits_c:
            raise ValueError(f"drawn_limit_c must be one of {self.limits_c}, got {self.drawn_limit_c}")

    def levels(self) -> dict[str, tuple[str, list[str], list[dict[str, Any]]]]:
        """What is varied: name -> label, ticks, and the scenario keys that each level replaces."""
        limits = [{"limits": {"temperature_c": limit}} for limit in self.limits_c]
        loads = [{"traffic": {"kind": "poisson", "low_load": load, "high_load": load}} for load in self.loads]
        return {
            "load": ("load over capacity", [f"{load:g}" for load in self.loads], loads),
            "limit": ("virtual limit (°C)", [f"{limit:g}" for limit in self.limits_c], limits),
        }

    def tasks(self, options: Options) -> list[Play]:
        """All plays."""
        return [
            variant.play(_name(key, label, what, tick), policy, options, overrides=overrides)
            for key, variant in self.variants.items()
            for label, policy in variant.players(options).items()
            for what, (_, ticks, levels) in self.levels().items()
            for tick, overrides in zip(ticks, levels, strict=True)
        ]

    def findings(self, results: dict[str, dict[str, Any]], options: Options) -> Findings:
        """The answer from the results.

        Raises:
            StudyError: the routing study that was given holds no routing.csv.
        """
        episodes = episodes_of(results, list(results))
        summary, where = summary_of(episodes), next(iter(results.values()))["origin"]
        figures: list[tuple[str, str, Any]] = []
        for what, (label, ticks, _) in self.levels().items():
            panels = [
                Panel(variant.title, label, ticks, {
                    policy: [_name(key, policy, what, tick) for tick in ticks]
                    for policy in variant.players(options)})
                for key, variant in self.variants.items()
            ]  # fmt: skip
            title = f"Use of the experts against the {label}, 95% intervals\n{where}"
            draw = partial(curves, summary, panels, INDICATORS, title)
            figures.append((f"Use of the experts against the {label} ({where})", what, draw))
        limit = f"under a virtual limit of {self.drawn_limit_c:g} °C"
        title = f"Use of the experts {limit}, before and in heat; all seeds\n{where}"
        figures.append((
            f"Use of the experts {limit} ({where}): the standard service, `{self.drawn}` in stage NOMINAL "
            "and in stages HOT and CRITICAL, and the last of the other policies", "usage",
            partial(usage, self._maps(results), title)))  # fmt: skip
        tables = [
            (variant.title, plays_table(of_variant(summary, key), _COLUMNS))
            for key, variant in self.variants.items()
        ]
        if options.routing is not None:
            tables.append(
                (
                    f"Specialisation of trained models, measured ({options.routing})",
                    _specialisation(options.routing),
                )
            )
        return Findings(
            QUESTION, self._answer(episodes), origin_of(results), tables, figures,
            notes=["Mutual information of expert and thermal stage: how much the device's heat tells of "
                   "which expert a token goes to. The twin knows no classes of inputs; how experts "
                   "specialise in them is in the routing study (`--routing`)."],
            episodes=episodes,
        )  # fmt: skip

    def _maps(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
        """Variant -> standard service, `drawn` cool and hot, last other policy -> tokens [L, E]."""
        maps = {}
        for key, variant in self.variants.items():
            standard, own, last = (
                np.array(results[_name(key, policy, "limit", f"{self.drawn_limit_c:g}")]["tokens"])
                for policy in (variant.policies[0], self.drawn, variant.policies[-1])
            )  # [L, 4, E] each
            maps[variant.title] = {
                variant.policies[0]: standard.sum(axis=1),
                f"{self.drawn}, cool": own[:, _COOL].sum(axis=1),
                f"{self.drawn}, hot": own[:, _HOT].sum(axis=1),
                variant.policies[-1]: last.sum(axis=1),
            }
        return maps

    def _answer(self, episodes: pd.DataFrame) -> list[str]:
        sentences = []
        for what, (label, ticks, _) in self.levels().items():
            parts = []
            for key, variant in self.variants.items():
                first, last = (_name(key, self.drawn, what, tick) for tick in (ticks[0], ticks[-1]))
                pair = (first, last) if what == "limit" else (last, first)
                entropy = difference(episodes, *pair, "expert_entropy").text(1.0, "", 3)
                narrow = difference(episodes, *pair, "narrow_share").text(100.0, " points")
                text = f"in *{variant.title}* entropy {entropy}, tokens to narrow experts {narrow}"
                if "two" in key:
                    spread = difference(episodes, *pair, "device_spread_c").text(1.0, " °C")
                    text += f", hottest less coolest device {spread}"
                parts.append(text)
            ends = (ticks[0], ticks[-1]) if what == "limit" else (ticks[-1], ticks[0])
            sentences.append(
                f"`{self.drawn}` at a {label} of {ends[0]} against {ends[1]}: {'; '.join(parts)}."
            )
        key, variant = next(iter(self.variants.items()))
        tick = self.levels()["limit"][1][0]
        own, base = (_name(key, p, "limit", tick) for p in (self.drawn, variant.policies[0]))
        even = difference(episodes, own, base, "expert_entropy").text(1.0, "", 3)
        sentences.append(
            f"Against `{variant.policies[0]}` at the tightest limit in *{variant.title}* the entropy changes "
            f"by {even} and quality by {difference(episodes, own, base, 'quality').text(100.0, ' points')}."
        )
        return sentences


def _specialisation(folder: Path) -> list[str]:
    """Mutual information of expert and class of input by routing bias, from a finished routing study."""
    needed = (
        "inputs",
        "task",
        "variant",
        "expert_count",
        "routing_bias",
        "specialisation_bits",
        "load_entropy",
    )
    table = select(read_table(folder / "routing.csv", needed, "studies.routing"), inputs="clean")
    table = table.loc[table.routing_bias.isin([0.0, table.routing_bias.max()]), :]
    heads = ("task", "variant", "k", "bias", "bits of class", "entropy of use")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table.to_dict("records"):
        texts = [
            range_text(*(row[f"{name}{end}"] for end in ("", "_low", "_high")), digits=3)
            for name in ("specialisation_bits", "load_entropy")
        ]
        settings = f"{row['task']} | {row['variant']} | {row['expert_count']} | {row['routing_bias']:g}"
        lines.append(f"| {settings} | {' | '.join(texts)} |")
    return lines


def _name(variant: str, policy: str, what: str, tick: str) -> str:
    return f"{variant}-{policy}-{what}-{tick}"
