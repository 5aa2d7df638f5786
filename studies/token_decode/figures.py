"""Figures of the study, from its results: accuracy against energy, and energy against running sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from agents.evaluation.figures import save_figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Of top_k, from the training's down."""


def write_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the results hold: `front.png` needs quality and cost of the standard model, `cost.png` cost.

    Args:
        results: as `results.json` holds them.
        folder: of the PNG files.

    Returns:
        Their paths; none without the cost.
    """
    if "cost" not in results:
        return []
    paths = [save_figure(lambda: draw_cost(results), folder / "cost.png")]
    if len(best_accuracy(results)):
        paths.append(save_figure(lambda: draw_front(results), folder / "front.png"))
    return paths


def cost_table(results: dict[str, Any]) -> tuple[pd.DataFrame, str, str]:
    """Decode cells; the name of their cost per token, and its label: time where there was no meter."""
    cells = pd.DataFrame(results["cost"]["decode"])
    if "mj_per_token" in cells:
        return cells, "mj_per_token", "mJ per token"
    return cells.assign(ms_per_token=cells.step_ms / cells.running), "ms_per_token", "ms per token"


def best_accuracy(results: dict[str, Any]) -> pd.DataFrame:
    """Accuracy by (running, top_k, budget) with the better form of the weights, prompt as in training."""
    standard = next(iter(results["models"].values()), {})
    rows = pd.DataFrame([row for row in standard.get("quality", []) if row["kind"] in ("decode", "budget")])
    if rows.empty:
        return rows
    running = sorted(rows.running.dropna().unique())
    alone = rows[rows.kind == "decode"]  # no budget: the same for any number of sequences
    rows = pd.concat([rows[rows.kind == "budget"], *(alone.assign(running=n) for n in running)])
    return pd.DataFrame(rows.groupby(["running", "top_k", "budget"], as_index=False).accuracy.max())


def draw_front(results: dict[str, Any]) -> Figure:
    """Accuracy against cost per token: a panel per number of sequences, a curve per top_k over budgets."""
    cells, cost, label = cost_table(results)
    joined = cells.drop(columns="accuracy").merge(best_accuracy(results), on=["running", "top_k", "budget"])
    counts = sorted(joined.running.unique())
    figure, axes = plt.subplots(
        1, len(counts), figsize=(3.2 * len(counts), 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, running in zip(axes[0], counts, strict=True):
        part = joined[joined.running == running]
        for top_k, colour, curve in _curves(part, "budget"):
            ax.plot(curve[cost], 100 * curve.accuracy, "o-", ms=4, color=colour, label=f"top_k {top_k}")
            if top_k == part.top_k.max():
                _name_budgets(ax, curve, cost)
        ax.set(title=f"{running} running sequences", xlabel=label)
    axes[0][0].set_ylabel("next-token accuracy, %")
    axes[0][-1].legend(loc="lower right")
    figure.suptitle(f"Numbers: experts that a layer may read in a step. {_origin(results)}")
    return figure


def draw_cost(results: dict[str, Any]) -> Figure:
    """Cost per token against running sequences, a curve per top_k, without a budget and with a quarter."""
    cells, cost, label = cost_table(results)
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    full = cells.budget.max()
    for budget, style in ((full, "o-"), (round(full / 4), "s:")):
        for top_k, colour, curve in _curves(cells[cells.budget == budget], "running"):
            name = f"top_k {top_k}, {budget} experts"
            ax.plot(curve.running, curve[cost], style, ms=4, color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel="running sequences", ylabel=label)
    counts = sorted(cells.running.unique())
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title(f"One decode step. {_origin(results)}")
    ax.legend(ncols=2)
    return figure


def _curves(cells: Any, along: str) -> list[tuple[int, str, pd.DataFrame]]:
    """The largest top_k, their colours, and their cells in the order of a column."""
    some = sorted(cells.top_k.unique(), reverse=True)[: len(_COLOURS)]
    return [
        (int(top_k), colour, pd.DataFrame(cells[cells.top_k == top_k].sort_values(along)))
        for top_k, colour in zip(some, _COLOURS, strict=False)
    ]


def _name_budgets(ax: Axes, curve: pd.DataFrame, cost: str) -> None:
    """Write budgets under a curve's points, largest first, where there is room."""
    low, high = ax.get_xlim()
    free = float("inf")
    for row in curve.sort_values("budget", ascending=False).to_dict("records"):
        if row[cost] < free:
            place = (row[cost], 100 * row["accuracy"])
            ax.annotate(
                str(row["budget"]), place, (0, -11), textcoords="offset points", ha="center", fontsize=7
            )
            free = row[cost] - 0.05 * (high - low)


def _origin(results: dict[str, Any]) -> str:
    machine = results["cost"]["machine"]
    return f"{machine['device']}, {machine['date']}, seed {results['settings']['seed']}"
