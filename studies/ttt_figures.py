"""Figures of the study of test-time training, in the style of the evaluation's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.evaluation.figures import save_figure
from agents.play.metrics import student_interval
from studies.repeats import select
from studies.routing_figures import limits
from studies.ttt_config import NEVER
from studies.ttt_results import COST_LABELS, GAIN_LABELS, budget_curves, norm_streams

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FBF", "#8C6D1F")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_GREY = "#808080"


def write_figures(
    folder: Path, repeats: Sequence[dict[str, Any]], summary: pd.DataFrame, unit: str, where: str
) -> list[Path]:
    """Draw all figures that the repeats have runs for, as PNG files.

    Args:
        folder: Where they go.
        repeats: One or two tasks of one size.
        summary: By run, of `studies.ttt_results.runs_table`.
        unit: Of cost.
        where: Origin of the numbers, for the titles.
    """
    drawings: dict[str, Callable[[], Figure]] = {"stream": lambda: along(repeats, where)}
    if budget_curves(summary):
        drawings["budgets"] = lambda: budgets(summary, unit, where)
    if norm_streams(summary):
        drawings["norms"] = lambda: norms(summary, unit, where)
    if len(_both_guards(summary)):
        drawings["guards"] = lambda: guards(summary, where)
    return [save_figure(draw, folder / f"{name}.png") for name, draw in drawings.items()]


def budgets(summary: pd.DataFrame, unit: str, where: str) -> Figure:
    """Gain against the budget of adaptation, and against what it cost: a line per gate."""
    curves = budget_curves(summary)
    figure = Figure(figsize=(9.0, 3.4 * len(curves) + 1.0), layout="constrained")
    grid = figure.subplots(len(curves), 2, squeeze=False, sharey="row")
    for line, (shared, group) in zip(grid, curves, strict=True):
        steps = sorted(budget for budget in group["budget"].unique() if not math.isinf(budget))
        place = {0.0: 0.0} | {limit: i + 1.0 for i, limit in enumerate(steps)}
        place[math.inf] = len(place)
        for gate, colour in zip(group["gate"].unique(), _COLOURS, strict=False):
            own = select(group, gate=gate).sort_values("budget")
            x = [0.0, *(place[budget] for budget in own["budget"])]
            y, low, high = (np.array([0.0, *own[f"gain{end}"]]) for end in ("", "_low", "_high"))
            line[0].plot(x, y, marker="o", ms=3, color=colour, label=gate.replace("_", " "))
            line[0].fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            line[1].plot([0.0, *(100 * own["adapt_ratio"])], y, marker="o", ms=3, color=colour)
        line[0].set_xticks(list(place.values()), ["0", *(f"{100 * b:g}%" for b in steps), "no\nlimit"])
        line[0].set_ylabel(GAIN_LABELS[shared["task"]])
        line[0].set_title(f"{shared['task']}: {shared['adaptation']} on stream {shared['stream']}")
        line[0].set_xlabel("budget, of the serving cost")
        line[1].set_xlabel(f"spent on adaptation, % of the serving cost\n{COST_LABELS[unit]}")
        line[0].set_ylim(limits(np.array([0.0, *group["gain"]])))
        for axes in line:
            axes.axhline(0.0, color=_GREY, lw=0.8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"What a budget of adaptation buys, by gate; 95% intervals\n{where}")
    return figure


def norms(summary: pd.DataFrame, unit: str, where: str) -> Figure:
    """Accuracy of models that differ in their norm, without and with adaptation, and what that costs."""
    stream = norm_streams(summary)[0]
    own = select(summary, stream=stream)
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(own["norm"].unique())
    adaptations = list(own["adaptation"].unique())
    width = 0.8 / len(adaptations)
    for i, adaptation in enumerate(adaptations):
        group = select(own, adaptation=adaptation)
        colour = _GREY if adaptation == NEVER else _COLOURS[i - 1]
        x = np.array([names.index(norm) for norm in group["norm"]]) + (i + 0.5) * width - 0.4
        left.bar(x, 100 * group["quality"], width * 0.92, color=colour, label=_label(adaptation))
        _whiskers(left, x, group, "quality", 100)
        if adaptation == NEVER:
            continue
        for norm, marker in zip(names, _MARKERS, strict=False):
            row = select(group, norm=norm)
            right.plot(100 * row["adapt_ratio"], row["gain"], marker, color=colour, ms=6)
            _whiskers(right, (100 * row["adapt_ratio"]).to_numpy(), row, "gain", 1, colour)
    for norm, marker in zip(names, _MARKERS, strict=False):
        right.plot([], [], marker, color="black", ms=5, label=f"{norm} norm")
    left.set_xticks(range(len(names)), [f"{norm} norm" for norm in names])
    left.set_ylabel("top-1 accuracy (%)")
    left.set_ylim(0.0, limits(100 * own["quality"].to_numpy())[1])
    right.axhline(0.0, color=_GREY, lw=0.8)
    right.set_ylim(limits(own["gain"].to_numpy()))
    right.set_xlim(left=0.0)
    right.set(xlabel=f"spent on adaptation, % of the serving cost\n{COST_LABELS[unit]}")
    right.set_ylabel("accuracy gained (points)")
    figure.legend(loc="outside lower center", ncols=5)
    figure.suptitle(f"Norm against norm, stream {stream}; models trained alike; 95% intervals\n{where}")
    return figure


def guards(summary: pd.DataFrame, where: str) -> Figure:
    """Gain or loss on streams that were run with and without guards."""
    both = _both_guards(summary)
    streams = list(both["stream"].unique())
    figure = Figure(figsize=(max(6.0, 5.0 * len(streams)), 3.8), layout="constrained")
    grid = figure.subplots(1, len(streams), squeeze=False)[0]
    for axes, stream in zip(grid, streams, strict=True):
        own = select(both, stream=stream)
        names = list(own["adaptation"].unique())
        for guarded, colour, shift in ((False, _COLOURS[1], -0.2), (True, _COLOURS[0], 0.2)):
            group = select(own, guarded=guarded)
            x = np.array([names.index(name) for name in group["adaptation"]]) + shift
            axes.bar(x, group["gain"], 0.37, color=colour, label=f"guards {'on' if guarded else 'off'}")
            _whiskers(axes, x, group, "gain", 1)
        axes.axhline(0.0, color="black", lw=0.8)
        axes.set_ylim(limits(np.array([0.0, *own["gain"]])))
        axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        axes.set(title=f"stream {stream}", ylabel="accuracy against not adapting (points)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(f"Guards where labels come together; 95% intervals\n{where}")
    return figure


def along(repeats: Sequence[dict[str, Any]], where: str) -> Figure:
    """Quality along each stream: not adapting, and every adaptation that was always on; shifts marked."""
    panels = []
    for task, own in itertools.groupby(repeats, key=lambda repeat: repeat["task"]):
        group = list(own)
        panels += [(task, stream, group) for stream in group[0]["shifts"]]
    figure = Figure(figsize=(11.0, 2.7 * len(panels) + 0.8), layout="constrained")
    for axes, (task, stream, own) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        _along(axes, task, stream, own)
    figure.suptitle(
        f"Quality along the streams, each batch before it is learned from; 95% intervals\n{where}"
    )
    return figure


def _along(axes: Axes, task: str, stream: str, repeats: Sequence[dict[str, Any]]) -> None:
    runs = [run for run in repeats[0]["runs"] if run["stream"] == stream]
    norm = runs[0]["norm"]
    always = [_key(run) for run in runs if run["norm"] == norm and _key(run)[1:] == ("always", None, True)]
    shown = [(NEVER, NEVER, 0.0, False), *always]
    colours = [_GREY, *_COLOURS]
    shifts = repeats[0]["shifts"][stream]
    steps = [(shift, len(list(group))) for shift, group in itertools.groupby(shifts)]
    means: list[np.ndarray] = []
    smooth = max(1, min(length for _, length in steps) // 4)
    for key, colour in zip(shown, colours, strict=False):
        lines = [
            run["quality_of_batch"]
            for repeat in repeats
            for run in repeat["runs"]
            if (run["stream"], run["norm"]) == (stream, norm) and _key(run) == key
        ]
        lines = np.array([_smoothed(line, steps, smooth) for line in lines])  # [repeats, batches]
        if task == "vision":
            lines = 100 * lines
        mean, low, high = np.array([student_interval(column) for column in lines.T]).T
        means.append(mean)
        x = np.arange(len(mean))
        axes.plot(x, mean, color=colour, label=_label(key[0]))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    start = 0
    top = axes.get_xaxis_transform()
    for shift, length in steps:
        axes.axvline(start - 0.5, color="black", lw=0.5, alpha=0.6)
        name = (
            "prose" if task == "language" and shift == "clean" else shift.partition("@")[0].replace("_", "\n")
        )
        axes.text(start, 0.99, name, transform=top, fontsize=6.5, va="top")
        start += length
    axes.set_xlim(-0.5, len(shifts) - 0.5)
    low, high = limits(np.concatenate(means))
    axes.set_ylim(max(low, 0.0), high)
    smoothing = f", mean of {smooth} batches" if smooth > 1 else ""
    axes.set_ylabel(f"{'top-1 accuracy (%)' if task == 'vision' else 'bits per byte'}")
    axes.set(title=f"{task}, {norm} norm, stream {stream}", xlabel=f"batch{smoothing}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _key(run: dict[str, Any]) -> tuple[str, str, float | None, bool]:
    return run["adaptation"], run["gate"], run["budget"], run["guarded"]


def _label(adaptation: str) -> str:
    return "not adapting" if adaptation == NEVER else adaptation.replace("_", " ")


def _smoothed(values: Sequence[float], steps: Sequence[tuple[str, int]], width: int) -> np.ndarray:
    """Mean of the last `width` batches, within each step of the stream."""
    parts, start = [], 0
    for _, length in steps:
        total = np.concatenate([[0.0], np.cumsum(values[start : start + length])])
        first = np.maximum(np.arange(length) + 1 - width, 0)
        parts.append((total[1:] - total[first]) / (np.arange(length) + 1 - first))
        start += length
    return np.concatenate(parts)


def _both_guards(summary: pd.DataFrame) -> pd.DataFrame:
    """Runs that adapt on streams that were run with and without guards."""
    adapting = summary.iloc[np.flatnonzero((summary["adaptation"] != NEVER).to_numpy())]
    both = [s for s, group in adapting.groupby("stream", sort=False) if len(group["guarded"].unique()) > 1]
    return adapting.iloc[np.flatnonzero(adapting["stream"].isin(both).to_numpy())]


def _whiskers(
    axes: Axes, x: np.ndarray, group: pd.DataFrame, name: str, factor: float, colour: str = "black"
) -> None:
    for at, low, high in zip(x, factor * group[f"{name}_low"], factor * group[f"{name}_high"], strict=True):
        axes.plot([at, at], [low, high], color=colour, lw=0.8)
