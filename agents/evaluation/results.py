"""Results that a paper can take: statistics over units, and one table as CSV, Markdown and LaTeX."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.evaluation.report import Column, energy_column, number_text
from agents.files import write_file
from agents.play.metrics import KPIS
from agents.play.statistics import MIN_UNITS, bootstrap_interval, iqm, pair, per_unit, unit_name


def statistics_table(episodes: pd.DataFrame, baseline: str = "static") -> pd.DataFrame:
    """Every indicator of every policy over its units, alone and beside a baseline.

    Args:
        episodes: rows of `agents.play.metrics.episode_metrics`, all policies; those cut short are left out.
        baseline: one of the policies.

    Returns:
        A row per policy and indicator: interquartile mean `iqm`; `ratio` and `difference` to the baseline on
        the seeds that both played, interquartile means of the paired ones; `p_lower`, the probability that
        the policy's value is below the baseline's. Each with its 95% interval (`_low`, `_high`), which is NaN
        for fewer than `MIN_UNITS` units. A ratio is NaN where a value of the baseline is not positive, and
        what compares is NaN for the baseline itself.
    """
    whole: Any = episodes[episodes.whole]
    base, names = whole[whole.policy == baseline], list(KPIS)
    tables = []
    for policy in episodes.policy.unique():
        own = whole[whole.policy == policy]
        values, both = per_unit(own, names), pair(own, base, names)
        columns: dict[str, Any] = {
            "policy": policy, "indicator": names, "unit": unit_name(own), "units": len(values),
            **_with_interval("iqm", iqm(values), *bootstrap_interval(iqm, values)), "baseline": baseline,
        }  # fmt: skip
        positive = (both.base > 0.0).all(0)
        columns |= _with_interval("ratio", *(np.where(positive, x, np.nan) for x in both.compare(np.divide)))
        columns |= _with_interval("difference", *both.compare(np.subtract))
        columns |= _with_interval("p_lower", *both.probability_lower())
        table = pd.DataFrame(columns)
        if policy == baseline:
            compared = [name for name in table if name.startswith(("ratio", "difference", "p_lower"))]
            table[compared] = np.nan
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _with_interval(name: str, value: Any, low: Any, high: Any) -> dict[str, Any]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def ratios_to_static(episodes: pd.DataFrame) -> dict[str, np.ndarray]:
    """Energy per good answer over that of `static` on the same requests, [units] per other policy."""
    whole: Any = episodes[episodes.whole]
    base = whole[whole.policy == "static"]
    ratios = {}
    for policy in whole.policy.unique():
        both = pair(whole[whole.policy == policy], base, ["j_per_good"])
        if policy != "static" and len(both.own):
            with np.errstate(invalid="ignore"):  # infinite over infinite
                ratios[policy] = (both.own / both.base)[:, 0]
    return ratios


def results_table(summary: pd.DataFrame, statistics: pd.DataFrame) -> pd.DataFrame:
    """One row per policy, in the order of the summary.

    Args:
        summary: as `summarize` makes it: ranks, and the means that feasibility is judged by.
        statistics: rows of `statistics_table` against `static` and, where it is another, a chosen baseline.

    Returns:
        Interquartile means with intervals of energy per good answer (J), of its ratio to that of `static`,
        and of the return; means of quality, late fraction, peak temperature (degC) and time above the limit
        (s); the probability that the energy per good answer is below the baseline's (the last one in
        `statistics`); why the policy is infeasible, empty when it is not.
    """
    baseline = statistics.baseline.iloc[-1]
    by = statistics.set_index(["baseline", "policy", "indicator"]).sort_index()
    rows = []
    for record in summary.to_dict("records"):
        policy = record["policy"]
        energy: Any = by.loc[("static", policy, "j_per_good")]
        rival: Any = by.loc[(baseline, policy, "j_per_good")]
        row = {name: record[name] for name in ("policy", "rank", "unit", "units")}
        for name, source, column in (
            ("j_per_good", energy, "iqm"),
            ("vs_static", energy, "ratio"),
            ("return", by.loc[("static", policy, "return")], "iqm"),
            ("p_improvement", rival, "p_lower"),
        ):
            row |= {f"{name}{end}": source[f"{column}{end}"] for end in ("", "_low", "_high")}
        row |= {name: record[name] for name in ("quality", "late_fraction", "peak_c", "above_limit_s")}
        rows.append({**row, "baseline": baseline, "infeasible": record["infeasible"]})
    return pd.DataFrame(rows)


def unit_notes(summary: pd.DataFrame) -> list[str]:
    """What the units are, and which policies have too few for an interval."""
    notes = []
    for unit, rows in summary.groupby("unit"):
        counts = ", ".join(f"{policy} {units}" for policy, units in zip(rows.policy, rows.units, strict=True))
        notes.append(f"Unit of replication: {unit} ({counts}).")
    few = summary[summary.units < MIN_UNITS]
    if len(few):
        notes.append(
            f"No intervals for {', '.join(few.policy)}: they take at least {MIN_UNITS} units, "
            "more --seeds of the evaluation or of the training."
        )
    return notes


def write_results(folder: Path, table: pd.DataFrame, scope: str, notes: list[str]) -> None:
    """Write results.csv (SI units), results.md and results.tex (needs the package booktabs).

    Args:
        folder: where they go.
        table: as `results_table` makes it.
        scope: where the numbers come from, and over what.
        notes: what else the reader must know.
    """
    caption = [
        f"{scope}.",
        "Energy per good answer, its ratio to that of static on the same requests, and the return are "
        "interquartile means over units, [95% bootstrap interval]; the other columns are means, by which "
        "feasibility is judged.",
        f"P(improvement): probability of less energy per good answer than {table.baseline.iloc[0]} on the "
        "same requests, ties half, [95% interval].",
        *notes,
    ]
    head, body = _cells(table)
    write_file(folder / "results.csv", table.to_csv(index=False, float_format="%.9g"))
    write_file(folder / "results.md", _markdown(head, body, caption))
    write_file(folder / "results.tex", _latex(head, body, caption))


def _cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of text."""
    columns = (
        energy_column(table),
        Column("vs static", "vs_static", 1.0, 3, interval=True),
        Column("quality", "quality", 1.0, 3),
        Column("late %", "late_fraction", 100.0, 2),
        Column("peak °C", "peak_c", 1.0, 1),
        Column("s above limit", "above_limit_s", 1.0, 1),
        Column("return", "return", 1.0, 1, interval=True),
        Column("P(improvement)", "p_improvement", 1.0, 2, interval=True),
    )
    body = []
    for record in table.to_dict("records"):
        cells = [str(record["policy"]), f"{record['units']} {record['unit']}s"]
        cells += [_cell(record, column) for column in columns]
        body.append([*cells, record["infeasible"] or "yes"])
    return ["policy", "units", *(column.head for column in columns), "feasible"], body


def _cell(record: dict[Any, Any], column: Column) -> str:
    value = number_text(record[column.name], column)
    if not column.interval or math.isnan(record[column.name]):
        return value
    low, high = (number_text(record[f"{column.name}_{end}"], column) for end in ("low", "high"))
    return f"{value} [-]" if "-" in (low, high) else f"{value} [{low}, {high}]"


def _markdown(head: list[str], body: list[list[str]], caption: list[str]) -> str:
    rule = ["---", "---", *["---:"] * (len(head) - 3), "---"]
    cells = [head, rule, *([markdown_text(text) for text in row] for row in body)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in cells), "", *map(markdown_text, caption)]) + "\n"


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\|<&`*"})


def markdown_text(text: str) -> str:
    """Text as Markdown shows it: no HTML, no further cell, no link; intervals keep their brackets."""
    return text.translate(_MARKDOWN).replace("](", "]\\(")


_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "°": r"\textdegree{}",
    "∞": r"$\infty$", "<": r"\textless{}", ">": r"\textgreater{}", **{c: f"\\{c}" for c in "&%$#_{}"},
})  # fmt: skip


def latex_text(text: str) -> str:
    """Text as LaTeX sets it. Brackets are wrapped: after a line's end they would be taken for a length."""
    return text.translate(_LATEX).replace("[", "{[}").replace("]", "{]}")


def _latex(head: list[str], body: list[list[str]], caption: list[str]) -> str:
    rows = [" & ".join(latex_text(text) for text in row) + r" \\" for row in (head, *body)]
    return "\n".join([
        "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\caption{{{latex_text(' '.join(caption))}}}", rf"\begin{{tabular}}{{ll{'r' * (len(head) - 3)}l}}",
        r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip
