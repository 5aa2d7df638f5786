"""The summary for readers: one table, on the screen and in a self-contained report.html."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from agents.files import write_file
from agents.play.metrics import KPIS
from moe.terminal import as_shown

_TABLE_WIDTH = 104
_WIDEST = 10_000


@dataclass(frozen=True)
class Column:
    """A column of the summary as readers see it."""

    head: str
    name: str
    factor: float = 1.0
    digits: int = 1
    interval: bool = False
    wide_only: bool = False
    """Left out on the screen, where room is short."""


@dataclass(frozen=True)
class Cell:
    """One shown value and, where the column has it, its interval."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One policy as shown; `reason` says why it is not ranked."""

    policy: str
    cells: tuple[Cell, ...]
    reason: str


@dataclass(frozen=True)
class Headline:
    """The best feasible policy in a few numbers."""

    policy: str
    energy: Cell
    unit: str
    facts: tuple[tuple[str, Cell], ...]
    """(name, value) of what else decides."""


def energy_column(table: pd.DataFrame) -> Column:
    """Energy per good answer, in the unit in which a table's numbers read well."""
    small = table.j_per_good.min() < 0.1
    return Column("mJ/good" if small else "J/good", "j_per_good", 1e3 if small else 1.0, 2, interval=True)


def columns(summary: pd.DataFrame, wide: bool) -> list[Column]:
    """What is shown, in units in which the numbers read well."""
    return [
        column
        for column in (
            energy_column(summary),
            Column("vs static", "j_per_good_vs_static", 1.0, 3, interval=True),
            Column("quality", "quality", 1.0, 3),
            Column("good/s", "goodput_rps", 1.0, 0),
            Column("late %", "late_fraction", 100.0, 2),
            Column("p50 s", "latency_p50_s", 1.0, 3, wide_only=True),
            Column("p95 s", "latency_p95_s", 1.0, 2),
            Column("p99 s", "latency_p99_s", 1.0, 2, wide_only=True),
            Column("energy kJ", "energy_j", 1e-3, 1, wide_only=True),
            Column("mean W", "mean_power_w", 1.0, 0, wide_only=True),
            Column("over budget kJ", "over_budget_j", 1e-3, 1, wide_only=True),
            Column("peak °C", "peak_c", 1.0, 1),
            Column("s above limit", "above_limit_s", 1.0, 1, wide_only=True),
            Column("s throttled", "throttled_s", 1.0, 1, wide_only=True),
            Column("expert entropy", "expert_entropy", 1.0, 3, wide_only=True),
            Column("TTT % of time", "ttt_time_share", 100.0, 1, wide_only=True),
            Column("return", "return", 1.0, 1),
        )
        if wide or not column.wide_only
    ]


def heads(summary: pd.DataFrame, wide: bool) -> list[str]:
    """Column heads."""
    return ["#", "policy", *(column.head for column in columns(summary, wide))]


def rows(summary: pd.DataFrame, wide: bool) -> list[Row]:
    """The summary as shown text."""
    shown = []
    for record in summary.to_dict("records"):
        cells = [Cell("-" if pd.isna(record["rank"]) else str(record["rank"])), Cell(str(record["policy"]))]
        cells += [_cell(record, column) for column in columns(summary, wide)]
        shown.append(Row(str(record["policy"]), tuple(cells), str(record["infeasible"])))
    return shown


def headline(summary: pd.DataFrame) -> Headline | None:
    """What to say first: the policy of rank 1, None where no policy is feasible."""
    best = summary.loc[summary["rank"] == 1, :]
    if not len(best):
        return None
    record = best.to_dict("records")[0]
    shown = {column.name: column for column in columns(summary, wide=False)}
    energy = shown["j_per_good"]
    facts = ("j_per_good_vs_static", "quality", "late_fraction", "peak_c")
    return Headline(
        str(record["policy"]),
        _cell(record, energy),
        energy.head.partition("/")[0],
        tuple((shown[name].head, _cell(record, shown[name])) for name in facts),
    )


def _cell(record: dict[Any, Any], column: Column) -> Cell:
    """A number as shown."""
    low, high = (number_text(record[f"{column.name}_{end}"], column) for end in ("low", "high"))
    interval = "" if not column.interval else "-" if "-" in (low, high) else f"{low}-{high}"
    return Cell(number_text(record[column.name], column), interval)


def number_text(value: float, column: Column) -> str:
    """A value in the column's unit and digits; "-" where there is none."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "∞"
    return f"{value * column.factor:.{column.digits}f}"


def wide_console() -> Console:
    """A console wide enough for the table: a narrow terminal wraps it, a file keeps it aligned.

    It takes text as it is: names come from folders, where brackets are no markup.
    """
    return Console(width=max(Console().width, _TABLE_WIDTH), markup=False, highlight=False)


def print_summary(summary: pd.DataFrame, console: Console) -> None:
    """Print the table, and below it why policies are not ranked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, head in enumerate(heads(summary, wide=False)):
        justify = "left" if i == 1 else "right"
        table.add_column(_shown(head, console), justify=justify, no_wrap=True)
    shown = rows(summary, wide=False)
    for row in shown:
        cells = []
        for cell in row.cells:
            text = _shown(cell.value, console)
            cells.append(text.append(f"\n{cell.interval}", "dim") if cell.interval else text)
        table.add_row(*cells, style="dim" if row.reason else None)
    # Of a table that is cut to a width, numbers lose digits: a terminal wraps what is too wide for it.
    table.width = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    console.print(table, crop=False)
    for row in shown:
        if row.reason:
            console.out(f"{row.policy}: infeasible, not ranked: {row.reason}", highlight=False)


def _shown(text: str, console: Console) -> Text:
    return Text(as_shown(text, console.encoding))


def write_report(
    folder: Path,
    title: str,
    scope: str,
    summary: pd.DataFrame,
    figures: Sequence[tuple[str, Path]],
    notes: Sequence[str] = (),
) -> Path:
    """Write report.html: headline, table, figures, notes, all in one file that can be sent alone.

    It asks for nothing outside of itself, runs no script, and is made for a phone first: one column, a table
    that scrolls in its box, figures that a tap enlarges (its test holds it to that).

    Args:
        folder: the run folder; its command.txt and versions.json are shown at the end.
        title: what was compared.
        scope: where the numbers come from, and over what.
        summary: as `agents.play.metrics.summarize` makes it.
        figures: (caption, PNG file).
        notes: what else the reader must know.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        title=title,
        scope=scope,
        headline=headline(summary),
        heads=heads(summary, wide=True),
        rows=rows(summary, wide=True),
        notes=notes,
        kpis=KPIS,
        figures=[
            {"caption": caption, "data": base64.b64encode(file.read_bytes()).decode()}
            for caption, file in figures
        ],
        command=(folder / "command.txt").read_text(encoding="utf-8"),
        versions=(folder / "versions.json").read_text(encoding="utf-8"),
    )
    path = folder / "report.html"
    write_file(path, html)
    return path
