"""Figures of the routing study, in the style of the evaluation's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from agents.evaluation.figures import save_figure
from moe.model.config import ModelConfig
from moe.model.usage import specialisation, specialisation_bias
from studies.repeats import select
from studies.routing_config import REFERENCE
from studies.routing_results import CELL, COST_LABELS, Key, pareto_front

_GREYS = ("#333333", "#808080", "#B5B5B5")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("v", "s", "o", "D", "^", "P")
_K_COLOURS = ("#56B4E9", "#0072B2", "#7A4FBF", "#222222", "#E69F00", "#009E73")
_HEAT: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}


def write_figures(
    folder: Path,
    repeats: Sequence[dict[str, Any]],
    summary: pd.DataFrame,
    routing: pd.DataFrame,
    metric: str,
    where: str,
) -> list[Path]:
    """Draw all figures as PNG files.

    Args:
        folder: where they go.
        repeats: one or two tasks of one size; the heatmaps show the first repeat of each.
        summary: costs and quality by cell, as `studies.routing_results.summarize` makes it.
        routing: use of the experts by cell and kind of input, likewise.
        metric: the cost that is shown.
        where: origin of the numbers, for the titles.
    """
    first = {repeat["task"]: repeat for repeat in reversed(repeats)}
    drawings: dict[str, Callable[[], Figure]] = {
        "pareto": lambda: pareto(summary, first, metric, where),
        "balance": lambda: balance(routing, first, where),
    }
    for task, repeat in sorted(first.items()):
        drawings |= {
            f"bias-{task}": lambda t=task, r=repeat: bias(select(summary, task=t), r, metric, where),
            f"usage-{task}": lambda r=repeat: usage(r),
            f"classes-{task}": lambda r=repeat: classes(r),
        }
    return [save_figure(draw, folder / f"{name}.png") for name, draw in drawings.items()]


def colours(variants: dict[str, Any]) -> dict[str, str]:
    """A colour per variant: greys for experts of one width."""
    even = _even(variants)
    own = [name for name in variants if name not in even]
    return dict(zip([*even, *own], [*_GREYS[: len(even)], *_COLOURS], strict=False))


def _even(variants: dict[str, Any]) -> list[str]:
    """Variants with experts of one width."""
    return [name for name, variant in variants.items() if variant["experts"] == "even"]


def unit_of(values: np.ndarray, metric: str) -> tuple[float, str]:
    """Factor and unit in which values of a metric in joules or seconds read well."""
    base = "J" if "_j_" in metric else "s"
    prefixes = ((1.0, ""), (1e3, "m"), (1e6, "µ"), (1e9, "n"))
    return next(((f, p + base) for f, p in prefixes if values.max() * f >= 1.0), (1e9, f"n{base}"))


def pareto(summary: pd.DataFrame, first: dict[str, dict[str, Any]], metric: str, where: str) -> Figure:
    """Quality against cost of every cell with intervals, and each variant's front, a panel per task."""
    figure = Figure(figsize=(max(7.5, 5.2 * len(first)), 5.4), layout="constrained")
    grid = figure.subplots(1, len(first), squeeze=False)[0]
    settings = next(iter(first.values()))["settings"]
    colour = colours(settings["variants"])
    marker = dict(zip(settings["expert_counts"], _MARKERS, strict=False))
    for axes, task in zip(grid, sorted(first), strict=True):
        own = select(summary, task=task)
        factor, unit = unit_of(own[metric].to_numpy(), metric)
        cost: dict[Key, float] = {}
        quality: dict[Key, float] = {}
        for row in own.to_dict("records"):
            _point(axes, row, metric, factor, colour[row["variant"]], marker[row["expert_count"]])
            cost[Key(*(row[name] for name in CELL[1:]))] = row[metric] * factor
            quality[Key(*(row[name] for name in CELL[1:]))] = row["accuracy"] * 100
        for variant, own_colour in colour.items():
            front = pareto_front({key: c for key, c in cost.items() if key.variant == variant}, quality)
            line = [cost[key] for key in front], [quality[key] for key in front]
            axes.plot(*line, color=own_colour, lw=1.0, alpha=0.8)
        axes.set_xlim(limits(own[metric].to_numpy() * factor))
        axes.set_ylim(limits(own["accuracy"].to_numpy() * 100))
        axes.set(title=task, xlabel=f"{COST_LABELS[metric]} ({unit})")
        axes.set_ylabel("top-1 accuracy (%)" if task == "vision" else "next-byte accuracy (%)")
    handles = [Line2D([], [], color=c, label=name) for name, c in colour.items()]
    handles += [
        Line2D([], [], color="black", ls="", marker=m, ms=5, label=f"k = {k}") for k, m in marker.items()
    ]
    handles.append(
        Line2D([], [], color="black", ls="", marker="o", mfc="white", ms=5, label="routing bias > 0")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle(f"Cost and quality with 95% intervals; lines: fronts\n{where}")
    return figure


def _point(axes: Axes, row: dict[str, Any], metric: str, factor: float, colour: str, marker: str) -> None:
    """A cell with its intervals; hollow under a routing bias."""
    x, y = row[metric] * factor, row["accuracy"] * 100
    for name, scale, horizontal in ((metric, factor, True), ("accuracy", 100, False)):
        ends = [row[f"{name}_low"] * scale, row[f"{name}_high"] * scale]
        axes.plot(*((ends, [y, y]) if horizontal else ([x, x], ends)), color=colour, lw=0.7, alpha=0.5)
    fill = "white" if row["routing_bias"] > 0 else colour
    axes.plot(x, y, marker, color=colour, mfc=fill, ms=5, mew=1.0)


def limits(means: np.ndarray) -> tuple[float, float]:
    """Ends of an axis that shows all means; wide intervals, as those of few repeats, may leave it."""
    low, high = means.min(), means.max()
    room = 0.25 * max(high - low, 0.1 * abs(high), 1e-9)
    return low - room, high + room


def bias(summary: pd.DataFrame, first: dict[str, Any], metric: str, where: str) -> Figure:
    """Cost, latency and quality against the routing bias: a column per variant, a line per expert count."""
    variants = first["settings"]["variants"]
    own = [name for name in variants if name not in _even(variants)]
    rows = {
        metric: COST_LABELS[metric].replace(" (no energy meter)", "\n(no energy meter)"),
        "latency_s": "latency of a micro-batch",
        "accuracy": "accuracy",
    }
    figure = Figure(figsize=(1.2 + 3.0 * len(own), 8.0), layout="constrained")
    grid = figure.subplots(len(rows), len(own), sharex=True, sharey="row", squeeze=False)
    standard = select(summary, variant=REFERENCE, expert_count=variants[REFERENCE]["fixed_k"])
    for line, (name, label) in zip(grid, rows.items(), strict=True):
        factor, unit = (100.0, "%") if name == "accuracy" else unit_of(summary[name].to_numpy(), name)
        for axes, variant in zip(line, own, strict=True):
            for k, colour in zip(first["settings"]["expert_counts"], _K_COLOURS, strict=False):
                group = select(summary, variant=variant, expert_count=k)
                _line(axes, group, name, factor, color=colour, label=f"k = {k}", marker="o")
            axes.axhline(
                standard[name].to_numpy()[0] * factor, color=_GREYS[0], ls="--", lw=0.9, label=REFERENCE
            )
            axes.set_title(variant)
        line[0].set_ylabel(f"{label} ({unit})")
        line[0].set_ylim(limits(summary[name].to_numpy() * factor))
    for axes in grid[-1]:
        axes.set_xlabel("routing bias")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"What the routing bias does, {first['task']}; 95% intervals\n{where}")
    return figure


def _line(axes: Axes, group: pd.DataFrame, name: str, factor: float, **style: Any) -> None:
    """A metric against the routing bias with its interval."""
    axes.plot(group.routing_bias, group[name] * factor, ms=3, **style)
    low, high = group[f"{name}_low"] * factor, group[f"{name}_high"] * factor
    axes.fill_between(group.routing_bias, low, high, color=style["color"], alpha=0.15, lw=0)


def balance(routing: pd.DataFrame, first: dict[str, dict[str, Any]], where: str) -> Figure:
    """Evenness of the load and specialisation against the routing bias, a column per task."""
    rows = {
        "load_entropy": "entropy of the load\n(1: even)",
        "load_imbalance": "imbalance of the load\n(coefficient of variation)",
        "specialisation_bits": "mutual information of\nexpert and class (bits)",
    }
    figure = Figure(figsize=(max(7.5, 4.8 * len(first)), 7.5), layout="constrained")
    grid = figure.subplots(len(rows), len(first), sharex=True, sharey="row", squeeze=False)
    settings = next(iter(first.values()))["settings"]
    k, colour = settings["usage_expert_count"], colours(settings["variants"])
    at_k = select(routing, expert_count=k)
    for column, task in zip(grid.T, sorted(first), strict=True):
        # Others of one width were trained for another number of experts per token.
        for variant, inputs in itertools.product(_shown(first[task]), ("clean", "shifted")):
            group = select(at_k, task=task, variant=variant, inputs=inputs)
            if len(group) == 1:  # experts of one width: the same under any bias
                group = pd.concat([group, group.assign(routing_bias=settings["routing_biases"][-1])])
            ls = "-" if inputs == "clean" else "--"
            for axes, name in zip(column, rows, strict=True):
                _line(axes, group, name, 1.0, color=colour[variant], ls=ls, label=f"{variant}, {inputs}")
        column[0].set_title(task)
        column[-1].set_xlabel("routing bias")
    for axes, (name, label) in zip(grid[:, 0], rows.items(), strict=True):
        axes.set_ylabel(label)
        axes.set_ylim(limits(at_k[name].to_numpy()))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"Use of the experts, {k} per token, means over layers; 95% intervals\n{where}")
    return figure


# ---------------------------------------------------------------- heatmaps of the first repeat


def usage(repeat: dict[str, Any]) -> Figure:
    """Tokens per layer and expert without and under the strongest bias, and their difference."""
    names, strongest = _shown(repeat), repeat["settings"]["routing_biases"][-1]
    figure = Figure(figsize=(12.0, 1.6 + 1.6 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 3, squeeze=False)
    loads = {name: [_relative_load(repeat, name, bias) for bias in (0.0, strongest)] for name in names}
    top = max(
        1.5,
        float(np.quantile(np.concatenate([load.ravel() for pair in loads.values() for load in pair]), 0.99)),
    )
    for line, (name, (before, after)) in zip(grid, loads.items(), strict=True):
        for axes, load in zip(line, (before, after, after - before), strict=True):
            if axes is line[2]:
                axes.imshow(load, cmap="RdBu_r", vmin=-top, vmax=top, **_HEAT)
            else:
                axes.imshow(load, cmap="cividis", vmin=0.0, vmax=top, **_HEAT)
            _annotate_widths(axes, ModelConfig.from_dict(repeat["variants"][name]["config"]))
            axes.set_yticks(range(len(load)))
        line[0].set(title=f"{name}: bias 0", ylabel="layer")
        line[1].set_title(f"{name}: bias {strongest:g}")
        line[2].set_title("difference")
    figure.colorbar(
        grid[-1][1].images[0], ax=grid[:, :2], label="tokens, 1 = even load", aspect=30, extend="max"
    )
    figure.colorbar(grid[-1][2].images[0], ax=grid[:, 2], label="change", aspect=30)
    figure.suptitle(
        f"Expert use as the thermal signal rises, {_what(repeat)}; hidden width of the experts below.\n"
        "Experts of one width cost the same, so no bias moves them."
    )
    return figure


def classes(repeat: dict[str, Any]) -> Figure:
    """Share of each expert in the tokens of each class, at the layer that is most specialised."""
    names, strongest = _shown(repeat), repeat["settings"]["routing_biases"][-1]
    k = repeat["settings"]["usage_expert_count"]
    columns = [("clean", 0.0), ("clean", strongest), ("shifted", 0.0), ("shifted", strongest)]
    figure = Figure(figsize=(14.0, 1.4 + 2.5 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(columns), squeeze=False, sharey=True)
    for line, name in zip(grid, names, strict=True):
        layer = int(specialisation(_counts(repeat, name, 0.0, "clean")).argmax())
        for axes, (kind, strength) in zip(line, columns, strict=True):
            counts = _counts(repeat, name, strength, kind)[layer]  # [C, E]
            share = counts / counts.sum(dim=1, keepdim=True) * counts.shape[1]  # blank without the class
            axes.imshow(share.numpy(), cmap="cividis", vmin=0.0, vmax=counts.shape[1] / k, **_HEAT)
            _annotate_widths(axes, ModelConfig.from_dict(repeat["variants"][name]["config"]))
            bits, chance = (f(counts).item() for f in (specialisation, specialisation_bias))
            axes.set_title(f"{kind}, bias {strength:g}: {bits:.3f} bit (chance {chance:.0e})", fontsize=8)
        line[0].set_ylabel(f"{name}\nlayer {layer}")
        line[0].set_yticks(range(len(repeat["class_names"])), repeat["class_names"], fontsize=7)
    figure.colorbar(grid[-1][-1].images[0], ax=grid, label="tokens, 1 = even load", aspect=40)
    figure.suptitle(f"Experts by class of input, {_what(repeat)}, and their mutual information")
    return figure


def _shown(repeat: dict[str, Any]) -> list[str]:
    """Variants in the heatmaps: the standard one and those whose experts differ."""
    variants = repeat["settings"]["variants"]
    return [name for name in variants if name == REFERENCE or name not in _even(variants)]


def _counts(repeat: dict[str, Any], name: str, strength: float, kind: str) -> torch.Tensor:
    """Counts of a variant at the heatmaps' expert count, [L, C, E]; those of bias 0 where it has no other."""
    wanted = Key(name, repeat["settings"]["usage_expert_count"], strength)
    cells = {Key(name, c["expert_count"], c["routing_bias"]): c for c in repeat["variants"][name]["cells"]}
    return torch.tensor(cells.get(wanted, cells[wanted._replace(routing_bias=0.0)])["counts"][kind])


def _relative_load(repeat: dict[str, Any], name: str, strength: float) -> np.ndarray:
    """Tokens per layer and expert over those of an even load, [L, E]."""
    load = _counts(repeat, name, strength, "clean").sum(dim=1).double()
    return (load / load.mean(dim=-1, keepdim=True)).numpy()


def _annotate_widths(axes: Axes, config: ModelConfig) -> None:
    """Name each run of like experts below the axis: their width, or what they answer without one."""
    axes.grid(False)
    n_wide = config.n_experts - len(config.zero_computation)
    names = [*(f"{width}" for width in config.expert_widths[:n_wide]), *config.zero_computation]
    starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]
    axes.set_xticks(middles, [names[i] for i in starts], fontsize=7)
    for label, i in zip(axes.get_xticklabels(), starts, strict=True):
        label.set_rotation(0 if i < n_wide else 90)
    for i in starts[1:]:
        axes.axvline(i - 0.5, color="white", lw=1.0)


def _what(repeat: dict[str, Any]) -> str:
    k, model = repeat["settings"]["usage_expert_count"], f"{repeat['task']} {repeat['size']}"
    return f"{model}, {k} experts per token, seed {repeat['seed']}, {repeat['machine']}"
