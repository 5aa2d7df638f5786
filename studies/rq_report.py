"""What the questions' reports share: paired changes in words, and report.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents.evaluation.figures import save_figure
from agents.files import write_file
from agents.play.metrics import student_interval
from studies.repeats import range_text, summarize
from studies.ttt_service_report import Column, markdown_rows
from studies.ttt_service_results import ratio_interval

COLUMNS = (
    Column("mJ per good", "j_per_good", 1e3, 2),
    Column("quality %", "quality", 100.0, 1),
    Column("good per s", "goodput_rps", 1.0, 0),
    Column("p95 ms", "latency_p95_s", 1e3, 0),
    Column("p99 ms", "latency_p99_s", 1e3, 0),
    Column("late %", "late_fraction", 100.0, 2),
    Column("mean W", "mean_power_w", 1.0, 0),
    Column("peak °C", "peak_c", 1.0, 1),
    Column("s above limit", "above_limit_s", 1.0, 1),
    Column("over budget kJ", "over_budget_j", 1e-3, 1),
)
"""What a table of plays shows."""
METRICS = (
    *(column.name for column in COLUMNS), "temp_sd_c", "device_spread_c", "expert_entropy",
    "load_imbalance", "stage_bits", "narrow_share", "error", "serving_j_per_request",
    "adapting_j_per_request", "adapting_share", "return",
)  # fmt: skip
FRONT = ("j_per_good", "error", "latency_p95_s")
"""The three that a policy trades against each other; lower is better."""


@dataclass(frozen=True)
class Findings:
    """A study's answer and what it rests on."""

    question: str
    answer: Sequence[str]
    """Sentences, made from the numbers."""
    origin: str
    """Where the numbers come from: machine, dates, seeds, world."""
    tables: Sequence[tuple[str, Sequence[str]]]
    """(caption, lines of Markdown)."""
    figures: Sequence[tuple[str, str, Callable[[], Figure]]]
    """(caption, file name without suffix, how to draw it)."""
    notes: Sequence[str] = field(default_factory=list)
    episodes: pd.DataFrame | None = None
    """Indicators per episode, summarised in summary.csv."""


class Change(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0.0 or self.high < 0.0

    def text(self, factor: float, unit: str, digits: int = 1, sign: str = "+") -> str:
        """To read."""
        return range_text(*self, factor, unit, sign, digits)


def relative(episodes: pd.DataFrame, policy: str, base: str, name: str = "j_per_good") -> Change:
    """Ratio of the means of an indicator less 1, over paired seeds (`ratio_interval`)."""
    own, other = _pairs(episodes, policy, base, name)
    return Change(*(value - 1.0 for value in ratio_interval(own, other)))


def difference(episodes: pd.DataFrame, policy: str, base: str, name: str) -> Change:
    """Mean of the paired differences of an indicator, with Student's interval."""
    own, other = _pairs(episodes, policy, base, name)
    return Change(*student_interval(own - other))


def _pairs(episodes: pd.DataFrame, policy: str, base: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    tables = [episodes.loc[episodes.policy == label].set_index("seed")[name] for label in (policy, base)]
    seeds = tables[0].index.intersection(tables[1].index)
    return tables[0].loc[seeds].to_numpy(), tables[1].loc[seeds].to_numpy()


def trade(episodes: pd.DataFrame, policy: str, base: str) -> str:
    """Energy per good answer and quality against a base, in words."""
    energy = relative(episodes, policy, base).text(100.0, "%")
    quality = difference(episodes, policy, base, "quality").text(100.0, " points")
    return f"{energy} energy per good answer, quality {quality}"


def summary_of(episodes: pd.DataFrame) -> pd.DataFrame:
    """Means and 95% Student intervals over seeds, a row per play."""
    return summarize(episodes, ["policy"], METRICS)


def of_variant(summary: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of the plays called `<variant>-...`, without that part of their names."""
    own = summary[summary.policy.str.startswith(f"{variant}-")]
    return own.assign(policy=own.policy.str.removeprefix(f"{variant}-"))


def non_dominated(costs: np.ndarray) -> np.ndarray:
    """Rows than which no other is at least as low in every column and lower in one, bool [n].

    Args:
        costs: [n, d], lower is better; a row with what is not finite is dominated.
    """
    as_low = np.all(costs[None] <= costs[:, None], axis=-1)  # [n, others]
    lower = np.any(costs[None] < costs[:, None], axis=-1)
    return ~np.any(as_low & lower, axis=1) & np.isfinite(costs).all(axis=1)


def plays_table(summary: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> list[str]:
    """A table of plays in Markdown; a star marks those on the front of energy, error and latency."""
    on_front = non_dominated(summary[list(FRONT)].to_numpy())
    starred = summary.assign(policy=summary.policy + np.where(on_front, " \\*", ""))
    return markdown_rows(columns, starred)


def origin_of(results: dict[str, dict[str, Any]]) -> str:
    """Machines, dates, world and seeds of some plays."""
    machines, dates, origins = (
        ", ".join(sorted({result[key] for result in results.values()}))
        for key in ("machine", "date", "origin")
    )
    first = next(iter(results.values()))["settings"]
    seeds, length = first["seeds"], first["scenario"]["episode_s"]
    return (
        f"{origins}; energies, powers, temperatures and latencies are the twin's, none was measured. Played "
        f"on {machines}, {dates}; {len(seeds)} paired seeds from {seeds[0]}, {length} s each. Temperature "
        "limits are virtual: the scenario sets them, far below the hardware's"
    )


def write_findings(findings: Findings, folder: Path, command: str) -> None:
    """Write report.md, the figures and, where there are plays, summary.csv."""
    pictures = []
    for caption, name, draw in findings.figures:
        save_figure(draw, folder / f"{name}.png")
        pictures += [f"![{caption}]({name}.png)", "", f"*{caption}*", ""]
    tables = [line for caption, rows in findings.tables for line in (f"## {caption}", "", *rows, "")]
    lines = [
        f"# {findings.question}", "", *(line for s in findings.answer for line in (s, "")),
        f"Written by `{command}`. Numbers: {findings.origin}. 95% Student intervals over seeds; changes are "
        "paired by seed.", "", *(line for note in findings.notes for line in (note, "")), *pictures, *tables,
    ]  # fmt: skip
    write_file(folder / "report.md", "\n".join(lines).rstrip() + "\n")
    if findings.episodes is not None:
        table = summary_of(findings.episodes).to_csv(index=False, float_format="%.6g")
        write_file(folder / "summary.csv", table)
