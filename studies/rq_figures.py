"""Figures of the five questions, in the style of the evaluation's."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from studies.routing_figures import limits
from studies.rq_report import Change, non_dominated

PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FBF", "#8C6D1F", "#555555",
    "#B22222", "#3CB371", "#4B0082",
)  # fmt: skip
_CHARACTERS_PER_INCH = 12.0
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")


@dataclass(frozen=True)
class Axis:
    """An indicator as an axis."""

    name: str
    label: str
    factor: float = 1.0
    better: int = -1
    """-1 where lower is better, 1 where higher."""
    log: bool = False
    """Logarithmic where the means span more than a decade."""


ENERGY = Axis("j_per_good", "energy per good answer (mJ)", 1e3, log=True)
QUALITY = Axis("quality", "quality (%)", 100.0, 1)
P95 = Axis("latency_p95_s", "p95 latency (ms)", 1e3, log=True)
P99 = Axis("latency_p99_s", "p99 latency (ms)", 1e3, log=True)
GOODPUT = Axis("goodput_rps", "good answers\nper s (1000)", 1e-3, 1)
PEAK = Axis("peak_c", "peak temperature (°C)")
POWER = Axis("mean_power_w", "mean power (W)")


@dataclass(frozen=True)
class Panel:
    """A column of `curves`: lines over the same levels."""

    title: str
    label: str
    """What the levels are of, with the unit."""
    ticks: Sequence[str]
    lines: Mapping[str, Sequence[str]]
    """Line -> play at each tick."""


def fronts(
    summary: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    x: Axis,
    ys: Sequence[Axis],
    title: str,
    joined: Sequence[str] = (),
) -> Figure:
    """Indicators against each other with 95% intervals; a black line joins the plays that nobody dominates.

    Args:
        summary: as `studies.rq_report.summary_of` makes it.
        groups: label -> plays, one colour and marker each.
        x: shared by all panels.
        ys: a panel each.
        title: with the origin of the numbers.
        joined: groups whose plays a thin line joins, in order; the last is the largest.
    """
    figure = Figure(figsize=(5.2 * len(ys), 5.0), layout="constrained")
    table = summary.set_index("policy")
    for axes, y in zip(figure.subplots(1, len(ys), squeeze=False)[0], ys, strict=True):
        everyone = table.loc[[name for names in groups.values() for name in names]]
        everyone = everyone[~everyone.index.duplicated()]
        best = everyone[non_dominated(np.column_stack([-everyone[a.name] * a.better for a in (x, y)]))]
        best = best.sort_values([x.name, y.name])
        front = best[x.name] * x.factor, best[y.name] * y.factor
        axes.plot(*front, color="black", lw=1.0, marker="o", ms=11, mfc="none", zorder=1)
        for number, (group, names) in enumerate(groups.items()):
            colour, own = PALETTE[number % len(PALETTE)], table.loc[list(names)]
            if group in joined:
                axes.plot(own[x.name] * x.factor, own[y.name] * y.factor, color=colour, lw=0.8, alpha=0.6)
            sizes = np.linspace(20, 70, len(own)) if group in joined else np.full(len(own), 40)
            for size, row in zip(sizes, own.to_dict("records"), strict=True):
                _point(axes, row, x, y, colour, MARKERS[number % len(MARKERS)], size)
        axes.set(xlabel=x.label, ylabel=y.label)
        axes.set_xlim(_scale(axes.xaxis, everyone, x))
        axes.set_ylim(_scale(axes.yaxis, everyone, y))
    handles = [
        Line2D([], [], color=PALETTE[n % len(PALETTE)], marker=MARKERS[n % len(MARKERS)], ls="", label=group)
        for n, group in enumerate(groups)
    ]
    handles.append(Line2D([], [], color="black", lw=1.0, marker="o", ms=9, mfc="none", label="Pareto front"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    _set_title(figure, title)
    return figure


def _point(axes: Axes, row: dict, x: Axis, y: Axis, colour: str, marker: str, size: float) -> None:
    """A play and, faint, its intervals: seeds differ more than plays do on the same seeds."""
    (x_mean, *x_ends), (y_mean, *y_ends) = (
        [row[f"{axis.name}{end}"] * axis.factor for end in ("", "_low", "_high")] for axis in (x, y)
    )
    axes.plot(x_ends, [y_mean] * 2, color=colour, lw=0.7, alpha=0.25)
    axes.plot([x_mean] * 2, y_ends, color=colour, lw=0.7, alpha=0.25)
    axes.scatter(x_mean, y_mean, s=size, marker=marker, color=colour, zorder=3, lw=0)


def _scale(axis: XAxis | YAxis, table: pd.DataFrame, of: Axis) -> tuple[float, float]:
    """Set the scale of an axis; ends that show all finite means. Wide intervals may leave it."""
    means = table[of.name].to_numpy() * of.factor
    means = means[np.isfinite(means)]
    if not of.log or means.min() <= 0.0 or means.max() < 10.0 * means.min():
        return limits(means)
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
    if means.max() < 100.0 * means.min():
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    low, high = limits(np.log(means))
    return float(np.exp(low)), float(np.exp(high))


def _set_legend(figure: Figure, labels: Sequence[str]) -> None:
    """Name the colours and markers, in their order, below the figure."""
    handles = [
        Line2D([], [], color=PALETTE[n % len(PALETTE)], marker=MARKERS[n % len(MARKERS)], ms=4, label=label)
        for n, label in enumerate(labels)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(labels)))


def _set_title(figure: Figure, title: str) -> None:
    """The title, in lines that fit."""
    width = round(_CHARACTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle("\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, width)))


def curves(summary: pd.DataFrame, panels: Sequence[Panel], ys: Sequence[Axis], title: str) -> Figure:
    """Indicators over levels: a column per panel, a row per indicator, bands of 95% intervals.

    Args:
        summary: as `studies.rq_report.summary_of` makes it.
        panels: the columns.
        ys: the rows.
        title: with the origin of the numbers.
    """
    size = (1.2 + 2.3 * max(2, len(panels)), 1.2 + 1.6 * len(ys))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(ys), len(panels), squeeze=False, sharey="row", sharex="col")
    table = summary.set_index("policy")
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    for row, y in zip(grid, ys, strict=True):
        for axes, panel in zip(row, panels, strict=True):
            for label, names in panel.lines.items():
                number, own = labels.index(label), table.loc[list(names)]
                colour, at = PALETTE[number % len(PALETTE)], np.arange(len(own))
                mean, low, high = (
                    own[f"{y.name}{end}"].to_numpy() * y.factor for end in ("", "_low", "_high")
                )
                axes.plot(at, mean, color=colour, marker=MARKERS[number % len(MARKERS)], ms=4)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
        own = [name for panel in panels for names in panel.lines.values() for name in names]
        row[0].set_ylim(_scale(row[0].yaxis, table.loc[own], y))
        row[0].set_ylabel(y.label.replace(" (", "\n("))
    for axes, bottom, panel in zip(grid[0], grid[-1], panels, strict=True):
        axes.set_title(panel.title)
        bottom.set_xticks(range(len(panel.ticks)), panel.ticks)
        bottom.set_xlabel(panel.label)
    _set_legend(figure, labels)
    _set_title(figure, title)
    return figure


def changes(
    columns: Mapping[str, Mapping[str, Mapping[str, Change]]], factor: float, label: str, title: str
) -> Figure:
    """Changes with 95% intervals: a column per variant, a row per condition, a colour per policy.

    Args:
        columns: variant -> policy -> condition -> change.
        factor: to the shown unit.
        label: of the axis, with the unit.
        title: with the origin of the numbers.
    """
    policies = list(dict.fromkeys(policy for column in columns.values() for policy in column))
    rows = list(dict.fromkeys(c for column in columns.values() for own in column.values() for c in own))
    figure = Figure(figsize=(1.5 + 3.2 * len(columns), 1.6 + 0.5 * len(rows)), layout="constrained")
    grid = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, (variant, column) in zip(grid, columns.items(), strict=True):
        for policy, own in column.items():
            number = policies.index(policy)
            offset = 0.7 * ((number + 0.5) / len(policies) - 0.5)
            for condition, change in own.items():
                y, colour = rows.index(condition) + offset, PALETTE[number % len(PALETTE)]
                axes.plot([change.low * factor, change.high * factor], [y, y], color=colour, lw=1.6)
                axes.plot(change.mean * factor, y, MARKERS[number % len(MARKERS)], color=colour, ms=4)
        axes.axvline(0.0, color="black", lw=0.8)
        axes.set(title=variant, xlabel=label)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    _set_legend(figure, policies)
    _set_title(figure, title)
    return figure


def usage(maps: Mapping[str, Mapping[str, np.ndarray]], title: str) -> Figure:
    """Tokens per layer and expert over an even load: a row of heatmaps per key.

    Args:
        maps: row -> column -> tokens [L, E].
        title: with the origin of the numbers.
    """
    share = {
        row: {name: t / np.maximum(t.mean(axis=-1, keepdims=True), 1e-12) for name, t in own.items()}
        for row, own in maps.items()
    }
    top = max(1.5, *(float(table.max()) for own in share.values() for table in own.values()))
    width = max(len(own) for own in maps.values())
    figure = Figure(figsize=(1.5 + 3.1 * width, 0.9 + 1.6 * len(maps)), layout="constrained")
    grid = figure.subplots(len(maps), width, squeeze=False)
    for line, (row, own) in zip(grid, share.items(), strict=True):
        for axes in line[len(own) :]:
            axes.set_axis_off()
        for axes, (name, table) in zip(line, own.items(), strict=False):
            image = axes.imshow(
                table, aspect="auto", cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest"
            )
            axes.set_title(name if table.any() else f"{name}: never")
            axes.set_yticks(range(len(table)))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(False)
        line[0].set_ylabel(f"{row}\nlayer")
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    figure.colorbar(image, ax=grid, label="tokens, 1 = even load", aspect=30)
    _set_title(figure, title)
    return figure
