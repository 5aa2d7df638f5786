"""Figures of an evaluation, in one style: what happened in an episode, and how policies compare."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from agents.evaluation.results import ratios_to_static
from agents.files import write_file
from agents.play.metrics import world_of
from agents.play.rollout import Recording, origin
from agents.play.statistics import performance_profile, share_interval
from moe.service.queueing import latency_quantile
from moe.workload import KNOB_NAMES, KNOBS, REQUEST_CLASSES
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem

matplotlib.use("Agg")

STYLE: dict[Any, Any] = {
    "figure.dpi": 100, "savefig.dpi": 100, "font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.2,
    "legend.frameon": False, "legend.fontsize": 8, "figure.titlesize": 10,
    "text.parse_math": False,  # a dollar in a name is a dollar
}  # fmt: skip
_COLOUR = {
    "static": "#555555", "best_constant": "#E69F00", "rule_based": "#0072B2", "ppo": "#D55E00",
    "random": "#AAAAAA",
}  # fmt: skip
_SPARE = ("#009E73", "#CC79A7", "#56B4E9", "#8C6D1F", "#7A4FBF", "#000000")
"""Okabe and Ito's colour-blind safe palette, then distinct dark ones."""
_STAGE_COLOUR = ("#ffffff", "#fff2cc", "#fbd5a0", "#f2a58e")
_WINDOW_S = 5.0
"""Rates within an episode are shown over windows this wide."""


def colours(policies: Sequence[str]) -> dict[str, str]:
    """A colour per policy: the same one in every figure, and in every evaluation for the known names."""
    chosen = {name: _COLOUR[name] for name in policies if name in _COLOUR}
    for name in sorted(policies):
        if name not in chosen:
            kin = [_COLOUR[part] for part in name.split("-") if part in _COLOUR]  # a run names its algorithm
            free = [c for c in (*kin, *_SPARE) if c not in chosen.values()]
            chosen[name] = free[0] if free else _SPARE[len(chosen) % len(_SPARE)]
    return chosen


def log_scale(axes: Axes, *names: str) -> None:
    """Make `x` or `y` logarithmic with plain numbers, since `STYLE` leaves out matplotlib's mathematics."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def write_figures(
    folder: Path,
    problem: Problem,
    examples: dict[str, Recording],
    episodes: pd.DataFrame,
    summary: pd.DataFrame,
    results: pd.DataFrame,
) -> list[tuple[str, Path]]:
    """Draw all figures as PNG files; those of single episodes only where there are some.

    Args:
        folder: where they go.
        problem: what was played.
        examples: one episode per policy that was played here, all of the same seed.
        episodes: as `agents.play.metrics.episode_metrics` makes them.
        summary: as `agents.play.metrics.summarize` makes it.
        results: as `agents.evaluation.results.results_table` makes it.

    Returns:
        (caption, file) in reading order.
    """
    where = origin(*world_of(episodes))
    overall = f"{where}; scenario {problem.scenario.name}, {episodes.seed.nunique()} seeds"
    drawings: dict[str, tuple[str, Callable[[], Figure]]] = {
        "energy_quality": (
            f"Energy per good answer and quality ({overall}). Mean with 95% interval; hollow: infeasible.",
            lambda: energy_quality(summary, problem, overall),
        ),
        "intervals": (
            f"Comparison over units of replication ({overall}). Interquartile means, and the probability of "
            f"less energy per good answer than {results.baseline.iloc[0]} on the same requests, with 95% "
            "intervals where there are units enough; hollow: infeasible.",
            lambda: intervals(results, overall),
        ),
        "performance_profile": (
            f"Performance profiles ({overall}). Share of the units of replication whose energy per good "
            "answer is at most so many times that of static on the same requests, with 95% intervals; up and "
            "left is better.",
            lambda: performance_profiles(episodes, overall),
        ),
        "tradeoff": (
            f"Quality and latency against energy ({overall}). Small: episodes; large: means.",
            lambda: tradeoff(episodes, summary, overall),
        ),
    }  # fmt: skip
    if examples:
        first = next(iter(examples.values()))
        episode = f"{where}; scenario {problem.scenario.name}, seed {first.seeds[0]}"
        drawings |= {
            "power_temperature": (
                f"Power and temperature ({episode}). The temperature limit is virtual: the scenario sets it, "
                "far below the hardware's.",
                lambda: power_temperature(problem, examples, episode),
            ),
            "knobs": (f"What the policies set ({episode}).", lambda: knobs(problem, examples, episode)),
            "service": (
                f"Load, queue, latency and quality ({episode}). Load is the same for all.",
                lambda: service(problem, examples, episode),
            ),
            "experts": (
                f"Use of the experts ({episode}), relative to an even load.",
                lambda: experts(examples, episode),
            ),
        }  # fmt: skip
    return [
        (caption, save_figure(draw, folder / f"{name}.png")) for name, (caption, draw) in drawings.items()
    ]


def save_figure(draw: Callable[[], Figure], path: Path) -> Path:
    """Draw a figure in the common style into a PNG file; the same figure gives the same bytes."""
    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw().savefig(picture, format="png", metadata={"Software": ""})
    write_file(path, picture.getvalue())
    return path


def _time_s(recording: Recording) -> np.ndarray:
    return (np.arange(len(recording.reward)) + 1) * recording.interval_s


def _shade_stages(axes: Axes, recording: Recording) -> None:
    """Colour the background by thermal stage."""
    stage, dt = recording.field("stage")[:, 0].round().astype(int), recording.interval_s
    edges = np.flatnonzero(np.diff(stage, prepend=-1, append=-1))
    for level in range(1, len(STAGES)):
        spans = [(i * dt, (j - i) * dt) for i, j in pairwise(edges) if stage[i] == level]
        style = {"color": _STAGE_COLOUR[level], "lw": 0, "zorder": 0}
        axes.broken_barh(spans, (0.0, 1.0), transform=axes.get_xaxis_transform(), **style)


def power_temperature(problem: Problem, examples: dict[str, Recording], where: str) -> Figure:
    """Power under its budget and temperature under its limit, a row per policy."""
    figure = Figure(figsize=(10.0, 1.0 + 1.7 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), 2, sharex=True, sharey="col", squeeze=False)
    colour, limit = colours(list(examples)), problem.limit_c
    for (left, right), (name, recording) in zip(grid, examples.items(), strict=True):
        time_s, budget = _time_s(recording), recording.budget_w[:, 0]
        for axes in (left, right):
            _shade_stages(axes, recording)
            axes.set_title(name, color=colour[name])
        left.plot(time_s, recording.gpu["power_w"][:, 0], color=colour[name])
        left.step(time_s, budget, where="pre", color="black", lw=0.9)
        left.set_ylabel("power (W)")
        right.plot(time_s, recording.gpu["temp_c"][:, 0], color=colour[name])
        right.axhline(limit, color="black", ls="--", lw=0.9)
        right.set_ylabel("die temperature (°C)")
    for axes in grid[-1]:
        axes.set_xlabel("time (s)")
    stages = [Patch(color=c, label=s) for s, c in zip(STAGES[1:], _STAGE_COLOUR[1:], strict=True)]
    lines = [
        Line2D([], [], color="black", lw=0.9, label="power budget"),
        Line2D([], [], color="black", lw=0.9, ls="--", label=f"virtual limit {limit:g} °C"),
    ]
    figure.legend(handles=[*lines, *stages], loc="outside lower center", ncols=5)
    figure.suptitle(f"Power and temperature, {where}")
    return figure


def knobs(problem: Problem, examples: dict[str, Recording], where: str) -> Figure:
    """Level of every controlled knob over time, a column per policy."""
    names, colour = problem.knobs.controlled, colours(list(examples))
    size = (max(7.0, 0.8 + 2.4 * len(examples)), 0.8 + 1.4 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(names), len(examples), sharex=True, sharey="row", squeeze=False)
    for row, name in zip(grid, names, strict=True):
        levels = problem.knobs.levels[name]
        for axes, (policy, recording) in zip(row, examples.items(), strict=True):
            index = recording.index[:, 0, KNOB_NAMES.index(name)]
            axes.step(_time_s(recording), index, where="pre", color=colour[policy])
            axes.set_yticks(range(len(levels)), [f"{level:g}" for level in levels])
            axes.set_ylim(-0.3, len(levels) - 0.7)
        unit = KNOBS[name][0]
        row[0].set_ylabel(name if unit == "1" else f"{name}\n({unit})")
    for axes, policy in zip(grid[0], examples, strict=True):
        axes.set_title(policy, color=colour[policy])
    for axes in grid[-1]:
        axes.set_xlabel("time (s)")
    figure.suptitle(f"Knobs, {where}")
    return figure


def _windows(values: np.ndarray, interval_s: float, window_s: float) -> np.ndarray:
    """Sums over windows: [T, ...] to [T / window, ...]; a rest at the end is a window of its own."""
    return np.add.reduceat(values, np.arange(0, len(values), max(1, round(window_s / interval_s))), axis=0)


def service(problem: Problem, examples: dict[str, Recording], where: str) -> Figure:
    """Load, queue, latency and quality over time, policies overlaid."""
    figure = Figure(figsize=(10.0, 8.5), layout="constrained")
    load, interactive, deferrable, latency, quality = figure.subplots(5, 1, sharex=True)
    colour, capacity = colours(list(examples)), problem.capacity_rps
    first = next(iter(examples.values()))
    load.step(_time_s(first), first.field("load")[:, 0], where="pre", color="black")
    for at in np.flatnonzero(np.diff(first.work["shift_id"][:, 0])) + 1:
        quality.axvline(at * first.interval_s, color="#bbbbbb", lw=0.8, ls=":", zorder=0)
    for name, recording in examples.items():
        time_s, work, dt = _time_s(recording), recording.work[:, 0], recording.interval_s
        style = {"color": colour[name], "label": name}
        for panel, waiting in zip((interactive, deferrable), work["waiting"].T, strict=True):
            panel.plot(time_s, waiting / capacity, **style)
        histogram = _windows(recording.histogram[:, 0], dt, _WINDOW_S)
        middle = np.minimum((np.arange(len(histogram)) + 0.5) * _WINDOW_S, time_s[-1])
        latency.plot(middle, [latency_quantile(row, 0.95) for row in histogram], **style)
        answered = _windows(work["answered"].sum(axis=-1), dt, _WINDOW_S)
        correct = _windows(work["correct"], dt, _WINDOW_S)
        share = np.divide(correct, answered, out=np.full_like(correct, np.nan), where=answered > 0)
        quality.plot(middle, share, **style)
    for kind, deadline in zip(REQUEST_CLASSES, problem.scenario.service.deadline_s, strict=True):
        latency.axhline(deadline, color="black", ls="--", lw=0.8)
        latency.annotate(f"deadline, {kind}", (0.0, deadline), (2, 2), textcoords="offset points", fontsize=7)
    log_scale(latency, "y")
    latency.set_ylim(top=4.0 * max(problem.scenario.service.deadline_s))  # room for the labels
    titles = {
        load: "load (arrivals over the standard service's capacity)",
        interactive: "waiting, interactive (seconds of capacity)",
        deferrable: "waiting, deferrable (seconds of capacity)",
        latency: f"latency (s), 95th percentile of all answers over {_WINDOW_S:g} s",
        quality: f"quality (correct over answered, {_WINDOW_S:g} s); dotted: the inputs change",
    }
    for axes, title in titles.items():
        axes.set_title(title)
        axes.margins(x=0.01)
    quality.set_xlabel("time (s)")
    handles, labels = interactive.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"Service, {where}")
    return figure


def experts(examples: dict[str, Recording], where: str) -> Figure:
    """Tokens per expert relative to an even load: over time, and per layer over the episode."""
    figure = Figure(figsize=(10.0, 1.0 + 1.9 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), 2, squeeze=False, width_ratios=(2, 1))
    share = {}
    for name, recording in examples.items():
        tokens = recording.tokens_per_expert[:, 0]  # [T, L, E]
        over_time = _windows(tokens.sum(1), recording.interval_s, 2 * _WINDOW_S)  # [windows, E]
        share[name] = [
            table / np.maximum(table.mean(-1, keepdims=True), 1e-12) for table in (over_time, tokens.sum(0))
        ]
    everything = np.concatenate([table.ravel() for pair in share.values() for table in pair])
    top = max(1.5, float(np.quantile(everything, 0.99)))
    for (left, right), (name, (over_time, per_layer)) in zip(grid, share.items(), strict=True):
        end = float(_time_s(examples[name])[-1])
        style = {"aspect": "auto", "cmap": "cividis", "vmin": 0.0, "vmax": top, "interpolation": "nearest"}
        count, layers = over_time.shape[1], len(per_layer)
        left.imshow(over_time.T, extent=(0.0, end, count - 0.5, -0.5), **style)
        right.imshow(per_layer, extent=(-0.5, count - 0.5, layers - 0.5, -0.5), **style)
        left.set(ylabel="expert", title=f"{name} (all layers)")
        right.set(ylabel="layer", title="whole episode")
        right.set_yticks(range(layers))
        for axes in (left, right):
            axes.grid(False)
    grid[-1][0].set_xlabel("time (s)")
    grid[-1][1].set_xlabel("expert")
    figure.colorbar(grid[-1][1].images[0], ax=grid, label="tokens, 1 = even load", aspect=30, extend="max")
    figure.suptitle(f"Expert use, {where}")
    return figure


def _energy_unit(joules: pd.Series) -> tuple[float, str]:
    """Factor and unit in which small energies read well."""
    return (1e3, "mJ") if joules.replace(np.inf, np.nan).min() < 0.1 else (1.0, "J")


def energy_quality(summary: pd.DataFrame, problem: Problem, where: str) -> Figure:
    """Energy per good answer and quality per policy, with intervals."""
    factor, unit = _energy_unit(summary.j_per_good)
    figure = Figure(figsize=(10.0, 1.3 + 0.42 * len(summary)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colour = colours(list(summary.policy))
    for axes, name, scale in ((left, "j_per_good", factor), (right, "quality", 1.0)):
        for y, row in enumerate(summary.to_dict("records")):
            own = colour[row["policy"]]
            axes.plot([row[f"{name}_low"] * scale, row[f"{name}_high"] * scale], [y, y], color=own, lw=2)
            fill = "white" if row["infeasible"] else own
            axes.plot(row[name] * scale, y, "o", color=own, mfc=fill, ms=7, mew=1.6)
    labels = np.where(summary.infeasible == "", summary.policy, summary.policy + " (infeasible)")
    left.set_yticks(range(len(summary)), labels.tolist())
    left.set_ylim(len(summary) - 0.5, -0.5)
    left.set_title(f"energy per good answer ({unit})")
    right.set_title("quality (correct over answered)")
    static = summary[summary.policy == "static"]
    if len(static):
        floor = float(static.quality.iloc[0]) * problem.scenario.feasible.quality_share
        right.axvline(floor, color="black", ls="--", lw=0.9)
        right.annotate("floor", (floor, 0), (3, 8), textcoords="offset points", fontsize=8)
    figure.suptitle(f"Energy and quality, {where}")
    return figure


def intervals(results: pd.DataFrame, where: str) -> Figure:
    """Interquartile means and the probability of improvement per policy, with intervals over units."""
    factor, unit = _energy_unit(results.j_per_good)
    panels = {
        "j_per_good": (factor, f"{unit} per good answer"),
        "vs_static": (1.0, "over static's"),
        "return": (1.0, "return"),
        "p_improvement": (1.0, "P(improvement)"),
    }
    figure = Figure(figsize=(10.0, 1.3 + 0.42 * len(results)), layout="constrained")
    grid, colour = figure.subplots(1, len(panels), sharey=True), colours(list(results.policy))
    for axes, (name, (scale, title)) in zip(grid, panels.items(), strict=True):
        for y, row in enumerate(results.to_dict("records")):
            own = colour[row["policy"]]
            axes.plot([row[f"{name}_low"] * scale, row[f"{name}_high"] * scale], [y, y], color=own, lw=2)
            fill = "white" if row["infeasible"] else own
            axes.plot(row[name] * scale, y, "o", color=own, mfc=fill, ms=6, mew=1.5)
        axes.set_title(title)
    grid[1].axvline(1.0, color="black", ls="--", lw=0.9)
    grid[-1].axvline(0.5, color="black", ls="--", lw=0.9)
    grid[-1].set(xlim=(-0.03, 1.03), xlabel=f"over {results.baseline.iloc[0]}")
    labels = results.policy + " (" + results.units.astype(str) + " " + results.unit + "s)"
    grid[0].set_yticks(range(len(results)), labels.tolist())
    grid[0].set_ylim(len(results) - 0.5, -0.5)
    figure.suptitle(f"Interquartile means over units, {where}")
    return figure


def performance_profiles(episodes: pd.DataFrame, where: str) -> Figure:
    """Share of units whose energy per good answer over static's is at most a threshold, per policy."""
    ratios = ratios_to_static(episodes)
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    axes, colour = figure.subplots(), colours(list(episodes.policy.unique()))
    known = np.concatenate([[1.0], *(values[np.isfinite(values)] for values in ratios.values())])
    thresholds = np.linspace(0.0, 1.05 * known.max(), 1001)
    for name, values in ratios.items():
        share = performance_profile(values, thresholds)
        low, high = share_interval(share, len(values))
        axes.step(thresholds, share, where="post", color=colour[name], label=f"{name} ({len(values)})")
        axes.fill_between(thresholds, low, high, step="post", color=colour[name], alpha=0.12, lw=0)
    axes.axvline(1.0, color="black", ls="--", lw=0.9)
    axes.margins(x=0.0)
    axes.set(xlabel="energy per good answer over static's", ylabel="share of units (their number)")
    figure.legend(loc="outside lower center", ncols=5)
    figure.suptitle(f"Performance profiles, {where}")
    return figure


def tradeoff(episodes: pd.DataFrame, summary: pd.DataFrame, where: str) -> Figure:
    """Quality and latency against energy per good answer, a point per episode and a large one per policy."""
    factor, unit = _energy_unit(summary.j_per_good)
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colour = colours(list(summary.policy))
    for axes, name in ((left, "quality"), (right, "latency_p95_s")):
        for row in summary.to_dict("records"):
            policy, x = row["policy"], row["j_per_good"] * factor
            own, played = colour[policy], episodes[(episodes.policy == policy) & episodes.whole]
            axes.scatter(played.j_per_good * factor, played[name], s=12, color=own, alpha=0.35, lw=0)
            fill = "white" if row["infeasible"] else own
            axes.plot(x, row[name], "o", color=own, mfc=fill, ms=9, mew=1.8, label=policy)
        axes.set_xlabel(f"energy per good answer ({unit})")
    left.set_title("quality (up and left is better)")
    right.set_title("95th percentile latency, s (down and left is better)")
    log_scale(right, "y")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"Accuracy, energy and latency, {where}")
    return figure
