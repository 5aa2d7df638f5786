"""The study of adaptation in the service for readers: tables, JSON and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.evaluation.figures import save_figure
from agents.files import write_file
from agents.play.rollout import Recording
from agents.policies.gates import GATES
from studies.ttt_service_figures import around_shift, find_changes, overview
from studies.ttt_service_results import (
    BASELINE,
    EXTRA,
    EXTRA_MEANING,
    INDICATORS,
    by_seed,
    compare,
    episode_rows,
    plain,
    price_steps,
)
from thermoe_env.problem.problem import Problem

AROUND_SHIFT = (BASELINE, "always", "change")
"""Policies whose course around a change of shift is drawn."""


@dataclass(frozen=True)
class Played:
    """A variant of the study and its episodes."""

    name: str
    title: str
    base: str
    """Policy whose other knobs the gates take."""
    problem: Problem
    recordings: list[Recording]

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Indicators per episode."""
        return pd.concat([episode_rows(r, self.problem) for r in self.recordings], ignore_index=True)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Comparison of the policies."""
        return compare(self.rows)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """What more good answers cost among the gates, which differ by adaptation alone."""
        return price_steps(self.rows, [gate for gate in GATES if gate in set(self.rows.policy)])


@dataclass(frozen=True)
class Column:
    """A column of the table as readers see it."""

    head: str
    name: str
    factor: float = 1.0
    digits: int = 1
    on_screen: bool = True


COLUMNS = (
    Column("adapts %", "adapting_share", 100.0, 0),
    Column("error %", "error", 100.0),
    Column("serve mJ/req", "serving_j_per_request", 1e3, 2),
    Column("adapt mJ/req", "adapting_j_per_request", 1e3, 2),
    Column("mJ per good", "j_per_good", 1e3, 2),
    Column("mJ per added good", EXTRA, 1e3, 2),
    Column("late %", "late_fraction", 100.0, 2),
    Column("peak °C", "peak_c"),
    Column("s above limit", "above_limit_s"),
    Column("over budget kJ", "over_budget_j", 1e-3, 1),
    Column("return", "return", 1.0, 0, on_screen=False),
)
DIFFERENCES = (
    Column("error, points", "error_diff", 100.0),
    Column("energy, kJ", "energy_j_diff", 1e-3, 2),
    Column("good answers, thousands", "good_diff", 1e-3, 0),
    Column("late, points", "late_fraction_diff", 100.0, 2),
    Column("peak, °C", "peak_c_diff"),
    Column("above limit, s", "above_limit_s_diff"),
    Column("over budget, kJ", "over_budget_j_diff", 1e-3, 2),
)


def write_report(results: Sequence[Played], folder: Path, notes: Sequence[str], console: Console) -> None:
    """Write report.md, results.json, episodes.csv and the figures, and print the tables."""
    scope = _scope(results[0])
    figures = _figures(results, folder)
    rows = pd.concat([result.rows.assign(variant=result.name) for result in results])
    write_file(folder / "episodes.csv", rows.to_csv(index=False))
    comparisons = {
        result.name: {
            "title": result.title,
            "base": result.base,
            "limit_c": result.problem.limit_c,
            "policies": plain(result.table),
            "steps": plain(result.steps),
        }
        for result in results
    }
    meanings = {**INDICATORS, EXTRA: EXTRA_MEANING}
    record = {"origin": scope, "baseline": BASELINE, "indicators": meanings, "variants": comparisons}
    write_file(folder / "results.json", json.dumps(record, indent=1) + "\n")
    write_file(folder / "report.md", _markdown(results, scope, figures, notes))
    console.print(scope, highlight=False)
    for result in results:
        console.print(_heading(result), highlight=False, style="bold")
        console.print(_screen(result.table))
        console.print(_ladder(result), highlight=False)
    for note in notes:
        console.print(note, highlight=False)
    written = ["report.md", "results.json", "episodes.csv", *(path.name for _, path in figures)]
    console.print(f"wrote to {folder}: {', '.join(written)}", highlight=False)


def _scope(first: Played) -> str:
    """Where the numbers come from."""
    scenario = first.problem.scenario
    seeds = f"{first.rows.seed.nunique()} paired seeds from {first.rows.seed.min()}"
    return f"{first.recordings[0].origin}; scenario {scenario.name}; {seeds}, {scenario.episode_s} s each"


def _heading(result: Played) -> str:
    limit = f"virtual limit {result.problem.limit_c:g} °C"
    return f"{result.name}: {result.title}; other knobs of {result.base}, {limit}"


def _figures(results: Sequence[Played], folder: Path) -> list[tuple[str, Path]]:
    """Draw all; (caption, file)."""
    origin = results[0].recordings[0].origin
    tables, titles = {r.name: r.table for r in results}, {r.name: r.title for r in results}
    draw = lambda: overview(tables, titles, origin)  # noqa: E731
    figures = [("The policies in all variants", save_figure(draw, folder / "overview.png"))]
    for result in results:
        played = by_seed(r for r in result.recordings if r.policy in AROUND_SHIFT)
        episodes = {name: played[name] for name in AROUND_SHIFT if name in played}
        changes = find_changes(episodes)
        if changes:
            limit_c = result.problem.limit_c
            where = f"{origin}; {result.title}"
            path = folder / f"shift-{result.name}.png"
            save_figure(lambda e=episodes, c=changes, t=limit_c, w=where: around_shift(e, c, t, w), path)
            figures.append((f"Around a change of shift: {result.title}", path))
    return figures


def _markdown(
    results: Sequence[Played], scope: str, figures: Sequence[tuple[str, Path]], notes: Sequence[str]
) -> str:
    lines = [
        "# When is adaptation worth its energy", "",
        f"Written by `python -m studies.ttt_service`. Numbers: {scope}.", "",
        "Means with 95% Student intervals over seeds; differences are paired by seed. Temperature limits are",
        "virtual: the scenario sets them, far below the hardware's.", "", *notes, "",
    ]  # fmt: skip
    for result in results:
        lines += [f"## {_heading(result)}", "", *markdown_rows(COLUMNS, result.table), ""]
        others = result.table.loc[result.table.policy != BASELINE, :]
        lines += [f"Less `{BASELINE}`:", "", *markdown_rows(DIFFERENCES, others), "", _ladder(result), ""]
    lines += ["Columns:", "", *(f"* `{name}`: {meaning}" for name, meaning in INDICATORS.items())]
    lines += [f"* `{EXTRA}`: {EXTRA_MEANING}", ""]
    lines += [f"![{caption}]({path.name})" for caption, path in figures]
    return "\n".join(lines) + "\n"


def _ladder(result: Played) -> str:
    """What more good answers cost, from gate to gate."""
    steps = [
        f"{step['before']} to {step['policy']} {_text(step, Column('', EXTRA, 1e3, 2))}"
        for step in result.steps.to_dict("records")
    ]
    return f"mJ per added good answer, from gate to gate: {', '.join(steps) or 'no gate gives more'}."


def markdown_rows(columns: Sequence[Column], table: pd.DataFrame) -> list[str]:
    """A table of policies in Markdown: means and half the width of their intervals."""
    lines = [f"| policy | {' | '.join(c.head for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in table.to_dict("records"):
        lines.append(f"| {row['policy']} | {' | '.join(_text(row, column) for column in columns)} |")
    return lines


def _screen(table: pd.DataFrame) -> Table:
    """The table for the screen, where a line is too short for intervals beside the means."""
    columns = [column for column in COLUMNS if column.on_screen]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("policy", no_wrap=True)
    for column in columns:
        shown.add_column(column.head, justify="right")
    for row in table.to_dict("records"):
        texts = [_text(row, column).partition(" ±") for column in columns]
        cells = [Text(mean).append(half and f"\n±{half}", "dim") for mean, _, half in texts]
        shown.add_row(Text(row["policy"]), *cells)
    return shown


def _text(row: dict[str, Any], column: Column) -> str:
    """Mean and half the width of its interval, as shown."""
    value, high = (row[f"{column.name}{end}"] * column.factor for end in ("", "_high"))
    if not math.isfinite(value):
        return "-"
    half = high - value
    return f"{value:.{column.digits}f}" + (f" ±{half:.{column.digits}f}" if half > 0.0 else "")
