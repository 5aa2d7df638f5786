"""Tables, claims and figures of the routing study, from the repeats that are there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from agents.files import write_file
from studies.repeats import origin, range_text, select, summarize
from studies.routing_figures import write_figures
from studies.routing_results import (
    CELL,
    COST_LABELS,
    ENERGY,
    METRICS,
    ROUTING_METRICS,
    Claim,
    cells_table,
    claims,
    cost_metric,
    routing_table,
)

CLAIM_HEADS = ("task", "question", "reference", "ours", "saving", "quality, points", "expected")


def write_report(repeats: Sequence[dict[str, Any]], margin: float, folder: Path, console: Console) -> None:
    """Write cells.csv (every repeat), summary.csv, routing.csv, claims.json and the figures; print claims.

    Args:
        repeats: as `studies.routing` writes them, one or two tasks of one size.
        margin: quality that a cheaper setting may give up.
        folder: where all goes.
        console: where the claims are printed.

    Raises:
        StudyError: Some repeats have an energy meter and some have none.
    """
    cells, routing = cells_table(repeats), routing_table(repeats)
    metric = cost_metric(cells)
    summary = summarize(cells, CELL, METRICS)
    routing_summary = summarize(routing, [*CELL, "inputs"], ROUTING_METRICS)
    settings = {repeat["task"]: repeat["settings"] for repeat in repeats}
    found = [c for task, own in settings.items() for c in claims(select(cells, task=task), own, margin)]
    tables = {"cells": cells, "summary": summary, "routing": routing_summary}
    for name, table in tables.items():
        write_file(folder / f"{name}.csv", table.to_csv(index=False))
    write_file(folder / "claims.json", json.dumps([_plain(claim) for claim in found], indent=1) + "\n")
    write_file(folder / "report.md", _markdown(repeats, found, summary, metric))
    figures = write_figures(folder, repeats, summary, routing_summary, metric, origin(repeats))
    console.print(f"{origin(repeats)}; cost: {COST_LABELS[metric]}", highlight=False)
    console.print(_claims_table(found))
    written = [
        *(f"{name}.csv" for name in tables),
        "claims.json",
        "report.md",
        *(path.name for path in figures),
    ]
    console.print(f"wrote to {folder}: {', '.join(written)}", highlight=False)


def _plain(claim: Claim) -> dict[str, Any]:
    """Fields as JSON has them: no number is null."""
    values = dataclasses.asdict(claim)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _markdown(
    repeats: Sequence[dict[str, Any]], found: Sequence[Claim], summary: pd.DataFrame, metric: str
) -> str:
    """The claims, and every setting without bias, as a document beside the figures."""
    dates = sorted(repeat["date"][:10] for repeat in repeats)
    lines = [
        "# Routing study", "",
        f"Written by `python -m studies.routing`. {origin(repeats)}; {dates[0]} to {dates[-1]}; torch "
        f"{repeats[0]['torch']}. Cost: {COST_LABELS[metric]}. 95% intervals over repeats.", "",
        "![fronts](pareto.png)", "", "| " + " | ".join(CLAIM_HEADS) + " |", "|---" * len(CLAIM_HEADS) + "|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(claim_row(claim)) + " |" for claim in found]
    unit, factor = ("µJ", 1e6) if metric == ENERGY else ("µs", 1e6)
    heads = ("task", "variant", "k", f"{unit} per token", "quality, %", "ms per micro-batch")
    lines += ["", "Without routing bias:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in select(summary, routing_bias=0.0).to_dict("records"):
        ranges = [
            range_text(row[name], row[f"{name}_low"], row[f"{name}_high"], scale, "")
            for name, scale in ((metric, factor), ("accuracy", 100), ("latency_s", 1e3))
        ]
        lines.append(f"| {row['task']} | {row['variant']} | {row['expert_count']} | {' | '.join(ranges)} |")
    return "\n".join(lines) + "\n"


def claim_row(claim: Claim) -> list[str]:
    """A claim as shown, under `CLAIM_HEADS`."""
    saving = range_text(claim.saving, claim.saving_low, claim.saving_high, 100, "%")
    change = range_text(
        claim.quality_change, claim.quality_change_low, claim.quality_change_high, 100, "", "+"
    )
    verdict = "" if claim.met is None else f"≥ {claim.expected:.0%}: {'met' if claim.met else 'not met'}"
    return [claim.task, claim.question, _short(claim.reference), _short(claim.ours), saving, change, verdict]


def _claims_table(found: Sequence[Claim]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in CLAIM_HEADS:
        table.add_column(head, overflow="fold")
    for claim in found:
        style = None if claim.met is None else "green" if claim.met else "red"
        table.add_row(*claim_row(claim), style=style)
    return table


def _short(side: str) -> str:
    """Settings of one side of a claim: the one there is, or how many."""
    settings = side.split("; ")
    return side if len(settings) == 1 else f"{len(settings)} settings"
