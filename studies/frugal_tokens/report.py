"""What trained variants save and lose against the standard training, paired by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pandas as pd

from agents.play.metrics import student_interval
from studies.repeats import select, summarize
from studies.rq_figures import Axis, fronts
from studies.rq_report import Change, Findings
from studies.tasks import StudyError

QUESTION = "Does training for few experts read make decode frugal?"
METRICS = ("accuracy", "experts_read", "joules_per_token", "step_s")
_LABELS = {"accuracy": "accuracy", "experts_read": "experts read", "joules_per_token": "joules per token"}
_HEAD = (
    "running", "served as", "accuracy %", "change", "experts read", "change", "mJ per token", "change", "ms",
    "change", "seeds",
)  # fmt: skip
_SCALES = {"accuracy": (100.0, 2), "experts_read": (1.0, 1), "joules_per_token": (1e3, 2), "step_s": (1e3, 3)}
"""To the shown unit, and digits."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a variant should reach against the standard."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    running: int
    accuracy_lost: float
    """At most, relative."""
    joules_saved: float
    """At least, relative."""


def findings(results: dict[str, dict[str, Any]], standard: str, target: Target) -> Findings:
    """The answer from the results of trainings.

    Args:
        results: of tasks, as `studies.frugal_tokens.Training.run` makes them.
        standard: name of the variant that the others are compared with.
        target: for the verdicts.

    Raises:
        StudyError: no result of the standard, or trainings on different texts.
    """
    every = list(results.values())
    if not any(result["settings"]["variant"] == standard for result in every):
        raise StudyError(f"no result of {standard!r} is there, to compare others with: run --only {standard}")
    if len({result["text"]["sha256"] for result in every}) > 1:
        raise StudyError("results were trained on different texts: keep those of one machine, or give --text")
    cells = cells_table(every)
    base_policy = _as_trained(select(cells, variant=standard))
    compared = {name: changes_of(cells, base_policy, name) for name in METRICS}
    metered = bool(cells.joules_per_token.notna().any())
    cost = "joules_per_token" if metered else "experts_read"
    shown = select(cells, running=target.running)
    notes = [
        f"Changes are relative, against {base_policy} with as many running sequences. The loss per token "
        "(`moe.training.energy_loss`) has nothing to save here: experts are equal and their number is fixed."
    ]
    if not metered:
        notes.append("No energy meter on this device: experts read are compared, and no joules are claimed.")
    machines = sorted({result["machine"] for result in every})
    days = sorted({result["date"][:10] for result in every})
    where = f"{', '.join(machines)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"
    x = Axis(cost, "energy per token (mJ)", 1e3) if metered else Axis(cost, "experts read per layer and step")
    groups = {name: list(select(shown, variant=name).policy) for name in dict.fromkeys(shown.variant)}
    draw = partial(
        fronts, summarize(shown, ["policy"], METRICS), groups, x,
        [Axis("accuracy", "accuracy (%)", 100.0, 1)], f"{target.running} running sequences\n{where}",
    )  # fmt: skip
    return Findings(
        QUESTION,
        [
            _verdict(name, select(shown, variant=name), compared, cost, target)
            for name in groups
            if name != standard
        ],
        f"{where}; {cells.seed.nunique()} seeds, measured",
        [("Everything served", _rows(cells, compared))],
        [(f"Accuracy against {x.label}, {target.running} running sequences", "front", draw)],
        notes,
    )


def cells_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per training and cell; `policy` names the variant and how it is served."""
    rows = []
    for result in results:
        settings = result["settings"]
        for cell in result["cells"]:
            policy = f"{settings['variant']}, top_k {cell['top_k']}, bias {cell['routing_bias']:g}"
            rows.append({"variant": settings["variant"], "seed": settings["seed"], "policy": policy, **cell})
    return pd.DataFrame(rows).astype({"joules_per_token": float})


def changes_of(cells: pd.DataFrame, base: str, name: str) -> dict[tuple[int, str], Change]:
    """Relative change of a metric against a policy, mean of the pairs of a seed, by (running, policy)."""
    rows = cells.to_dict("records")
    of_base = {(row["running"], row["seed"]): row[name] for row in rows if row["policy"] == base}
    pairs: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        other = of_base.get((row["running"], row["seed"]), math.nan)
        change = row[name] / other - 1.0 if other else math.nan
        if math.isfinite(change):
            pairs.setdefault((row["running"], row["policy"]), []).append(change)
    return {key: Change(*student_interval(values)) for key, values in pairs.items()}


def _as_trained(cells: pd.DataFrame) -> str:
    """The policy of a variant's cells that serves it as it was trained."""
    return str(select(cells, top_k_share=1.0, routing_bias=0.0).policy.iloc[0])


def _verdict(
    variant: str, cells: pd.DataFrame, compared: dict[str, dict[tuple[int, str], Change]], cost: str,
    target: Target,
) -> str:  # fmt: skip
    """What a variant saves as trained, and which ways to serve it meet the target."""
    met, anecdote = [], cells.seed.nunique() == 1
    for policy in dict.fromkeys(cells.policy):
        saved, lost = (compared[name].get((target.running, policy)) for name in (cost, "accuracy"))
        if saved is None or lost is None:
            continue
        sure = anecdote or saved.high < 0.0
        if saved.mean <= -target.joules_saved and sure and lost.mean >= -target.accuracy_lost:
            met.append(policy)
    trained = (target.running, _as_trained(cells))
    texts = [
        f"{label} {compared[name][trained].text(100.0, '%')}"
        for name, label in _LABELS.items()
        if trained in compared[name]
    ]
    saving, loss = f"{target.joules_saved:.0%} of {_LABELS[cost]}", f"{target.accuracy_lost:.0%} of accuracy"
    return (
        f"**{variant}**, served as trained at {target.running} sequences: {', '.join(texts)}. At least "
        f"{saving} for at most {loss}: "
        + (f"met by {'; '.join(met)}" if met else "not met")
        + (" (one training: no interval)." if anecdote else ".")
    )


def _rows(cells: pd.DataFrame, compared: dict[str, dict[tuple[int, str], Change]]) -> list[str]:
    """The table of everything in Markdown."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for running, policy in dict.fromkeys(zip(cells.running, cells.policy, strict=True)):
        own = select(cells, running=running, policy=policy)
        row = [str(running), str(policy)]
        for name in METRICS:
            factor, digits = _SCALES[name]
            change, value = compared[name].get((running, policy)), own[name].to_numpy().mean()
            row.append("-" if math.isnan(value) else f"{factor * value:.{digits}f}")
            row.append("-" if change is None else change.text(100.0, "%"))
        lines.append(f"| {' | '.join([*row, str(own.seed.nunique())])} |")
    return lines
