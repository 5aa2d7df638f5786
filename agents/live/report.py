"""The comparison of both worlds for readers: a table, figures, and the document fidelity.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table

from agents.evaluation.figures import colours, log_scale, save_figure
from agents.evaluation.results import markdown_text
from agents.files import write_file
from agents.live.compare import QUANTITIES, Comparison, Pair, Quantity, twin_problem
from agents.live.episodes import LiveEpisodes
from thermoe_env.problem.scenario import Scenario

_TWIN_COLOUR = "#D55E00"
_LIVE_COLOUR = "#222222"


@dataclass(frozen=True)
class Cell:
    """One policy and quantity as shown."""

    live: str
    twin: str
    gap: str
    """With its range over episodes, where there are several."""
    verdict: str
    """`met`, `not met`, or empty where nothing is aimed at."""


def cell(comparison: Comparison, policy: str, quantity: Quantity) -> Cell:
    """Means over the episodes of a policy as text."""
    own = comparison.episodes[comparison.episodes.policy == policy]
    live, twin = (
        _number(own[f"{quantity.name}_{side}"].mean() * quantity.factor, quantity.digits)
        for side in ("live", "twin")
    )
    gaps = comparison.gaps(policy, quantity)
    gap = _signed(float(gaps.mean()))
    if len(gaps) > 1:
        gap += f" [{_signed(float(gaps.min()))} to {_signed(float(gaps.max()))}]"
    met = comparison.met(policy, quantity)
    return Cell(live, twin, f"{gap} {quantity.gap_unit}", "" if met is None else "met" if met else "not met")


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "∞" if math.isinf(value) else "-"


def _signed(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else "-"


def aims() -> list[str]:
    """What is aimed at, as text."""
    return [
        f"{q.head.partition(',')[0]} within {q.aim:g} {q.gap_unit}" for q in QUANTITIES if q.aim is not None
    ]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table, the ranking, and whether all aims are met."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in ("policy", "quantity", "live", "twin", "gap", "aim"):
        table.add_column(head, justify="left" if head in ("policy", "quantity", "aim") else "right")
    for policy in comparison.policies:
        for i, quantity in enumerate(QUANTITIES):
            shown = cell(comparison, policy, quantity)
            style = "red" if shown.verdict == "not met" else "green" if shown.verdict else None
            last = i == len(QUANTITIES) - 1
            table.add_row(
                policy if i == 0 else "", quantity.head, shown.live, shown.twin, shown.gap, shown.verdict,
                style=style, end_section=last,
            )  # fmt: skip
    console.print(table)
    console.print(ranking_text(comparison), highlight=False)
    console.print("all aims met" if comparison.all_met else "not all aims met", highlight=False)


def ranking_text(comparison: Comparison) -> str:
    """Whether both worlds rank the policies alike."""
    ranking = comparison.ranking
    if not ranking.live:
        return "No seed was played by every policy, so there is no ranking."
    live, twin = (" < ".join(order) for order in (ranking.live, ranking.twin))
    if ranking.same:
        return f"Both worlds rank the policies by energy per good answer alike: {live}."
    return f"The worlds rank the policies by energy per good answer differently: live {live}; twin {twin}."


# ---------------------------------------------------------------- figures


def traces(pairs: Sequence[Pair], where: str) -> Figure:
    """Power and temperature over time, live against twin, a row per policy."""
    figure = Figure(figsize=(10.0, 1.0 + 1.7 * len(pairs)), layout="constrained")
    grid = figure.subplots(len(pairs), 2, sharex=True, sharey="col", squeeze=False)
    for (left, right), pair in zip(grid, pairs, strict=True):
        for recording, colour in ((pair.live.recording, _LIVE_COLOUR), (pair.twin, _TWIN_COLOUR)):
            time_s = (np.arange(len(recording.reward)) + 1) * recording.interval_s
            left.plot(time_s, recording.gpu["power_w"][:, 0], color=colour)
            right.plot(time_s, recording.gpu["temp_c"][:, 0], color=colour)
        left.set(title=pair.twin.policy, ylabel="power (W)")
        right.set(title=pair.twin.policy, ylabel="die temperature (°C)")
    for axes in grid[-1]:
        axes.set_xlabel("time (s)")
    lines = [
        Line2D([], [], color=_LIVE_COLOUR, label="live"),
        Line2D([], [], color=_TWIN_COLOUR, label="twin (simulated)"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
    figure.suptitle(f"Power and temperature in both worlds, {where}")
    return figure


_SCATTERED = ("energy_j", "quality", "peak_c", "latency_p95_s")


def scatter(comparison: Comparison, where: str) -> Figure:
    """Live against twin, a point per episode; between the dashed lines the aim is met."""
    figure = Figure(figsize=(10.0, 8.6), layout="constrained")
    colour = colours(comparison.policies)
    quantities = {q.name: q for q in QUANTITIES}
    for axes, name in zip(figure.subplots(2, 2).flat, _SCATTERED, strict=True):
        quantity, table = quantities[name], comparison.episodes
        shown = {side: table[f"{name}_{side}"] * quantity.factor for side in ("live", "twin")}
        for policy in comparison.policies:
            own = table.policy == policy
            style = {"color": colour[policy], "label": policy, "s": 40, "alpha": 0.8, "lw": 0}
            axes.scatter(shown["live"][own], shown["twin"][own], **style)
        both = np.concatenate([shown["live"], shown["twin"]])
        low, high = float(np.nanmin(both)), float(np.nanmax(both))
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        line = np.linspace(low - pad, high + pad, 200)
        axes.plot(line, line, color="black", lw=0.8)
        if quantity.aim is not None:
            for sign in (-1.0, 1.0):
                off = (
                    line * (1.0 + sign * quantity.aim / 100.0)
                    if quantity.relative
                    else line + sign * quantity.aim
                )
                axes.plot(line, off, color="black", lw=0.7, ls="--")
        axes.set(
            xlabel="live",
            ylabel="twin (simulated)",
            title=quantity.head,
            xlim=line[[0, -1]],
            ylim=line[[0, -1]],
        )
        if name == "latency_p95_s" and low > 0.0:
            log_scale(axes, "x", "y")
            axes.set(xlim=(0.8 * low, 1.25 * high), ylim=(0.8 * low, 1.25 * high))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"Both worlds, {where}; dashed: the aim")
    return figure


# ---------------------------------------------------------------- the document


def write_fidelity(
    docs: Path, live: LiveEpisodes, scenario: Scenario, pairs: Sequence[Pair], comparison: Comparison
) -> Path:
    """Write fidelity.md, and its figures into the folder `fidelity` beside it.

    Args:
        docs: where they go.
        live: what was recorded.
        scenario: what the twin played; its profile and twin may be others than the recorded ones.
        pairs: episodes in both worlds.
        comparison: of these pairs.
    """
    first = pairs[0].live
    seeds = sorted({int(pair.twin.seeds[0]) for pair in pairs})
    where = f"{first.recording.origin}; scenario {scenario.name}"
    shown = min(seeds, key=lambda seed: (-sum(int(p.twin.seeds[0]) == seed for p in pairs), seed))
    by_policy = {p.twin.policy: p for p in pairs if int(p.twin.seeds[0]) == shown}
    examples = [by_policy[policy] for policy in comparison.policies if policy in by_policy]
    save_figure(lambda: traces(examples, f"{where}, seed {shown}"), docs / "fidelity" / "traces.png")
    save_figure(lambda: scatter(comparison, where), docs / "fidelity" / "scatter.png")
    problem = twin_problem(scenario, first.recording.world, live.capacity_rps, pairs[0].idle_c)
    machines = [dict(items) for items in dict.fromkeys(tuple(pair.live.machine.items()) for pair in pairs)]
    arrived = comparison.episodes.arrived_twin / comparison.episodes.arrived_live - 1.0
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["markdown"] = markdown_text
    text = environment.get_template("fidelity.md.j2").render(
        world=first.recording.world,
        origin=first.recording.origin,
        machines=machines,
        dates=sorted({pair.live.began[:10] for pair in pairs}),
        scenario=scenario,
        seeds=seeds,
        shown_seed=shown,
        policies=comparison.policies,
        recipes={pair.twin.policy: _recipe(pair.live.recipe) for pair in pairs},
        quantities=QUANTITIES,
        gaps={p: {q.name: cell(comparison, p, q) for q in QUANTITIES} for p in comparison.policies},
        aims=aims(),
        all_met=comparison.all_met,
        ranking=ranking_text(comparison),
        episodes=comparison.episodes.to_dict("records"),
        profile=problem.profile,
        twin=problem.twin,
        same_weights=all(m["weights_sha256"] == problem.profile.model["weights_sha256"] for m in machines),
        arrived_gap=float(np.abs(arrived).max()),
        lost=live.lost,
        signed=_signed,
    )
    path = docs / "fidelity.md"
    write_file(path, text)
    return path


def _recipe(recipe: dict[str, Any]) -> str:
    """A policy in words."""
    if "constant" in recipe:
        return "constant: " + ", ".join(f"{name} {value:g}" for name, value in recipe["constant"].items())
    if "rules" in recipe:
        return "the rules, with thresholds as recorded"
    return f"trained model {Path(recipe['model']).name}"
