"""What the repeats of the routing study say: tables with intervals, and the savings that were claimed.

A *cell* is a variant of the model at an expert count and a routing bias; a *repeat* is a seed. Intervals are
95% Student intervals over repeats. Ratios are taken within each repeat, their means are geometric.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from agents.play.metrics import student_interval
from moe.model.usage import class_entropy, load_entropy, load_imbalance, specialisation, specialisation_bias
from studies.repeats import StudyError
from studies.routing_config import REFERENCE

CELL = ["task", "variant", "expert_count", "routing_bias"]
ENERGY, TIME = "energy_j_per_token", "time_s_per_token"
COST_LABELS = {
    ENERGY: "energy per token above idle",
    TIME: "device time per token (no energy meter)",
}
METRICS = (
    ENERGY, "energy_total_j_per_token", TIME, "latency_s", "accuracy", "bits_per_byte", "shifted_accuracy",
    "shifted_bits_per_byte",
)  # fmt: skip
ROUTING_METRICS = (
    "load_entropy", "load_imbalance", "mean_expert_cost", "specialisation_bits", "specialisation_bias_bits",
    "class_entropy_bits",
)  # fmt: skip
EXPECTED_SAVING = 0.25
"""Of ours against `REFERENCE`, at the quality margin."""
EXPECTED_LOSS_SAVING = 0.15
"""Of a training that knows the cost against the same model without it, at equal quality."""


class Key(NamedTuple):
    """A cell of one task."""

    variant: str
    expert_count: int
    routing_bias: float

    def __str__(self) -> str:
        return f"{self.variant}, k={self.expert_count}, bias={self.routing_bias:g}"


@dataclass(frozen=True)
class Claim:
    """A saving of one setting against another, and whether it is what was expected."""

    task: str
    question: str
    rule: str
    cost: str
    """Metric that is saved."""
    reference: str
    ours: str
    repeats: int
    saving: float
    """1 less the ratio of costs; NaN where no setting is good enough."""
    saving_low: float
    saving_high: float
    quality_change: float
    """Accuracy of ours less that of the reference, mean over repeats."""
    quality_change_low: float
    quality_change_high: float
    expected: float | None
    met: bool | None
    """Whether the mean saving is as large and its interval above 0; None where nothing was expected."""


def cells_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat and cell: what it costs and how good it is; no energy columns without a meter."""
    rows = [
        {"task": repeat["task"], "seed": repeat["seed"], "variant": name}
        | {key: value for key, value in cell.items() if key != "counts"}
        for repeat in repeats
        for name, variant in repeat["variants"].items()
        for cell in variant["cells"]
    ]
    return pd.DataFrame(rows)


def routing_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat, cell and kind of input: how experts are used, means over layers."""
    rows = []
    for repeat in repeats:
        for name, variant in repeat["variants"].items():
            cost = torch.tensor(variant["expert_cost"], dtype=torch.float64)  # [E]
            for cell in variant["cells"]:
                for kind, listed in cell["counts"].items():
                    counts = torch.tensor(listed)  # [L, C, E]
                    load = counts.sum(dim=1)  # [L, E]
                    values = (
                        load_entropy(load), load_imbalance(load), (load * cost).sum(-1) / load.sum(-1),
                        specialisation(counts), specialisation_bias(counts), class_entropy(counts),
                    )  # fmt: skip
                    row = {"task": repeat["task"], "seed": repeat["seed"], "variant": name}
                    row |= {key: cell[key] for key in CELL[2:]} | {"inputs": kind}
                    means = (value.mean().item() for value in values)
                    rows.append(row | dict(zip(ROUTING_METRICS, means, strict=True)))
    return pd.DataFrame(rows)


def cost_metric(cells: pd.DataFrame) -> str:
    """What savings are of: energy above idle where it was measured, else device time.

    Raises:
        StudyError: Some repeats have a meter and some have none.
    """
    if ENERGY not in cells:
        return TIME
    if not np.isfinite(cells[ENERGY].to_numpy()).all():
        raise StudyError("some repeats have an energy meter and some have none: report them apart")
    return ENERGY


def pareto_front(cost: dict[Key, float], quality: dict[Key, float]) -> list[Key]:
    """Cells than which none is both as cheap and better, by rising cost."""
    front, best = [], -math.inf
    for key in sorted(cost, key=lambda key: (cost[key], -quality[key])):
        if quality[key] > best:
            best = quality[key]
            front.append(key)
    return front


def claims(cells: pd.DataFrame, settings: dict[str, Any], margin: float) -> list[Claim]:
    """Savings of one task, from settings chosen by their means over repeats.

    The setting is chosen on the repeats that it is reported for: its saving leans to the good side by what
    the choice among near equals is worth.

    Args:
        cells: rows of `cells_table`, one task.
        settings: of its repeats.
        margin: quality that a cheaper setting may give up.
    """
    comparison = _Comparison(cells)
    variants = settings["variants"]
    own = [name for name, variant in variants.items() if variant["experts"] != "even"]
    others = [name for name in variants if name not in own]
    standard = Key(REFERENCE, variants[REFERENCE]["fixed_k"], 0.0)
    floor = comparison.quality[standard] - margin
    rule = f"cheapest setting at most {100 * margin:g} point(s) below {REFERENCE}"
    ours, best = comparison.cheapest(own, floor), comparison.cheapest(others, floor)
    found = [
        comparison.claim("ours against standard", f"ours: {rule}", [(standard, ours)], EXPECTED_SAVING),
        comparison.claim("ours against the best standard", f"both: {rule}", [(best, ours)], EXPECTED_SAVING),
    ]
    for name in (name for name in own if variants[name]["recipe"]):
        base = _same_model(variants, name)
        question = f"{name} against {base}"
        pair = comparison.cheapest([base], floor), comparison.cheapest([name], floor)
        found.append(
            comparison.claim(f"{question}, at the floor", f"both: {rule}", [pair], EXPECTED_LOSS_SAVING)
        )
        front = comparison.front(base)
        pairs = [(key, comparison.cheapest([name], comparison.quality[key])) for key in front]
        matched = [pair for pair in pairs if pair[1] is not None]
        along = (
            f"each setting on the front of {base} against the cheapest of {name} at least as good "
            f"({len(matched)} of {len(front)} have one), mean over the settings"
        )
        found.append(
            comparison.claim(
                f"{question}, along the front", along, matched or pairs[:1], EXPECTED_LOSS_SAVING
            )
        )
        alike = [(Key(base, k, 0.0), Key(name, k, 0.0)) for k in settings["expert_counts"]]
        found.append(
            comparison.claim(
                f"{question}, setting by setting", "without bias, mean over the expert counts", alike, None
            )
        )
    return found


def _same_model(variants: dict[str, Any], name: str) -> str:
    """The variant that differs from `name` in its training alone, which knows no cost."""
    shape = ("experts", "fixed_k")
    for other, variant in variants.items():
        if not variant["recipe"] and all(variant[part] == variants[name][part] for part in shape):
            return other
    raise StudyError(f"variant {name!r} needs one with the same {shape} and no recipe, to compare with")


class _Comparison:
    """Costs and qualities of one task by cell, in the order of the repeats."""

    def __init__(self, cells: pd.DataFrame) -> None:
        self._task, self._metric = str(cells["task"].iloc[0]), cost_metric(cells)
        log_cost: dict[Key, list[float]] = defaultdict(list)
        accuracy: dict[Key, list[float]] = defaultdict(list)
        for row in cells.sort_values("seed").to_dict("records"):
            key = Key(*(row[name] for name in CELL[1:]))
            log_cost[key].append(math.log(row[self._metric]))
            accuracy[key].append(row["accuracy"])
        self._log_cost = {key: np.array(values) for key, values in log_cost.items()}  # [repeats] each
        self._accuracy = {key: np.array(values) for key, values in accuracy.items()}
        self._cost = {key: float(values.mean()) for key, values in self._log_cost.items()}
        self.quality = {key: float(values.mean()) for key, values in self._accuracy.items()}

    def front(self, variant: str) -> list[Key]:
        """Front of a variant by means."""
        return pareto_front({key: c for key, c in self._cost.items() if key.variant == variant}, self.quality)

    def cheapest(self, variants: list[str], floor: float) -> Key | None:
        """Cheapest cell of some variants whose mean quality is at least `floor`."""
        good = [key for key, q in self.quality.items() if key.variant in variants and q >= floor]
        return min(good, key=self._cost.__getitem__, default=None)

    def claim(
        self,
        question: str,
        rule: str,
        pairs: Sequence[tuple[Key | None, Key | None]],
        expected: float | None,
    ) -> Claim:
        """Saving over (reference, ours) pairs, averaged within each repeat."""
        sides = [
            "; ".join(str(key or "none good enough") for key in side) for side in zip(*pairs, strict=True)
        ]
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        saving = change = (math.nan,) * 3
        if whole:
            log_ratio = np.mean(
                [self._log_cost[b] - self._log_cost[a] for a, b in whole], axis=0
            )  # [repeats]
            mean, low, high = (1.0 - math.exp(value) for value in student_interval(log_ratio))
            saving = mean, high, low  # the more it costs, the less it saves
            change = student_interval(
                np.mean([self._accuracy[b] - self._accuracy[a] for a, b in whole], axis=0)
            )
        return Claim(
            task=self._task,
            question=question,
            rule=rule,
            cost=self._metric,
            reference=sides[0],
            ours=sides[1],
            repeats=len(next(iter(self._accuracy.values()))),
            saving=saving[0],
            saving_low=saving[1],
            saving_high=saving[2],
            quality_change=change[0],
            quality_change_low=change[1],
            quality_change_high=change[2],
            expected=expected,
            met=None if expected is None else saving[0] >= expected and saving[1] > 0.0,
        )
