"""What the repeats of the study of test-time training say: tables with intervals.

A *run* is a stream served by one model that adapts in one way; a *repeat* is a seed. Gains and ratios are
taken within each repeat, against the unadapted model on the same batches; intervals are 95% Student
intervals over repeats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from studies.repeats import StudyError
from studies.ttt_config import NEVER
from studies.ttt_meter import ADAPTING, PHASES, SERVE

RUN = ["task", "stream", "norm", "adaptation", "gate", "budget", "guarded"]
"""What names a run; no limit is an infinite budget."""
COSTS = tuple(f"{phase}_cost" for phase in PHASES)
METRICS = (
    "quality", "gain", *COSTS, "adapt_cost", "adapt_ratio", "cost_per_gain", "adapted_share", "refused",
    "rollbacks", "poisoned", "metered_ratio",
)  # fmt: skip
GAIN_LABELS = {"vision": "accuracy gained (points)", "language": "bits per byte saved (%)"}
COST_LABELS = {"J": "energy of the device", "s": "device time (no energy meter)"}


def runs_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat and run: quality, gain and cost.

    Columns beside `RUN` and the seed:
        quality: Accuracy, 0 to 1, or bits per byte, mean over the batches.
        gain: Against the unadapted model: points of accuracy, or percent of the bits saved.
        serve_cost, adapt_forward_cost, adapt_update_cost, guard_cost, host_cost: Per request, in `cost_unit`.
        adapt_cost: Sum of those of adaptation, the guard among them.
        adapt_ratio: It over the serving cost.
        cost_per_gain: It over the gain; NaN without a gain.
        adapted_share: Share of the batches that were learned from.
        metered_ratio: Sum of the phases' energies over the counter's, where there is a meter.
    """
    rows = []
    for repeat, run, reference in _runs(repeats):
        requests = repeat["batch_size"] * len(run["quality_of_batch"])
        cost = {phase: run["phase_cost"][phase] / requests for phase in PHASES}
        adapt_cost = sum(cost[phase] for phase in ADAPTING)
        quality, before = (float(np.mean(r["quality_of_batch"])) for r in (run, reference))
        gained = gain(repeat["task"], quality, before)
        guard = run["guard"] or {}
        row = _named(repeat, run) | {"quality": quality, "gain": gained}
        row |= {f"{phase}_cost": value for phase, value in cost.items()}
        row |= {
            "adapt_cost": adapt_cost,
            "adapt_ratio": adapt_cost / cost[SERVE],
            "cost_per_gain": adapt_cost / gained if gained > 0.0 else math.nan,
            "adapted_share": float(np.mean(run["adapted"])),
            "refused": float(run["refused"]),
            "rollbacks": float(guard.get("rollbacks", 0)),
            "poisoned": float(guard.get("poisoned", 0)),
        }
        if run["counter_j"] is not None:
            row["metered_ratio"] = sum(run["phase_cost"].values()) / run["counter_j"]
        rows.append(row)
    return pd.DataFrame(rows)


def shifts_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat, run and step of the stream: its shift, how often that came before, and gain."""
    rows = []
    for repeat, run, reference in _runs(repeats):
        seen: dict[str, int] = {}
        first = 0
        for shift, group in itertools.groupby(repeat["shifts"][run["stream"]]):
            last = first + len(list(group))
            quality, before = (float(np.mean(r["quality_of_batch"][first:last])) for r in (run, reference))
            row = {"shift": shift, "visit": seen.get(shift, 0), "quality": quality}
            rows.append(_named(repeat, run) | row | {"gain": gain(repeat["task"], quality, before)})
            seen[shift], first = seen.get(shift, 0) + 1, last
    return pd.DataFrame(rows)


def recovered_table(repeats: Sequence[dict[str, Any]], shifts: pd.DataFrame) -> pd.DataFrame:
    """One row per repeat and adaptation: the share of the accuracy lost to corruptions that it brings back.

    Over streams of one shift at a time. The loss is the accuracy on the clean test images less that of the
    unadapted model on the stream; gains and losses are averaged over the corruptions before their ratio is
    taken, since some corruptions cost next to nothing.

    Args:
        repeats: As `studies.ttt` writes them.
        shifts: Of `shifts_table`.
    """
    clean = {
        (r["task"], r["seed"], norm): model["clean"] for r in repeats for norm, model in r["models"].items()
    }
    wanted = {
        (r["task"], name)
        for r in repeats
        for name, stream in r["settings"]["streams"].items()
        if r["task"] == "vision" and stream["schedule"] == "per_shift"
    }
    rows = []
    corrupted = shifts.iloc[np.flatnonzero((shifts["shift"] != "clean").to_numpy())]
    for _, group in corrupted.groupby([*RUN, "seed"], sort=False):
        named: dict[str, Any] = group[[*RUN, "seed"]].iloc[0].to_dict()
        if (named["task"], named["stream"]) not in wanted or named["adaptation"] == NEVER:
            continue
        own = float(group["quality"].mean())
        unadapted = own - float(group["gain"].mean()) / 100
        lost = clean[named["task"], named["seed"], named["norm"]] - unadapted
        rows.append(named | {"lost": 100 * lost, "recovered": (own - unadapted) / lost})
    return pd.DataFrame(rows)


def budget_curves(table: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Runs that differ in gate and budget alone, where there are several budgets, with what they share."""
    shared = ["task", "stream", "norm", "adaptation", "guarded"]
    found = []
    for _, group in table.groupby(shared, sort=False):
        if len(group["budget"].unique()) > 1:
            found.append((group[shared].iloc[0].to_dict(), group))
    return found


def norm_streams(table: pd.DataFrame) -> list[str]:
    """Streams that models of several norms serve."""
    return [
        str(name) for name, group in table.groupby("stream", sort=False) if len(group["norm"].unique()) > 1
    ]


def gain(task: str, quality: float, before: float) -> float:
    """Points of accuracy gained, or percent of the bits saved."""
    return 100 * (quality - before) if task == "vision" else 100 * (before - quality) / before


def cost_unit(repeats: Sequence[dict[str, Any]]) -> str:
    """Unit of all costs.

    Raises:
        StudyError: Some repeats have a meter and some have none.
    """
    units = {repeat["cost_unit"] for repeat in repeats}
    if len(units) > 1:
        raise StudyError("some repeats have an energy meter and some have none: report them apart")
    return units.pop()


def _runs(
    repeats: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield every repeat, run, and the run of the unadapted model to compare with."""
    for repeat in repeats:
        references = {
            (run["stream"], run["norm"]): run for run in repeat["runs"] if run["adaptation"] == NEVER
        }
        for run in repeat["runs"]:
            yield repeat, run, references[run["stream"], run["norm"]]


def _named(repeat: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    budget = math.inf if run["budget"] is None else run["budget"]
    named = {name: run[name] for name in RUN[1:]} | {"budget": budget}
    return {"task": repeat["task"], "seed": repeat["seed"], **named}
