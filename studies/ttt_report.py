"""Tables, claims and figures of the study of test-time training, from the repeats that are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from agents.files import write_file
from studies.repeats import markdown_table, origin, select, shown, summarize
from studies.ttt_config import NEVER
from studies.ttt_figures import write_figures
from studies.ttt_meter import PHASES
from studies.ttt_results import (
    COST_LABELS,
    METRICS,
    RUN,
    budget_curves,
    cost_unit,
    norm_streams,
    recovered_table,
    runs_table,
    shifts_table,
)

ALWAYS = {"gate": "always", "budget": math.inf}


def write_report(repeats: Sequence[dict[str, Any]], folder: Path, console: Console) -> None:
    """Write runs.csv (every repeat), summary.csv, shifts.csv, recovered.csv, report.md and the figures.

    Args:
        repeats: As `studies.ttt` writes them, one or two tasks of one size.
        folder: Where all goes.
        console: Where the claims are printed.

    Raises:
        StudyError: Some repeats have an energy meter and some have none.
    """
    unit = cost_unit(repeats)
    runs, shifts = runs_table(repeats), shifts_table(repeats)
    recovered = recovered_table(repeats, shifts)
    summary = summarize(runs, RUN, METRICS)
    by_shift = summarize(shifts, [*RUN, "shift", "visit"], ("quality", "gain"))
    by_norm = summarize(recovered, RUN, ("lost", "recovered")) if len(recovered) else recovered
    tables = {"runs": runs, "summary": summary, "shifts": by_shift, "recovered": by_norm}
    for name, table in tables.items():
        write_file(folder / f"{name}.csv", table.to_csv(index=False))
    found = claims(repeats, summary, by_shift, by_norm)
    text = _markdown(repeats, found, summary, by_shift, by_norm, unit)
    write_file(folder / "report.md", text)
    figures = write_figures(folder, repeats, summary, unit, origin(repeats))
    console.print(f"{origin(repeats)}; cost: {COST_LABELS[unit]}", highlight=False)
    console.print(Markdown("\n".join(f"* {claim}" for claim in found)))
    written = [*(f"{name}.csv" for name in tables), "report.md", *(path.name for path in figures)]
    console.print(f"wrote to {folder}: {', '.join(written)}", highlight=False)


def claims(
    repeats: Sequence[dict[str, Any]], summary: pd.DataFrame, by_shift: pd.DataFrame, by_norm: pd.DataFrame
) -> list[str]:
    """What the study was asked, answered by numbers."""
    found = []
    for row in _rows(by_norm, adaptation="tent", norm="batch", guarded=True, **ALWAYS):
        found.append(
            f"TENT on batch norm brings back {shown(row, 'recovered', 100, '%')} of the accuracy that "
            f"corruptions cost, {shown(row, 'lost', 1, ' points')}, mean over the kinds of {row['stream']}."
        )
    for row in _rows(by_norm, adaptation="tent", guarded=True, **ALWAYS):
        (before,) = _rows(summary, stream=row["stream"], norm=row["norm"], adaptation=NEVER)
        (after,) = _rows(summary, **{name: row[name] for name in RUN})
        found.append(
            f"Norm {row['norm']}: accuracy {shown(before, 'quality', 100, '%')} without adaptation, "
            f"{shown(after, 'quality', 100, '%')} with TENT, for {shown(after, 'adapt_ratio', 100, '%')} of "
            "the serving cost."
        )
    for shared, group in budget_curves(summary):
        for gate in group["gate"].unique():
            own = select(group, gate=gate).sort_values("budget").to_dict("records")
            unit = " points" if shared["task"] == "vision" else "%"
            steps = ", ".join(f"{_limit(row['budget'])}: {shown(row, 'gain', 1, unit, '+')}" for row in own)
            found.append(
                f"Gain of {shared['adaptation']} by budget on {shared['stream']}, gate {gate}: {steps}."
            )
    for name in _correlated(repeats):
        for row in _rows(summary, task="vision", stream=name, **ALWAYS):
            watched = "guarded" if row["guarded"] else "unguarded"
            found.append(
                f"Labels that come together ({name}): {row['adaptation']}, {watched}, ends "
                f"{shown(row, 'gain', 1, ' points', '+')} from not adapting."
            )
    for shift, said in (("code", "code"), ("clean", "prose")):
        rows = _rows(by_shift, task="language", shift=shift, **ALWAYS)
        for adaptation in dict.fromkeys(row["adaptation"] for row in rows):
            own = [shown(row, "gain", 1, "%", "+") for row in rows if row["adaptation"] == adaptation]
            found.append(f"Text, {adaptation}: bits per byte saved on {said}, by visit: {', '.join(own)}.")
    if "metered_ratio" in summary:
        ratio = 100 * summary["metered_ratio"].to_numpy()
        found.append(
            f"The phases' energies add up to {ratio.mean():.1f}% of the energy counter's, "
            f"{ratio.min():.1f} to {ratio.max():.1f}% over the runs."
        )
    return found


def _markdown(
    repeats: Sequence[dict[str, Any]],
    found: Sequence[str],
    summary: pd.DataFrame,
    by_shift: pd.DataFrame,
    by_norm: pd.DataFrame,
    unit: str,
) -> str:
    """The claims and the tables behind them, as a document beside the figures."""
    dates = sorted(repeat["date"][:10] for repeat in repeats)
    factor, prefix = (1e3, "m") if unit == "J" else (1e6, "µ")
    cost = f"{prefix}{unit} per request"
    shipped = sorted({r["task"] for r in repeats for m in r["models"].values() if m["recipe"] is None})
    lines = [
        "# Test-time training under an energy budget", "",
        f"Written by `python -m studies.ttt`. {origin(repeats)}; {dates[0]} to {dates[-1]}; torch "
        f"{repeats[0]['torch']}. Cost: {COST_LABELS[unit]}. 95% intervals over repeats. Every batch is "
        "scored before it is learned from.", "",
        *(f"All repeats of {task} use the shipped model and differ in their stream.\n" for task in shipped),
        *(f"* {claim}" for claim in found), "",
    ]  # fmt: skip
    if len(by_norm):
        lines += [
            "## Methods and norms under corruptions",
            "",
            *(["![norms](norms.png)", ""] if norm_streams(summary) else []),
            *_norms(summary, by_norm, factor, cost),
        ]
    if _correlated(repeats):
        lines += ["## Guards where labels come together", "", "![guards](guards.png)", ""]
        lines += _guards(summary, _correlated(repeats))
    language = _where(by_shift, task="language", **ALWAYS)
    if len(language):
        lines += ["## Text", "", *_text_table(language)]
    if budget_curves(summary):
        lines += ["## Gain against budget", "", "![budgets](budgets.png)", "", _BUDGET_NOTE[unit], ""]
        lines += _budgets(summary)
    lines += ["## Cost by phase", "", *_costs(summary, factor, cost)]
    lines += ["![along the stream](stream.png)", ""]
    return "\n".join(lines)


_BUDGET_NOTE = {
    "J": "Budgets are counted in measured joules. What was spent may be less than the budget allows.",
    "s": "Budgets are counted in operations of matrix products, which do not vary from run to run as time "
    "does; what was spent, in device time, may therefore be more or less than the budget.",
}


def _norms(summary: pd.DataFrame, by_norm: pd.DataFrame, factor: float, cost: str) -> list[str]:
    heads = (
        "norm", "adaptation", "accuracy, %", "gain, points", "of the loss, %", "adapting / serving, %",
        f"{cost} and point gained",
    )  # fmt: skip
    rows = []
    for found in by_norm.to_dict("records"):
        (row,) = _rows(summary, **{name: found[name] for name in RUN})
        rows.append((
            row["norm"], row["adaptation"], shown(row, "quality", 100), shown(row, "gain", 1, "", "+"),
            shown(found, "recovered", 100), shown(row, "adapt_ratio", 100),
            shown(row, "cost_per_gain", factor, digits=2),
        ))  # fmt: skip
    return markdown_table(heads, rows)


def _guards(summary: pd.DataFrame, streams: Sequence[str]) -> list[str]:
    heads = (
        "stream", "adaptation", "guard", "against not adapting, points", "batches learned, %", "rollbacks",
        "left out as poison",
    )  # fmt: skip
    rows = [
        (
            row["stream"], row["adaptation"], "on" if row["guarded"] else "off",
            shown(row, "gain", 1, "", "+"), shown(row, "adapted_share", 100),
            *(shown(row, name) if row["guarded"] else "-" for name in ("rollbacks", "poisoned")),
        )
        for stream in streams
        for row in _rows(summary, stream=stream, **ALWAYS)
    ]  # fmt: skip
    return markdown_table(heads, rows)


def _text_table(language: pd.DataFrame) -> list[str]:
    rows = [
        (
            row["adaptation"], "prose" if row["shift"] == "clean" else row["shift"], row["visit"] + 1,
            shown(row, "quality", 1, digits=3), shown(row, "gain", 1, "", "+", 2),
        )
        for row in language.to_dict("records")
    ]  # fmt: skip
    return markdown_table(("adapts", "text", "visit", "bits per byte", "saved, %"), rows)


def _budgets(summary: pd.DataFrame) -> list[str]:
    rows = []
    for shared, group in budget_curves(summary):
        for row in group.to_dict("records"):
            rows.append((
                shared["stream"], shared["adaptation"], row["gate"], _limit(row["budget"]),
                shown(row, "gain", 1, "", "+", 2), shown(row, "adapt_ratio", 100),
                shown(row, "adapted_share", 100), shown(row, "refused"),
            ))  # fmt: skip
    heads = (
        "stream", "adapts", "gate", "budget, of serving", "gain (points, or % of bits)",
        "adapting / serving, %", "batches learned, %", "steps refused",
    )  # fmt: skip
    return markdown_table(heads, rows)


def _limit(budget: float) -> str:
    return "no limit" if math.isinf(budget) else f"{100 * budget:g}%"


def _costs(summary: pd.DataFrame, factor: float, cost: str) -> list[str]:
    table = pd.concat([_where(summary, adaptation=NEVER), _where(summary, **ALWAYS)])
    rows = [
        (
            row["stream"], row["norm"], row["adaptation"], "on" if row["guarded"] else "off",
            *(shown(row, f"{phase}_cost", factor) for phase in PHASES), shown(row, "metered_ratio", 100),
        )
        for row in table.to_dict("records")
    ]  # fmt: skip
    heads = ("stream", "norm", "adapts", "guard", *(p.replace("_", " ") for p in PHASES), "of the counter, %")
    return [f"In {cost}; `host` is the device waiting between phases.", "", *markdown_table(heads, rows)]


def _correlated(repeats: Sequence[dict[str, Any]]) -> list[str]:
    """Streams in which like labels come together."""
    streams = {n: s for repeat in repeats for n, s in repeat["settings"]["streams"].items()}
    return [name for name, stream in streams.items() if stream["schedule"] == "label_correlated"]


def _where(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    return select(table, **values) if len(table) else table


def _rows(table: pd.DataFrame, **values: object) -> list[dict[str, Any]]:
    return _where(table, **values).to_dict("records")
