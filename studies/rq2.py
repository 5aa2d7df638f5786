"""Do energy-aware training losses make inherently frugal MoE models?

Collected from the routing study (`python -m studies.routing`): models trained with and without the loss,
measured side by side. Its small form runs here where no finished study is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch

from moe.device.torch_device import one_thread_on_cpu, pick_device
from moe.model.config import Size, Task
from studies.plays import Options
from studies.repeats import origin, range_text, select, summarize
from studies.routing_config import REFERENCE, load_study
from studies.routing_config import Study as RoutingStudy
from studies.routing_figures import pareto
from studies.routing_measure import run_repeat
from studies.routing_report import CLAIM_HEADS, claim_row
from studies.routing_results import CELL, COST_LABELS, METRICS, Claim, cells_table, claims, cost_metric
from studies.rq_figures import changes
from studies.rq_report import Change, Findings
from studies.tasks import StudyError, read_table

QUESTION = "Do energy-aware training losses make inherently frugal MoE models?"
FEWEST_REPEATS = 3
SHOWN_WITHIN = 0.06
"""Accuracy below the best of the models compared up to which a setting is drawn."""


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A repeat of the routing study as a task: all variants trained with one seed and measured."""

    config: str
    task: Task
    size: Size
    seed: int
    device: str

    @property
    def name(self) -> str:
        """As `studies.routing` names its file."""
        return f"{self.task}-{self.size}-seed{self.seed}"

    @property
    def gpus(self) -> int:
        """A whole one where it is measured."""
        return int(self.device == "cuda")

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        return load_study(self.config).settings(self.task, self.size, self.device)

    def run(self) -> dict[str, Any]:
        """See `Task.run`."""
        one_thread_on_cpu(torch.device(self.device))  # the same arithmetic in every repeat
        return run_repeat(load_study(self.config), self.task, self.size, torch.device(self.device), self.seed)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the question; see configs/studies/rq2.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    config: str
    """Settings of the routing study: name in configs/studies, or path of a YAML file."""
    size: Size
    tasks_of: tuple[Task, ...]
    repeats: tuple[int, ...]
    """Seeds of the small form."""
    with_loss: dict[str, str]
    """Variant trained without the loss -> the same model trained with it."""

    def __post_init__(self) -> None:
        if len(set(self.repeats)) < FEWEST_REPEATS:
            raise ValueError(f"repeats must be at least {FEWEST_REPEATS} seeds, got {self.repeats}")

    def tasks(self, options: Options) -> list[Repeat]:
        """The small form's repeats; none where a finished study is given."""
        if options.routing is not None:
            return []
        device = pick_device("auto").type
        return [
            Repeat(config=self.config, task=task, size=self.size, seed=seed, device=device)
            for task in self.tasks_of
            for seed in self.repeats
        ]

    def findings(self, results: dict[str, dict[str, Any]], options: Options) -> Findings:
        """The answer from the results, or from the finished study.

        Raises:
            StudyError: the study holds no table, or too few repeats for an interval.
        """
        if options.routing is None:
            repeats = list(results.values())
            cells, device = cells_table(repeats), repeats[0]["settings"]["device"]
            dates = sorted(repeat["date"][:10] for repeat in repeats)
            where, about = origin(repeats), f"{origin(repeats)}; {dates[0]} to {dates[-1]}, measured"
        else:
            cells, where = _collected(options.routing)
            about, device = f"measured, from {options.routing}, which says: {where}", "cuda"
        counts = cells.groupby("task").seed.nunique()
        if counts.min() < FEWEST_REPEATS:
            raise StudyError(f"intervals need {FEWEST_REPEATS} repeats of a task, got {counts.to_dict()}")
        study, metric = load_study(self.config), cost_metric(cells)
        tasks = list(cells.task.unique())
        settings = {task: study.settings(task, self.size, device) for task in tasks}
        found = {task: self._claims(select(cells, task=task), settings[task], study) for task in tasks}
        shown = {name: study.variants[name] for pair in self.with_loss.items() for name in (*pair, REFERENCE)}
        own = cells.loc[cells.variant.isin(list(shown)), :]
        first = {task: {"settings": settings[task] | {"variants": {
            name: settings[task]["variants"][name] for name in study.variants if name in shown}}}
            for task in tasks}  # fmt: skip
        summary = _shown(summarize(own, CELL, METRICS), {*self.with_loss, *self.with_loss.values()})
        savings = {task: _savings(claims_of) for task, claims_of in found.items()}
        label = f"saving of {COST_LABELS[metric]} (%)"
        rows = [f"| {' | '.join(CLAIM_HEADS)} |", "|---" * len(CLAIM_HEADS) + "|"]
        rows += [f"| {' | '.join(claim_row(claim))} |" for own in found.values() for claim in own]
        return Findings(
            QUESTION,
            [_sentence(task, claims_of, metric) for task, claims_of in found.items()],
            about,
            [("Savings by the loss", rows)],
            [
                (f"Cost and quality with and without the loss, fronts ({COST_LABELS[metric]}); settings more "
                 f"than {100 * SHOWN_WITHIN:g} points below the best of these models are left out", "pareto",
                 partial(pareto, summary, first, metric, where)),
                ("What the loss saves, with 95% intervals over repeats; right of 0 is better", "savings",
                 partial(changes, savings, 100.0, label, f"Savings by the energy loss\n{where}")),
            ],
            notes=["At the floor: both sides at their cheapest setting within the quality margin. Along the "
                   "front: each setting on the front without the loss against the cheapest at least as good "
                   "with it. Setting by setting: same expert count, no bias; quality may differ."],
        )  # fmt: skip

    def _claims(self, cells: pd.DataFrame, settings: dict[str, Any], study: RoutingStudy) -> list[Claim]:
        """Savings of models with the loss against the same without it."""
        pairs = tuple(f"{loss} against {base}" for base, loss in self.with_loss.items())
        return [c for c in claims(cells, settings, study.quality_margin) if c.question.startswith(pairs)]


def _collected(folder: Path) -> tuple[pd.DataFrame, str]:
    """Cells of a finished study, and where it says they come from."""
    columns = ("task", "seed", "variant", "expert_count")
    table, report = read_table(folder / "cells.csv", columns, "studies.routing"), folder / "report.md"
    text = report.read_text(encoding="utf-8") if report.is_file() else ""
    said = [line for line in text.splitlines() if line.startswith("Written by")]
    if not said:
        raise StudyError(f"{report} does not say where it comes from: give a folder of `studies.routing`")
    return table, said[0].partition(". ")[2].partition(". Cost")[0]


def _shown(summary: pd.DataFrame, compared: set[str]) -> pd.DataFrame:
    """Settings to draw: some fall so low that nothing else could be told apart."""
    best = summary[summary.variant.isin(compared)].groupby("task").accuracy.max()
    return summary.loc[summary.accuracy > summary.task.map(best) - SHOWN_WITHIN, :]


def _savings(found: list[Claim]) -> dict[str, dict[str, Change]]:
    """Pair of models -> rule -> saving."""
    savings: dict[str, dict[str, Change]] = {}
    for claim in found:
        pair, _, rule = claim.question.partition(", ")
        savings.setdefault(pair, {})[rule] = Change(claim.saving, claim.saving_low, claim.saving_high)
    return savings


def _sentence(task: str, found: list[Claim], metric: str) -> str:
    """What the loss saves in one task, at equal quality and at equal expert counts."""
    equal, alike = (
        [claim for claim in found if claim.question.endswith(rule)]
        for rule in ("along the front", "setting by setting")
    )
    sure = sum(claim.saving_low > 0.0 for claim in equal)
    savings, settings = (
        "; ".join(f"{claim.question.partition(',')[0]} {_text(claim)}" for claim in claims_of)
        for claims_of in (equal, alike)
    )
    return (
        f"**{task}**: at no less accuracy the loss surely saves {COST_LABELS[metric]} in {sure} of "
        f"{len(equal)} models ({savings}). At the same expert count the savings are: {settings}."
    )


def _text(claim: Claim) -> str:
    """Saving and change of accuracy of a claim."""
    if claim.saving != claim.saving:
        return "no setting is as good"
    saving = range_text(claim.saving, claim.saving_low, claim.saving_high, 100.0, "%")
    change = (claim.quality_change, claim.quality_change_low, claim.quality_change_high)
    return f"{saving}, accuracy {range_text(*change, 100.0, ' points', '+')}"
