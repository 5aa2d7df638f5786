"""What the repeats and costs of the frontier say, as tables.

Shares, gains and differences are taken within each repeat, against the unadapted model on the same batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe.model.config import Size
from studies.repeats import StudyError, load_repeats
from studies.tasks import read_result
from studies.ttt_config import NEVER
from studies.ttt_energy import TENT

RUN = ["model", "stream", "method"]
VISITS = ("new", "returned", "second")
TRAINING = ("training", "adapting", "together", "plain")
PLAIN = {"stem": False, "augment": 0.0, "norm": "batch"}
"""What a model as it is shipped is trained like."""
SHARES = ("of_mixed", "of_step")
"""In `costs_table`: what phases add up to, over what was measured."""


def costs_path(folder: Path, size: str) -> Path:
    """File of a model's costs."""
    return folder / f"costs-{size}.json"


def load_results(
    out: Path, names: Sequence[str], size: Size
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Read the repeats of some models that are whole, and the costs of each model that has one.

    Raises:
        StudyError: There is no repeat, or the costs of a model are missing or of other settings.
        DataCorruptError: A file is damaged.
    """
    repeats, weighings = [], {}
    for name in names:
        own, path = _whole(load_repeats(out / name, "vision", size)), costs_path(out / name, size)
        if not own:
            continue
        if not path.exists():
            raise StudyError(f"{path} is missing: leave --report-only out")
        weighings[name] = read_result(path)
        if weighings[name]["settings"]["repeats"] != own[0]["settings"]:
            raise StudyError(f"{path} was made with other settings than the repeats beside it: move it away")
        repeats += own
    if not repeats:
        raise StudyError(f"{out} holds no whole repeat of size {size!r} of {tuple(names)}: run it first")
    return repeats, weighings


def _whole(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the parts of each repeat together, and leave out repeats that lack one."""
    repeats = []
    for _, own in itertools.groupby(parts, key=lambda part: part["seed"]):
        by_method = {part["method"]: part for part in own}
        first = next(iter(by_method.values()))
        methods = (NEVER, *first["settings"]["methods"])
        if len(by_method) == len(methods):
            runs = itertools.chain(*(by_method[method]["runs"] for method in methods))
            repeats.append(first | {"runs": list(runs)})
    return repeats


def frontier_table(
    repeats: Sequence[dict[str, Any]], weighings: Mapping[str, dict[str, Any]]
) -> pd.DataFrame:
    """One row per repeat and run.

    Columns beside `RUN` and the seed:
        clean: Accuracy on clean images as trained, 0 to 1.
        accuracy: Mean over the batches, 0 to 1.
        gain: Points against the unadapted model.
        recovered: Gain over what the shifts cost: accuracy on clean images less that of the unadapted model.
        cost: Serving and adapting per image: steps that were taken at the price of a step, the guard on every
            batch, what was answered again at the price of serving.
        of_tent: What adapting costs over what TENT's does where it takes the same steps.
        adapted: Share of the batches that were learned from.
        again: Share that was answered once more, for serving's price.
    """
    prices = {model: phase_costs(own).mean().to_dict() for model, own in weighings.items()}
    rows = []
    for repeat, run, before in _runs(repeats):
        accuracy, unadapted = float(np.mean(run["quality"])), float(np.mean(before["quality"]))
        lost = repeat["clean"] - unadapted if _shifted(repeat, run) else 0.0
        price = prices[repeat["model"]]
        adapted, again = (float(np.mean(run[name])) for name in ("steps", "again"))
        own, tents = (
            0.0 if run["method"] == NEVER else price["guard"] + adapted * price[f"step {method}"] + extra
            for method, extra in ((run["method"], again * price["serve"]), (TENT, 0.0))
        )
        rows.append(
            _named(repeat, run)
            | {
                "clean": repeat["clean"],
                "accuracy": accuracy,
                "gain": 100 * (accuracy - unadapted),
                "recovered": (accuracy - unadapted) / lost if lost > 0 else math.nan,
                "cost": price["serve"] + own,
                "of_tent": own / tents if tents > 0 else math.nan,
                "adapted": adapted,
                "again": again,
            }
        )
    return pd.DataFrame(rows)


def visits_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat and run of a stream whose shifts return: accuracy of its batches over the settled.

    The settled accuracy is that of the second halves of all visits. Columns beside `RUN` and the seed, each a
    mean over the shifts:
        new: First batch of the first visit.
        returned, second: First and second batch of the visits after it.
    """
    rows = []
    for repeat, run, _ in _runs(repeats):
        if repeat["settings"]["streams"][run["stream"]]["schedule"] != "recurring":
            continue
        visits: dict[str, list[list[float]]] = {}
        batches = zip(repeat["shifts"][run["stream"]], run["quality"], strict=True)
        for shift, group in itertools.groupby(batches, key=lambda batch: batch[0]):
            visits.setdefault(shift, []).append([quality for _, quality in group])
        settled = float(np.mean([np.mean(v[len(v) // 2 :]) for own in visits.values() for v in own]))
        later = [visit for own in visits.values() for visit in own[1:]]
        places = {
            "new": [own[0][0] for own in visits.values()],
            "returned": [visit[0] for visit in later],
            "second": [visit[1] for visit in later],
        }
        over = {name: float(np.mean(own)) / settled for name, own in places.items() if settled > 0}
        rows.append(_named(repeat, run) | over)
    return pd.DataFrame(rows, columns=[*RUN, "seed", *VISITS])


def training_table(repeats: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per repeat of an augmented model and run under shifts, beside the plain model of its seed.

    Columns beside `RUN` and the seed, all in points of accuracy:
        training: What training adds: the unadapted model over the unadapted plain one.
        adapting: What the method adds to that.
        together: Both.
        plain: What the method adds to the plain model.
    """
    accuracy = {
        tuple(_named(r, run).values()): 100 * float(np.mean(run["quality"])) for r, run, _ in _runs(repeats)
    }
    plains = {r["seed"]: r["model"] for r in repeats if r["settings"]["model"] == PLAIN}
    rows = []
    for repeat, run, _ in _runs(repeats):
        plain = plains.get(repeat["seed"])
        if not repeat["settings"]["model"]["augment"] or plain is None or not _shifted(repeat, run):
            continue
        stream, method, seed = run["stream"], run["method"], repeat["seed"]
        (bare, improved), (trained, both) = (
            (accuracy[model, stream, NEVER, seed], accuracy.get((model, stream, method, seed), math.nan))
            for model in (plain, repeat["model"])
        )
        rows.append(
            _named(repeat, run)
            | {
                "training": trained - bare,
                "adapting": both - trained,
                "together": both - bare,
                "plain": improved - bare,
            }
        )
    return pd.DataFrame(rows, columns=[*RUN, "seed", *TRAINING])


def costs_table(weighings: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per model and phase: mean over the weighings and the least and the greatest of them.

    Per image, but for `SHARES`: `of_mixed`, what serving, TENT's steps and copies add up to over a run that
    mixes them, and `of_step`, TENT's three phases over its step.
    """
    rows = []
    for model, own in weighings.items():
        costs = phase_costs(own)
        for phase in costs:
            found = {"mean": costs[phase].mean(), "low": costs[phase].min(), "high": costs[phase].max()}
            rows.append({"model": model, "phase": phase} | found)
    return pd.DataFrame(rows)


def phase_costs(weighing: dict[str, Any]) -> pd.DataFrame:
    """Return a row per weighing of a model, a column per phase and method, see `costs_table`."""
    n, rows = weighing["settings"]["batch_size"], []
    for costs in weighing["weighings"]:
        phases, steps = costs["phases"], costs["steps"]
        row = {phase: cost / n for phase, cost in phases.items()}
        row |= {f"step {method}": cost / n for method, cost in steps.items()}
        row["of_mixed"] = costs["mixed"]["added_up"] / costs["mixed"]["measured"]
        row["of_step"] = sum(phases[phase] for phase in ("forward", "backward", "update")) / steps[TENT]
        rows.append(row)
    return pd.DataFrame(rows)


def _runs(
    repeats: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield every repeat, run, and the run of the unadapted model to compare with."""
    for repeat in repeats:
        before = {run["stream"]: run for run in repeat["runs"] if run["method"] == NEVER}
        for run in repeat["runs"]:
            yield repeat, run, before[run["stream"]]


def _named(repeat: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": repeat["model"],
        "stream": run["stream"],
        "method": run["method"],
        "seed": repeat["seed"],
    }


def _shifted(repeat: dict[str, Any], run: dict[str, Any]) -> bool:
    return repeat["settings"]["streams"][run["stream"]]["kinds"] != ["clean"]
