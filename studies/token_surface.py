"""Joules and quality of tokens over running sequences, experts per token and experts read, from a profile.

``python -m studies.token_surface --profile h200-generate`` writes the tables and figures of a profile;
nothing is measured (`python -m moe.profiling tokens` does that).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from agents.evaluation.figures import log_scale, save_figure
from agents.files import write_file
from moe.errors import one_line_errors
from moe.lm.config import readable_experts
from moe.token_profile import CostCell, QualityCell, TokenProfile, load_token_profile
from thermoe_env.configs import config_path

WITHIN = 0.01
"""Relative loss of accuracy within which the cheapest setting is looked for."""
Level = TypeVar("Level", int, float)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Of experts per token, from the training's down."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw a profile of tokens."""

    profile: str = "h200-generate"
    """A name in configs/profiles or the path of a JSON file."""
    out: Path = Path("runs/token_surface")
    """Folder of the tables and the figures."""


class Point(NamedTuple):
    """A setting whose cost and quality were both measured."""

    running: int
    top_k: int
    routing_bias: float
    accuracy: float
    mj_per_token: float
    ms: float


class Saving(NamedTuple):
    """The cheapest setting within `WITHIN` of the standard accuracy, and its relative differences from it."""

    best: Point
    accuracy: float
    mj_per_token: float
    ms: float


def mj_per_row(cell: CostCell) -> float:
    """Millijoules above idle per row of a step."""
    assert cell.energy_j is not None
    return 1e3 * cell.energy_j / (cell.decode_rows + cell.prefill_rows)


def decode_steps(profile: TokenProfile) -> list[CostCell]:
    """Steps without prompts, at the context where the grid was measured."""
    alone = [cell for cell in profile.cost.cells if not (cell.prefill_rows or cell.held_out)]
    ((context, _),) = Counter(cell.context for cell in alone).most_common(1)
    return [cell for cell in alone if cell.context == context]


def surface(profile: TokenProfile) -> list[Point]:
    """Decode steps whose quality was measured too."""
    cost = {(c.decode_rows, c.top_k, c.readable): c for c in decode_steps(profile)}
    n_experts = profile.cost.config["n_experts"]
    points = []
    for answers in profile.quality.cells:
        readable = readable_experts(answers.routing_bias, n_experts, answers.top_k)
        cell = cost.get((answers.running, answers.top_k, readable))
        if cell is not None:
            knobs = answers.running, answers.top_k, answers.routing_bias
            points.append(Point(*knobs, answers.accuracy, mj_per_row(cell), 1e3 * cell.step_s))
    return points


def savings(points: Iterable[Point], trained: int) -> list[Saving]:
    """What the cheapest setting saves, per number of running sequences."""
    found = []
    for running in _ascending(point.running for point in points):
        some = [point for point in points if point.running == running]
        standard = next(point for point in some if (point.top_k, point.routing_bias) == (trained, 0.0))
        near = [point for point in some if point.accuracy >= (1 - WITHIN) * standard.accuracy]
        best = min(near, key=lambda point: point.mj_per_token)
        gaps = (getattr(best, n) / getattr(standard, n) - 1 for n in ("accuracy", "mj_per_token", "ms"))
        found.append(Saving(best, *gaps))
    return found


def page(profile: TokenProfile) -> str:
    """The tables, as Markdown."""
    steps, answers, trained = decode_steps(profile), profile.quality.cells, profile.quality.top_k
    experts, biases = _ascending(c.readable for c in steps)[::-1], _ascending(c.routing_bias for c in answers)
    cost = {(c.decode_rows, c.top_k, c.readable): _shown_cost(c) for c in steps}
    quality = {(c.running, c.top_k, c.routing_bias): _shown_quality(c) for c in answers}
    prompts = [cell for cell in profile.cost.cells if cell.prefill_rows and not cell.held_out]
    prompts.sort(key=lambda cell: (cell.decode_rows, cell.prefill_rows, -cell.top_k))
    lines = [
        f"Decode steps at context {steps[0].context}: ms per step, **mJ per token** above idle, experts of a "
        "layer that were read.", "",
        *_grid(cost, [f"{n} readable" for n in experts], experts),
        "", "Accuracy in %, and its difference from the standard service's in points.", "",
        *_grid(quality, [f"bias {bias:g}" for bias in biases], biases),
        "", f"The cheapest knobs within {WITHIN:.0%} of the standard accuracy (top_k {trained}, bias 0).", "",
        *_table(
            ("running", "top_k", "bias", "accuracy", "mJ per token", "ms"),
            [
                (s.best.running, s.best.top_k, f"{s.best.routing_bias:g}", f"{s.accuracy:+.1%}",
                 f"{s.mj_per_token:+.0%}", f"{s.ms:+.0%}")
                for s in savings(surface(profile), trained)
            ],
        ),
        "", "Steps that read a chunk of prompts, alone and beside answers.", "",
        *_table(
            ("decode rows", "prompt rows", "top_k", "ms", "mJ per row"),
            [
                (c.decode_rows, c.prefill_rows, c.top_k, f"{1e3 * c.step_s:.3f}", f"{mj_per_row(c):.3g}")
                for c in prompts
            ],
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw_cost(profile: TokenProfile) -> Figure:
    """Energy per token against running sequences, a curve per top_k, all experts readable and the fewest."""
    steps = decode_steps(profile)
    limits = [n for n in _ascending(cell.readable for cell in steps) if n >= profile.quality.top_k]
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for readable, style in ((limits[-1], "o-"), (limits[0], "s:")):
        for top_k, colour in _coloured(cell.top_k for cell in steps):
            curve = sorted(
                (c.decode_rows, mj_per_row(c)) for c in steps if (c.top_k, c.readable) == (top_k, readable)
            )
            name = f"{top_k} per token, {readable} readable"
            ax.plot(*zip(*curve, strict=True), style, ms=4, color=colour, label=name)
    log_scale(ax, "x", "y")
    counts = _ascending(cell.decode_rows for cell in steps)
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.set(xlabel="running sequences", ylabel="mJ per token above idle", title=_origin(profile))
    ax.legend(ncols=2, fontsize=8)
    return figure


def draw_front(profile: TokenProfile) -> Figure:
    """Accuracy against energy per token: a panel per number of sequences, a curve per top_k over biases."""
    points = [point for point in surface(profile) if point.running > 1]
    counts = _ascending(point.running for point in points)
    figure, axes = plt.subplots(
        1, len(counts), figsize=(3.2 * len(counts), 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, running in zip(axes[0], counts, strict=True):
        for top_k, colour in _coloured(point.top_k for point in points):
            curve = sorted(
                (point.routing_bias, point.mj_per_token, 100 * point.accuracy)
                for point in points
                if (point.running, point.top_k) == (running, top_k)
            )
            _, energy, accuracy = zip(*curve, strict=True)
            ax.plot(energy, accuracy, "o-", ms=4, color=colour, label=f"{top_k} per token")
        ax.set(title=f"{running} running sequences", xlabel="mJ per token above idle")
    axes[0][0].set_ylabel("next-token accuracy, %")
    axes[0][-1].legend(loc="lower right")
    figure.suptitle(f"Along a curve the routing bias falls from left to right. {_origin(profile)}")
    return figure


def _shown_cost(cell: CostCell) -> str:
    return f"{1e3 * cell.step_s:.3f}, **{mj_per_row(cell):.3g}**, {cell.experts_read:.0f}"


def _shown_quality(cell: QualityCell) -> str:
    return f"{100 * cell.accuracy:.1f} ({100 * cell.minus_standard:+.1f})"


def _grid(
    cells: dict[tuple[int, int, Level], str], names: Sequence[str], levels: Sequence[Level]
) -> list[str]:
    """A table with a row per (running sequences, experts per token), most experts first."""
    rows = sorted({(running, -top_k) for running, top_k, _ in cells})
    return _table(
        ("running", "top_k", *names),
        [(n, -k, *(cells.get((n, -k, level), "") for level in levels)) for n, k in rows],
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _ascending(values: Iterable[Level]) -> list[Level]:
    return sorted(set(values))


def _coloured(top_ks: Iterable[int]) -> list[tuple[int, str]]:
    return list(zip(_ascending(top_ks)[::-1], _COLOURS, strict=False))


def _origin(profile: TokenProfile) -> str:
    return f"{profile.cost.device}, {profile.cost.provenance['date'][:10]}, one training"


def main(arguments: Arguments) -> None:
    """Write the tables and the figures.

    Raises:
        ProfileError: no such profile.
        ValueError: it holds no energies.
    """
    profile = load_token_profile(config_path("profiles", arguments.profile, ".json"))
    if profile.cost.idle_power_w is None:
        raise ValueError(f"profile {arguments.profile!r} holds no energies: give one measured on a card")
    write_file(arguments.out / "tables.md", page(profile))
    print(arguments.out / "tables.md")
    for name, draw in (("cost", draw_cost), ("front", draw_front)):
        print(save_figure(partial(draw, profile), arguments.out / f"{name}.png"))


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, description=__doc__))
