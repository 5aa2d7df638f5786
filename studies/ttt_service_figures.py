"""Figures of the study of adaptation in the service, in the style of the evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from agents.play.metrics import student_interval
from agents.play.rollout import Recording
from moe.workload import KNOB_NAMES
from studies.ttt_service_results import BASELINE, EXTRA, changes_of_shift

_COLOURS = {
    BASELINE: "#555555", "always": "#D55E00", "periodic": "#009E73", "entropy": "#CC79A7",
    "change": "#56B4E9", "thermal": "#7A4FBF", "rule_based": "#0072B2",
}  # fmt: skip
_TRAINED = "#E69F00"
Episodes = Mapping[str, Mapping[int, Recording]]
"""Single episodes by policy and seed."""
BEFORE_S, AFTER_S = 8.0, 25.0
"""Time shown around a change of shift."""
_TTT_STEPS = KNOB_NAMES.index("ttt_steps")
_PANELS: tuple[tuple[str, str, float, float | None], ...] = (
    ("error", "error (%)", 100.0, None),
    ("energy", "energy per request (mJ)", 1e3, None),
    (EXTRA, f"energy per additional good\nanswer against {BASELINE} (mJ)", 1e3, None),
    ("late_fraction", "late (%)", 100.0, 1.0),
    ("above_limit_s", "time above the virtual\nlimit (s per episode)", 1.0, 1.0),
)
"""Indicator, title, factor to the shown unit, and the least upper end of the axis."""


def policy_colours(policies: Sequence[str]) -> dict[str, str]:
    """A colour per policy, the same in every figure."""
    return {name: _COLOURS.get(name, _TRAINED) for name in policies}


def courses(episode: Recording) -> dict[str, np.ndarray]:
    """What is drawn over time, [T] each; accuracy is NaN where nothing was answered."""
    work = episode.work[:, 0]
    answered = work["answered"].sum(axis=-1)
    share = np.divide(work["correct"], answered, out=np.full(len(work), np.nan), where=answered > 0)
    return {
        "power (W)": episode.gpu["power_w"][:, 0],
        "die temperature (°C)": episode.gpu["temp_c"][:, 0],
        "accuracy (%)": 100.0 * share,
        "adapting": (episode.index[:, 0, _TTT_STEPS] > 0).astype(np.float64),
    }


def find_changes(episodes: Episodes) -> list[tuple[int, int]]:
    """Changes of shift with room around them to be drawn, (seed, first interval); of the seeds all share."""
    first = next(iter(episodes.values()))
    seeds = sorted(set.intersection(*(set(own) for own in episodes.values())))
    return [
        (seed, t) for seed in seeds for t in changes_of_shift(first[seed], *_room(first[seed].interval_s))
    ]


def _room(interval_s: float) -> tuple[int, int]:
    """Intervals shown before and after a change."""
    return round(BEFORE_S / interval_s), round(AFTER_S / interval_s)


def around_shift(
    episodes: Episodes, changes: Sequence[tuple[int, int]], limit_c: float, where: str
) -> Figure:
    """Power, temperature and accuracy around changes of shift, policies overlaid.

    The left column is one change, that after which the first policy lost most accuracy; the right one the
    mean over all changes, with 95% intervals.

    Args:
        episodes: what was played, in any world.
        changes: as `find_changes` finds them, at least one.
        limit_c: virtual temperature limit.
        where: origin of the numbers, for the title.
    """
    policies = list(episodes)
    interval_s = next(iter(episodes[policies[0]].values())).interval_s
    before, after = _room(interval_s)
    windows = {policy: _windows(own, changes, before, after) for policy, own in episodes.items()}
    accuracy = windows[policies[0]]["accuracy (%)"]
    loss = np.nanmean(accuracy[:, :before], axis=1) - np.nanmean(accuracy[:, before:], axis=1)
    chosen = int(np.nanargmax(loss))
    time_s = (np.arange(-before, after) + 0.5) * interval_s
    colour = policy_colours(policies)
    rows = list(windows[policies[0]])
    figure = Figure(figsize=(10.0, 7.6), layout="constrained")
    grid = figure.subplots(len(rows), 2, sharex=True, sharey="row", height_ratios=(3, 3, 3, 1.2))
    for (left, right), name in zip(grid, rows, strict=True):
        for policy, own in windows.items():
            style = "steps-mid" if name == "adapting" else "default"
            left.plot(time_s, own[name][chosen], color=colour[policy], drawstyle=style)
            _mean_course(right, time_s, own[name], colour[policy])
        left.set_ylabel(name)
        for axes in (left, right):
            axes.axvline(0.0, color="black", ls=":", lw=0.9)
    for axes in grid[1]:
        axes.axhline(limit_c, color="black", ls="--", lw=0.9)
    for axes in grid[-1]:
        axes.set(xlabel="time from the change of shift (s)", ylim=(-0.1, 1.1), yticks=(0, 1))
    seed, at = changes[chosen]
    grid[0][0].set_title(f"one change: seed {seed}, {at * interval_s:g} s")
    grid[0][1].set_title(f"mean of {len(changes)} changes, 95% interval")
    handles = [Line2D([], [], color=c, label=policy) for policy, c in colour.items()]
    handles.append(Line2D([], [], color="black", ls="--", lw=0.9, label=f"virtual limit {limit_c:g} °C"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    figure.suptitle(f"Around a change of shift, {where}")
    return figure


def _windows(
    episodes: Mapping[int, Recording], changes: Sequence[tuple[int, int]], before: int, after: int
) -> dict[str, np.ndarray]:
    """What is drawn around every change (seed, interval), [changes, before + after] each."""
    over_time = {seed: courses(episodes[seed]) for seed, _ in changes}
    names = next(iter(over_time.values()))
    return {
        name: np.stack([over_time[seed][name][t - before : t + after] for seed, t in changes])
        for name in names
    }


def _mean_course(axes: Axes, time_s: np.ndarray, windows: np.ndarray, colour: str) -> None:
    mean, low, high = np.array([student_interval(column[np.isfinite(column)]) for column in windows.T]).T
    axes.plot(time_s, mean, color=colour)
    axes.fill_between(time_s, low, high, color=colour, alpha=0.2, lw=0)


def overview(tables: Mapping[str, pd.DataFrame], titles: Mapping[str, str], where: str) -> Figure:
    """The indicators that decide, a row of panels per variant.

    Args:
        tables: by variant, as `studies.ttt_service_results.compare` makes them.
        titles: of the variants.
        where: origin of the numbers, for the title.
    """
    height = sum(0.7 + 0.24 * len(table) for table in tables.values())
    figure = Figure(figsize=(13.0, 1.2 + height), layout="constrained")
    ratios = [0.7 + 0.24 * len(table) for table in tables.values()]
    grid = figure.subplots(len(tables), len(_PANELS), squeeze=False, sharex="col", height_ratios=ratios)
    colour = policy_colours(list(dict.fromkeys(name for table in tables.values() for name in table.policy)))
    for row, (variant, table) in zip(grid, tables.items(), strict=True):
        for axes, (name, _, factor, _) in zip(row, _PANELS, strict=True):
            for y, values in enumerate(table.to_dict("records")):
                _draw(axes, name, values, factor, y, colour[values["policy"]])
            axes.set_ylim(len(table) - 0.4, -0.6)
            axes.set_yticks(range(len(table)), list(table.policy) if axes is row[0] else [""] * len(table))
        row[0].set_ylabel(titles[variant])
    for axes, (_, title, _, least) in zip(grid[0], _PANELS, strict=True):
        axes.set_title(title)
        if least is not None:
            axes.set_xlim(0.0, max(least, axes.get_xlim()[1]))
    figure.suptitle(f"Adaptation in the service, {where}; 95% intervals; light: energy of adapting")
    return figure


def _draw(axes: Axes, name: str, values: dict[str, Any], factor: float, y: int, colour: str) -> None:
    """A policy in a panel: the two parts of its energy as a bar, else a point with its interval."""
    if name == "energy":
        serving, adapting = values["serving_j_per_request"], values["adapting_j_per_request"]
        axes.barh(y, serving * factor, height=0.6, color=colour)
        axes.barh(y, adapting * factor, left=serving * factor, height=0.6, color=colour, alpha=0.4)
        return
    axes.plot([values[f"{name}_low"] * factor, values[f"{name}_high"] * factor], [y, y], color=colour, lw=2)
    axes.plot(values[name] * factor, y, "o", color=colour, ms=6, clip_on=False)
