"""Tables and the figure of the frontier of accuracy against energy, from the repeats that are there.

Shares and gains are taken within each repeat, against the unadapted model on the same batches; intervals are
95% Student intervals over repeats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from agents.evaluation.figures import save_figure
from agents.files import write_file
from studies.repeats import markdown_table, origin, select, shown, summarize
from studies.ttt_config import NEVER
from studies.ttt_energy import TENT
from studies.ttt_results import COST_LABELS, cost_unit

RUN = ["model", "stream", "method"]


def frontier_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat and run.

    Columns beside `RUN` and the seed:
        accuracy: Mean over the batches, 0 to 1. gain: Points against the unadapted model. recovered: Gain
        over what the shifts cost: accuracy on clean images less that of the unadapted model. cost: Serving
        and adapting per image, in `cost_unit`: steps that were taken at the price of a step, the
            guard on every batch.
        of_tent: What adapting costs over what TENT's does in the same run.
        adapted: Share of the batches that were learned from.
    """
    rows = []
    for repeat, run, before in _runs(repeats):
        accuracy, unadapted = float(np.mean(run["quality"])), float(np.mean(before["quality"]))
        lost = repeat["clean"] - unadapted
        adapting, tent = (_adapting(repeat, run, method) for method in (run["method"], TENT))
        shifted = repeat["settings"]["streams"][run["stream"]]["kinds"] != ["clean"]
        rows.append(
            _named(repeat, run)
            | {
                "accuracy": accuracy,
                "gain": 100 * (accuracy - unadapted),
                "recovered": (accuracy - unadapted) / lost if shifted and lost > 0 else math.nan,
                "cost": (repeat["costs"]["phases"]["serve"] + adapting) / repeat["batch_size"],
                "of_tent": adapting / tent if tent > 0 else math.nan,
                "adapted": float(np.mean(run["steps"])),
            }
        )
    return pd.DataFrame(rows)


def visits_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat, run and visit of a shift that returns: accuracy of single batches over the settled.

    Columns beside `RUN` and the seed:
        visit: How often the shift came before. first, second: Accuracy of that batch of the visit over the
        shift's settled accuracy, that of the second
            halves of all its visits but this one's first batches; mean over the shifts.
    """
    rows = []
    for repeat, run, _ in _runs(repeats):
        shifts = repeat["shifts"][run["stream"]]
        if repeat["settings"]["streams"][run["stream"]]["schedule"] != "recurring":
            continue
        visits: dict[str, list[np.ndarray]] = {}
        start = 0
        for shift, group in itertools.groupby(shifts):
            end = start + len(list(group))
            visits.setdefault(shift, []).append(np.array(run["quality"][start:end]))
            start = end
        settled = np.mean([v[len(v) // 2 :].mean() for own in visits.values() for v in own])
        for visit in range(min(len(own) for own in visits.values())):
            row = _named(repeat, run) | {"visit": visit}
            for place, name in enumerate(("first", "second")):
                own = float(np.mean([batches[visit][place] for batches in visits.values()]))
                row[name] = own / settled if settled > 0 else math.nan
            rows.append(row)
    return pd.DataFrame(rows)


def costs_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat and model: each phase and each method's step, per image, and how phases add up."""
    rows = []
    for repeat in repeats:
        costs, n = repeat["costs"], repeat["batch_size"]
        row = {"model": repeat["model"], "seed": repeat["seed"]}
        row |= {phase: cost / n for phase, cost in costs["phases"].items()}
        row |= {f"step {method}": cost / n for method, cost in costs["steps"].items()}
        row["of_mixed"] = costs["mixed"]["added_up"] / costs["mixed"]["measured"]
        parts = sum(costs["phases"][phase] for phase in ("forward", "backward", "update"))
        row["of_step"] = parts / costs["steps"][TENT]
        rows.append(row)
    return pd.DataFrame(rows)


def write_report(repeats: Sequence[dict[str, Any]], folder: Path, console: Console) -> None:
    """Write runs.csv (every repeat), frontier.csv, visits.csv, costs.csv, report.md and frontier.png.

    Raises:
        StudyError: Some repeats have an energy meter and some have none.
    """
    unit = cost_unit(repeats)
    runs, costs = frontier_table(repeats), costs_table(repeats)
    metrics = ("accuracy", "gain", "recovered", "cost", "of_tent", "adapted")
    frontier = summarize(runs, RUN, metrics)
    visits = summarize(visits_table(repeats), [*RUN, "visit"], ("first", "second"))
    cost_means = summarize(costs, ["model"], [name for name in costs if name not in ("model", "seed")])
    tables = {"runs": runs, "frontier": frontier, "visits": visits, "costs": cost_means}
    for name, table in tables.items():
        write_file(folder / f"{name}.csv", table.to_csv(index=False))
    text = _markdown(repeats, frontier, visits, cost_means, unit)
    write_file(folder / "report.md", text)
    save_figure(lambda: _figure(frontier, unit, origin(repeats)), folder / "frontier.png")
    console.print(Markdown(text))
    console.print(
        f"wrote to {folder}: {', '.join(f'{name}.csv' for name in tables)}, report.md, frontier.png"
    )


def _adapting(repeat: dict[str, Any], run: dict[str, Any], method: str) -> float:
    """Cost of adapting by a method along a run per batch; TENT's as if it took the same share of steps."""
    if method == NEVER or run["method"] == NEVER:
        return 0.0
    costs = repeat["costs"]
    return costs["phases"]["guard"] + float(np.mean(run["steps"])) * costs["steps"][method]


def _runs(
    repeats: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield every repeat, run, and the run of the unadapted model to compare with."""
    for repeat in repeats:
        before = {run["stream"]: run for run in repeat["runs"] if run["method"] == NEVER}
        for run in repeat["runs"]:
            yield repeat, run, before[run["stream"]]


def _named(repeat: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": repeat["model"],
        "stream": run["stream"],
        "method": run["method"],
        "seed": repeat["seed"],
    }


def _markdown(
    repeats: Sequence[dict[str, Any]],
    frontier: pd.DataFrame,
    visits: pd.DataFrame,
    costs: pd.DataFrame,
    unit: str,
) -> str:
    factor, prefix = (1e3, "m") if unit == "J" else (1e6, "µ")
    streams = repeats[0]["settings"]["streams"]
    lines = [
        "# Accuracy against energy, by method of adaptation", "",
        f"Written by `python -m studies.ttt_frontier`. {origin(repeats)}; torch {repeats[0]['torch']}. Cost: "
        f"{COST_LABELS[unit]}. 95% intervals over repeats. Every batch is scored before it is learned from; "
        "all methods are guarded.", "",
    ]  # fmt: skip
    heads = (
        "model", "method", "accuracy, %", "of the loss, %", "against not adapting, points",
        f"{prefix}{unit} per image", "adapting, % of TENT's", "batches learned, %",
    )  # fmt: skip
    for name, stream in streams.items():
        rows = [
            (
                row["model"], row["method"], shown(row, "accuracy", 100), shown(row, "recovered", 100),
                shown(row, "gain", 1, sign="+"), shown(row, "cost", factor), shown(row, "of_tent", 100),
                shown(row, "adapted", 100),
            )
            for row in select(frontier, stream=name).to_dict("records")
        ]  # fmt: skip
        lines += [f"## Stream {name}: {stream['schedule']}, {stream['batches']} batches", ""]
        lines += markdown_table(heads, rows)
    rows = [
        (
            row["model"], row["stream"], row["method"], row["visit"] + 1,
            *(shown(row, n, 100) for n in ("first", "second")),
        )
        for row in visits.to_dict("records")
    ]  # fmt: skip
    lines += [
        "## Shifts that return",
        "",
        "Accuracy of a visit's first and second batch over the settled one.",
    ]
    lines += ["", *markdown_table(("model", "stream", "method", "visit", "first, %", "second, %"), rows)]
    names = [n for n in costs if n != "model" and n != "n" and not n.endswith(("_low", "_high"))]
    shares = ("of_mixed", "of_step")
    rows = [
        (row["model"], *(shown(row, n, 100 if n in shares else factor) for n in names))
        for row in costs.to_dict("records")
    ]
    note = (
        f"In {prefix}{unit} per image, each phase repeated by itself. `of_mixed`: what serving, TENT's steps "
        "and copies add up to over a run that mixes them, %. `of_step`: TENT's three phases over its step, %."
    )
    lines += ["## Cost of each phase", "", note, "", *markdown_table(("model", *names), rows)]
    lines += ["![frontier](frontier.png)", ""]
    return "\n".join(lines)


def _figure(frontier: pd.DataFrame, unit: str, where: str) -> Figure:
    """Accuracy against cost per image: a panel per stream, a mark per model."""
    streams, models = list(frontier["stream"].unique()), list(frontier["model"].unique())
    figure = Figure(figsize=(11.0, 4.4 * math.ceil(len(streams) / 2)), layout="constrained")
    factor, prefix = (1e3, "m") if unit == "J" else (1e6, "µ")
    panels = figure.subplots(math.ceil(len(streams) / 2), 2, squeeze=False).flat
    for axes, stream in zip(panels, streams, strict=False):
        for model, marker in zip(models, itertools.cycle("osD^vP"), strict=False):
            own = select(frontier, stream=stream, model=model)
            axes.plot(factor * own["cost"], 100 * own["accuracy"], marker, ms=5, label=model)
            for row in own.to_dict("records"):
                place = factor * row["cost"], 100 * row["accuracy"]
                axes.annotate(row["method"].replace("_", " "), place, fontsize=6)
        axes.set(title=f"stream {stream}", ylabel="top-1 accuracy (%)")
        axes.set_xlabel(f"{prefix}{unit} per image, {COST_LABELS[unit]}")
    figure.axes[0].legend()
    figure.suptitle(f"What adaptation brings back, and for what\n{where}")
    return figure
