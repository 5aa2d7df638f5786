"""The study of robustness for readers: one table of all conditions, and a map of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from agents.evaluation.figures import save_figure
from agents.evaluation.results import markdown_text
from agents.files import write_file
from agents.play.metrics import summarize
from thermoe_env.problem.problem import Problem

BASELINE = "static"
"""Policy that the others are compared with, in the same condition."""
RATIO = f"j_per_good_vs_{BASELINE}"
FEWEST_SEEDS = 3
"""Below this many seeds no interval is given."""


@dataclass(frozen=True)
class Cell:
    """One policy under one condition."""

    not_played: str
    """Why it does not fit; empty where it was played."""
    episodes: list[dict[str, Any]]
    """Rows of `agents.play.metrics.episode_metrics`."""


@dataclass(frozen=True)
class Row:
    """One condition and its cells by policy, `BASELINE` first."""

    name: str
    title: str
    problem: Problem
    cells: dict[str, Cell]

    @cached_property
    def table(self) -> pd.DataFrame:
        """`agents.play.metrics.summarize`, one row per policy in order, with those that were not played."""
        episodes = pd.DataFrame([e for cell in self.cells.values() for e in cell.episodes])
        table = summarize(episodes, self.problem.scenario.feasible, BASELINE)
        table = table.set_index("policy").reindex(list(self.cells)).reset_index().fillna({"infeasible": ""})
        if episodes.seed.nunique() < FEWEST_SEEDS:
            table[[name for name in table if name.endswith(("_low", "_high"))]] = math.nan
        table.insert(0, "condition", self.name)
        table.insert(2, "not_played", [cell.not_played for cell in self.cells.values()])
        return table


def write_report(
    rows: Sequence[Row], folder: Path, scenario: str, seeds: Sequence[int], console: Console
) -> None:
    """Write robustness.csv, robustness.md and robustness.png, and say where they are."""
    table = pd.concat([row.table for row in rows], ignore_index=True)
    length_s = sorted({row.problem.scenario.episode_s for row in rows})
    scope = (
        f"simulated (twin), {rows[0].problem.twin.gpu}; policies made for scenario {scenario}; "
        f"{len(seeds)} seeds from {seeds[0]}; {', '.join(map(str, length_s))} s each"
    )
    write_file(folder / "robustness.csv", table.to_csv(index=False, float_format="%.9g"))
    save_figure(lambda: heatmap(rows, scope), folder / "robustness.png")
    write_file(folder / "robustness.md", _markdown(rows, scope, len(seeds)))
    console.print(f"{scope}\nresults: {folder}: robustness.md, .csv, .png", highlight=False, soft_wrap=True)


def heatmap(rows: Sequence[Row], scope: str) -> Figure:
    """Energy per good answer over that of `BASELINE`, a row per condition and a column per policy."""
    policies = list(rows[0].cells)
    ratio = np.array([row.table[RATIO].to_numpy(float) for row in rows])  # [conditions, policies]
    shades = np.ma.log2(np.ma.masked_invalid(ratio))
    reach = max(1.0, float(np.abs(shades.filled(0.0)).max()))
    figure = Figure(
        figsize=(max(6.0, 2.6 + 1.25 * len(policies)), 1.4 + 0.36 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(shades, cmap="RdBu_r", vmin=-reach, vmax=reach, alpha=0.6, aspect="auto")
    for (y, x), value in np.ndenumerate(ratio):
        refused, infeasible = rows[y].table.not_played[x], rows[y].table.infeasible[x]
        text = "does not fit" if refused else f"{value:.2f}" if math.isfinite(value) else "-"
        axes.text(x, y, text, ha="center", va="center", bbox={"fc": "white", "lw": 0, "alpha": 0.6, "pad": 1})
        if refused or infeasible:
            axes.fill_between(
                (x - 0.5, x + 0.5), y - 0.5, y + 0.5, fc="none", ec="#555555", lw=0, hatch="///"
            )
    axes.set_xticks(range(len(policies)), policies)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.grid(False)
    axes.set_title(
        f"energy per good answer over that of {BASELINE}; hatched: infeasible or not played", loc="right"
    )
    figure.suptitle(f"Robustness, {scope}", fontsize=8, wrap=True)
    return figure


def _markdown(rows: Sequence[Row], scope: str, seeds: int) -> str:
    policies = [name for name in rows[0].cells if name != BASELINE]
    few = f"no intervals below {FEWEST_SEEDS} seeds"
    lines = [
        "# Robustness", "", f"Written by `python -m studies.robustness`. {scope}.", "",
        f"Energy per good answer over that of `{BASELINE}` in the same condition, a ratio of means;",
        f"{few if seeds < FEWEST_SEEDS else 'in brackets 95% bootstrap intervals over paired seeds'}.",
        "*Infeasible*: below the quality floor, above the late fraction, over the virtual temperature limit.",
        "", f"| condition | {BASELINE}, mJ per good answer | {' | '.join(map(markdown_text, policies))} |",
        "|---" * (len(policies) + 2) + "|",
    ]  # fmt: skip
    remarks = []
    for row in rows:
        records = {record["policy"]: record for record in row.table.to_dict("records")}
        cells = [_text(records[BASELINE], "j_per_good", 1e3, 2)]
        cells += [_text(records[name], RATIO, 1.0, 3) for name in policies]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
        for name, record in records.items():
            for what, why in (("does not fit", record["not_played"]), ("infeasible", record["infeasible"])):
                remarks += [f"* {row.title}, {markdown_text(name)}: {what}: {why}"] if why else []
    if "best_constant" in policies:
        lines += ["", "`best_constant` is searched anew in each condition: what a fixed setting could reach."]
    if any(row.problem.scenario.traffic.trace for row in rows):
        lines += [
            "",
            "Episodes of a replayed trace overlap: intervals do not speak of other hours or services.",
        ]
    return "\n".join([*lines, "", *remarks, "", "![all conditions](robustness.png)", ""])


def _text(record: dict[str, Any], name: str, factor: float, digits: int) -> str:
    if record["not_played"]:
        return "does not fit"
    value, low, high = (f"{record[name + end] * factor:.{digits}f}" for end in ("", "_low", "_high"))
    text = value if low == "nan" else f"{value} ({low}-{high})"
    return f"{text}, *infeasible*" if record["infeasible"] else text
