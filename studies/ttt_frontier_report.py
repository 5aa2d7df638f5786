"""The report and the figure of the frontier of accuracy against energy; intervals are over repeats."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from agents.evaluation.figures import save_figure
from agents.files import write_file
from agents.play.metrics import student_interval
from studies.repeats import markdown_table, origin, range_text, select, shown, summarize
from studies.ttt_config import NEVER
from studies.ttt_frontier_tables import (
    RUN,
    SHARES,
    TRAINING,
    VISITS,
    costs_table,
    frontier_table,
    training_table,
    visits_table,
)
from studies.ttt_results import COST_LABELS, cost_unit

RETURNED_LEAST = 0.90
"""Asked of the first batch of a shift that returned: its accuracy over the settled one."""
LOST_MOST = 2.0
"""Asked where like labels come together: points that adapting may lose."""
SPLIT_WITHIN = 0.02
"""Asked of the phases: how near they add up to a run that mixes them."""
FRONTIER = ("clean", "accuracy", "gain", "recovered", "cost", "of_tent", "adapted")

Table = list[str]
"""Lines in Markdown."""


def write_report(
    repeats: Sequence[dict[str, Any]],
    weighings: Mapping[str, dict[str, Any]],
    folder: Path,
    console: Console,
) -> None:
    """Write report.md, frontier.png, and runs, frontier, visits, training and costs as CSV.

    Args:
        repeats: Of one size.
        weighings: Costs of each of their models.
        folder: Where all goes.
        console: Where the report is shown.

    Raises:
        StudyError: Some costs have an energy meter and some have none.
    """
    unit = cost_unit(list(weighings.values()))
    runs, costs = frontier_table(repeats, weighings), costs_table(weighings)
    visits, training = visits_table(repeats), training_table(repeats)
    frontier = summarize(runs, RUN, FRONTIER)
    tables = {
        "runs": runs,
        "frontier": frontier,
        "visits": summarize(visits, RUN, VISITS),
        "training": summarize(training, RUN, TRAINING),
        "costs": costs,
    }
    written = {f"{name}.csv": table for name, table in tables.items() if len(table)}
    for name, table in written.items():
        write_file(folder / name, table.to_csv(index=False))
    streams = repeats[0]["settings"]["streams"]
    machines = ", ".join(sorted({own["machine"] for own in weighings.values()}))
    lines = [
        "# Accuracy against energy, by method of adaptation", "",
        f"Written by `python -m studies.ttt_frontier`. {origin(repeats)}; torch {repeats[0]['torch']}. Cost: "
        f"{COST_LABELS[unit]}, weighed once per model on {machines}. 95% intervals over repeats "
        "(that of a cost is of the share of batches learned; the spread of weighing stands with the phases). "
        "Every batch is scored before it is learned from; all methods are guarded.", "",
        *_models(repeats),
        *itertools.chain(*(_stream(repeats, frontier, name, unit) for name in streams)),
        *_returning(visits, tables["visits"]),
        *_like_labels(repeats, runs, frontier),
        *_training(tables["training"]),
        *_norms(repeats, frontier, unit),
        *_costs(weighings, costs, unit),
        "![frontier](frontier.png)", "",
    ]  # fmt: skip
    text = "\n".join(lines)
    write_file(folder / "report.md", text)
    save_figure(lambda: _figure(frontier, unit, origin(repeats)), folder / "frontier.png")
    console.print(Markdown(text))
    console.print(f"wrote to {folder}: {', '.join(written)}, report.md, frontier.png")


def _models(repeats: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for _, group in itertools.groupby(repeats, key=lambda repeat: repeat["model"]):
        own = list(group)
        how = own[0]["settings"]["model"]
        clean = range_text(*student_interval([repeat["clean"] for repeat in own]), 100)
        rows.append(
            (
                own[0]["model"], how["norm"], "yes" if how["stem"] else "no", f"{how['augment']:.0%}",
                own[0]["settings"]["steps"], f"{own[0]['n_params'] / 1e6:.1f}", len(own), clean,
            )
        )  # fmt: skip
    heads = ("model", "norm", "stem", "augmented", "steps", "parameters, M", "repeats", "clean accuracy, %")
    return _section("Models", "", heads, rows)


def _stream(repeats: Sequence[dict[str, Any]], frontier: pd.DataFrame, name: str, unit: str) -> Table:
    factor, prefix = _factor(unit)
    stream = repeats[0]["settings"]["streams"][name]
    heads = (
        "model", "method", "accuracy, %", "of the loss, %", "against not adapting, points",
        f"{prefix}{unit} per image", "adapting, % of TENT's", "batches learned, %",
    )  # fmt: skip
    rows = [
        (
            row["model"], row["method"], shown(row, "accuracy", 100), shown(row, "recovered", 100),
            shown(row, "gain", sign="+"), shown(row, "cost", factor), shown(row, "of_tent", 100),
            shown(row, "adapted", 100),
        )
        for row in select(frontier, stream=name).to_dict("records")
    ]  # fmt: skip
    title = f"Stream {name}: {stream['schedule']}, {stream['batches']} batches"
    return _section(title, "", heads, rows)


def _returning(visits: pd.DataFrame, summary: pd.DataFrame) -> Table:
    rows = []
    for row in summary.to_dict("records"):
        own = select(visits, **{name: row[name] for name in RUN})["returned"].to_numpy()
        texts = (shown(row, name, 100) for name in VISITS)
        rows.append((*(row[name] for name in RUN), *texts, _met(own >= RETURNED_LEAST)))
    heads = (*RUN, "new, first batch", "returned, first batch", "second batch", "met in")
    note = (
        "Accuracy over the settled one, %: of the first batch of a shift that is new, and of the first and "
        "the second batch of one that returned. Asked of the bank in the first batch of one that returned: "
        f"at least {100 * RETURNED_LEAST:g}."
    )
    return _section("Shifts that return", note, heads, rows)


def _like_labels(repeats: Sequence[dict[str, Any]], runs: pd.DataFrame, frontier: pd.DataFrame) -> Table:
    streams = repeats[0]["settings"]["streams"]
    rows = []
    for row in frontier.to_dict("records"):
        if row["method"] == NEVER or streams[row["stream"]]["schedule"] != "label_correlated":
            continue
        own = select(runs, **{name: row[name] for name in RUN})["gain"].to_numpy()
        gain = shown(row, "gain", sign="+")
        rows.append((*(row[name] for name in RUN), gain, f"{own.min():+.1f}", _met(own >= -LOST_MOST)))
    heads = (*RUN, "against not adapting, points", "worst repeat", "met in")
    note = f"Asked: never more than {LOST_MOST:g} points below not adapting."
    return _section("Like labels together", note, heads, rows)


def _training(training: pd.DataFrame) -> Table:
    rows = [
        (*(row[name] for name in RUN), *(shown(row, name, sign="+") for name in TRAINING))
        for row in training.to_dict("records")
    ]
    heads = (*RUN, "training adds", "adapting adds", "together", "adapting adds to plain")
    note = (
        "Points of accuracy against the plain model that never adapts: what augmented training adds (and a "
        "stem, where the model has one), and what adapting adds on top of it."
    )
    return _section("On top of augmented training", note, heads, rows)


def _norms(repeats: Sequence[dict[str, Any]], frontier: pd.DataFrame, unit: str) -> Table:
    """Models that differ in nothing but their norm, by the methods that more than one of them takes."""
    factor, prefix = _factor(unit)
    how = {repeat["model"]: repeat["settings"]["model"] for repeat in repeats}
    norms = {name: own["norm"] for name, own in how.items() if not own["stem"] and not own["augment"]}
    methods = {r["model"]: r["settings"]["methods"] for r in repeats if r["model"] in norms}
    counts = Counter(method for own in methods.values() for method in own)
    taken = [method for method, count in counts.items() if count > 1]
    rows = [
        (
            norms[row["model"]], row["stream"], row["method"], shown(row, "clean", 100),
            shown(row, "accuracy", 100), shown(row, "gain", sign="+"), shown(row, "recovered", 100),
            shown(row, "cost", factor),
        )
        for stream, method in itertools.product(frontier["stream"].unique(), [NEVER, *taken])
        for row in select(frontier, stream=stream, method=method).to_dict("records")
        if row["model"] in norms
    ]  # fmt: skip
    heads = (
        "norm", "stream", "method", "clean accuracy, %", "accuracy, %", "against not adapting, points",
        "of the loss, %", f"{prefix}{unit} per image",
    )  # fmt: skip
    return _section("Norm against norm", "", heads, rows)


def _costs(weighings: Mapping[str, dict[str, Any]], costs: pd.DataFrame, unit: str) -> Table:
    factor, prefix = _factor(unit)
    rows = []
    for phase in costs["phase"].unique():
        texts = []
        for model in weighings:
            own = select(costs, model=model, phase=phase).to_dict("records")
            texts.append(_spread(own[0], 100 if phase in SHARES else factor) if own else "-")
        rows.append((phase, *texts))
    note = (
        f"In {prefix}{unit} per image, each phase repeated by itself: mean over the weighings, least and "
        "greatest. `of_mixed`: what serving, TENT's steps and copies add up to over a run that mixes them, "
        "percent. `of_step`: TENT's three phases over its step, likewise. Asked of `of_mixed`: within "
        f"{100 * SPLIT_WITHIN:g} of 100."
    )
    return _section("Cost of each phase", note, ("phase", *weighings), rows)


def _section(title: str, note: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A heading and a table, or nothing where there are no rows."""
    if not rows:
        return []
    return [f"## {title}", "", *([note, ""] if note else []), *markdown_table(heads, rows)]


def _spread(row: dict[str, Any], factor: float) -> str:
    return f"{factor * row['mean']:.2f} ({factor * row['low']:.2f} to {factor * row['high']:.2f})"


def _figure(frontier: pd.DataFrame, unit: str, where: str) -> Figure:
    """Accuracy against cost per image: a panel per stream, a mark per model."""
    streams, models = list(frontier["stream"].unique()), list(frontier["model"].unique())
    figure = Figure(figsize=(11.0, 4.4 * math.ceil(len(streams) / 2)), layout="constrained")
    factor, prefix = _factor(unit)
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


def _met(met: np.ndarray) -> str:
    """In how many of the repeats."""
    return f"{np.count_nonzero(met)} of {len(met)}"


def _factor(unit: str) -> tuple[float, str]:
    """What costs are multiplied by to be read, and the prefix of the unit then."""
    return (1e3, "m") if unit == "J" else (1e6, "µ")
