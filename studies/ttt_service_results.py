"""What adaptation costs a service and gives it: energy split in two, indicators per episode, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from agents.play.metrics import episode_metrics, student_interval
from agents.play.rollout import Recording
from moe.workload import KNOB_NAMES
from thermoe_env.device.physics import idle_power_w
from thermoe_env.problem.problem import Problem, batch_nodes

BASELINE = "never"
"""Policy to compare with: the same service without adaptation."""
INDICATORS: dict[str, str] = {
    "error": "wrong over answered",
    "serving_j_per_request": "energy less that of adapting, over answered requests, J",
    "adapting_j_per_request": "energy of adapting over answered requests, J",
    "j_per_good": "energy over good answers (right and in time), J",
    "energy_j": "energy of the episode, J",
    "good": "good answers of the episode",
    "adapting_share": "intervals in which the policy asked for adaptation, over all",
    "late_fraction": "late or expired over answered or expired",
    "peak_c": "highest die temperature, degC",
    "above_limit_s": "time above the virtual temperature limit, s",
    "over_budget_j": "energy above the power budget, J",
    "return": "sum of the rewards",
}
"""Indicators of an episode that are compared: name -> meaning, unit."""
EXTRA = "j_per_additional_good"
EXTRA_MEANING = f"energy above that of {BASELINE} over the good answers above its, J: the price of one more"


def adapting_j(recording: Recording, problem: Problem) -> np.ndarray:
    """Energy of adaptation in every interval, J, [T, n]; the rest of the interval's is that of serving.

    Of the energy above idle adaptation has the share that the profile's energies give it: its steps, each at
    the cost of one after a batch of the interval's mean size, over these and the batches served. Idle power
    is the calibration's at the die's temperature, and is serving's: the device is on for the requests.

    An approximation: batches of an interval differ in size, some end in the next interval, and devices leak
    differently. Over twin episodes it came within 0.5% of a replay without the steps' energy for policies
    that adapt in long stretches, within 2.5% for single intervals. Where the working machine has no meter
    the share is that of busy time, as the modelled device has it then (`thermoe_env.twin.shadow`). A lesson
    of the token service costs the same after any step.
    """
    work, twin = recording.work, problem.twin
    idle_w = len(problem.scenario.devices) * idle_power_w(
        twin.idle_power_w, twin.leakage_per_c, recording.gpu["temp_mean_c"], twin.idle_reference_c
    )
    if problem.profile.energy_j is None:
        # Between the answers of a batch and the device's being free a moment passes without adaptation too.
        adapting, all_work = np.where(work["ttt_steps"] > 0, work["ttt_busy_s"], 0.0), work["busy_s"]
    elif problem.tokens is not None:
        learned = problem.tokens.adaptation
        step = 0.0 if learned is None or learned.lesson_j is None else learned.lesson_j
        return work["ttt_steps"] * step
    else:
        serving, step = _modelled_j(recording, problem)
        adapting = work["ttt_steps"] * step
        all_work = adapting + work["batches"] * serving
    share = np.divide(adapting, all_work, out=np.zeros_like(adapting), where=adapting > 0.0)
    return share * np.maximum(0.0, recording.gpu["energy_j"] - idle_w * recording.interval_s)


def _modelled_j(recording: Recording, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Energy above idle of a batch of the interval's mean size, and of a step after it; [T, n] each."""
    answered = recording.work["answered"].sum(axis=-1)
    size = np.maximum(1.0, answered / np.maximum(1.0, recording.work["batches"]))
    nodes = batch_nodes(int(problem.profile.batch_size[-1]))
    k, b = (recording.index[..., KNOB_NAMES.index(name)] for name in ("expert_count", "routing_bias"))
    serving, step = np.zeros_like(size), np.zeros_like(size)
    for setting in np.unique(np.stack([k.ravel(), b.ravel()]), axis=1).T:
        where = (k == setting[0]) & (b == setting[1])
        cost = problem.tables.cost[setting[0], setting[1]]  # [M, 4]
        serving[where] = np.interp(size[where], nodes, cost[:, 1])
        step[where] = np.interp(size[where], nodes, cost[:, 3])
    return serving, step


def episode_rows(recording: Recording, problem: Problem) -> pd.DataFrame:
    """`INDICATORS` of every whole episode, one row each, with its policy and seed."""
    table = episode_metrics(recording)
    work = recording.work
    answered = (work["answered"].sum(axis=-1)).sum(0)
    adapting = adapting_j(recording, problem).sum(0)
    asked = (recording.index[..., KNOB_NAMES.index("ttt_steps")] > 0) & recording.played
    with np.errstate(divide="ignore", invalid="ignore"):
        table = table.assign(
            error=1.0 - table.quality,
            good=work["good"].sum(0),
            adapting_j_per_request=adapting / answered,
            serving_j_per_request=(table.energy_j - adapting) / answered,
            adapting_share=asked.sum(0) / recording.length,
        )
    return table.loc[table.whole, ["policy", "seed", *INDICATORS]]


def compare(rows: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Compare policies over paired seeds.

    Args:
        rows: of `episode_rows`, all policies.
        baseline: what the others are held against.

    Returns:
        One row per policy, in order of appearance: `episodes`, `pairs` (seeds shared with the baseline); per
        indicator the mean over episodes, that of its paired difference (`_diff`), and each one's 95% Student
        interval (`_low`, `_high`); and `EXTRA` likewise, NaN unless the interval of additional good answers
        is above 0.
    """
    base = rows[rows.policy == baseline].set_index("seed")
    result = []
    for policy in rows.policy.unique():
        own = rows[rows.policy == policy].set_index("seed")
        seeds = own.index.intersection(base.index)
        row: dict[str, Any] = {"policy": policy, "episodes": len(own), "pairs": len(seeds)}
        difference = own.loc[seeds, list(INDICATORS)] - base.loc[seeds, list(INDICATORS)]
        for name in INDICATORS:
            row |= _with_interval(name, own[name].to_numpy())
            row |= _with_interval(f"{name}_diff", difference[name].to_numpy())
        extra = ratio_interval(difference.energy_j.to_numpy(), difference.good.to_numpy())
        row |= dict(zip((EXTRA, f"{EXTRA}_low", f"{EXTRA}_high"), extra, strict=True))
        result.append(row)
    return pd.DataFrame(result)


def price_steps(rows: pd.DataFrame, policies: Sequence[str], start: str = BASELINE) -> pd.DataFrame:
    """What ever more good answers cost: the policies that are worth taking, each against the one before.

    From `start` on the next is always the policy whose additional good answers are cheapest on the mean.
    Those left out give fewer than a mixture of their neighbours for the same energy.

    Args:
        rows: of `episode_rows`.
        policies: to choose from, `start` among them.
        start: where to begin.

    Returns:
        One row per step: `before`, `policy`, and `EXTRA` with its interval as in `compare`.
    """
    mean = {
        name: own[["energy_j", "good"]].to_numpy().mean(axis=0) for name, own in rows.groupby("policy")
    }  # J, good answers
    steps = [start]
    while True:
        more = {name: mean[name] - mean[steps[-1]] for name in policies}
        price = {name: energy_j / good for name, (energy_j, good) in more.items() if good > 0.0}
        if not price:
            break
        steps.append(min(price, key=price.__getitem__))
    prices = [EXTRA, f"{EXTRA}_low", f"{EXTRA}_high"]
    records = []
    for before, name in pairwise(steps):
        pair = compare(rows.loc[rows.policy.isin([before, name]), :], before).set_index("policy")
        records.append({"before": before, "policy": name, **pair.loc[name, prices].to_dict()})
    return pd.DataFrame(records, columns=["before", "policy", *prices])


def ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Ratio of the means of paired values and its 95% interval.

    By linearisation (Cochran, Sampling Techniques, 3rd ed., chapter 6). NaN unless the interval of the
    denominator is above 0: only then the ratio means something.
    """
    if len(above) < 2 or not student_interval(below)[1] > 0.0:
        return math.nan, math.nan, math.nan
    ratio = above.mean() / below.mean()
    return student_interval(ratio + (above - ratio * below) / below.mean())


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    mean, low, high = student_interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def plain(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """A table as JSON has it, by policy: what is no number is null."""
    return {
        str(row.pop("policy")): {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        for row in table.to_dict("records")
    }


def by_seed(recordings: Iterable[Recording]) -> dict[str, dict[int, Recording]]:
    """Single episodes by policy and seed."""
    episodes: dict[str, dict[int, Recording]] = {}
    for recording in recordings:
        for i, seed in enumerate(recording.seeds):
            episodes.setdefault(recording.policy, {})[int(seed)] = recording.episode(i)
    return episodes


def changes_of_shift(episode: Recording, before: int, after: int) -> list[int]:
    """First intervals of new input shifts.

    Only of those that follow `before` intervals of the old one and are the first of `after` of the new one.
    """
    shift = episode.work["shift_id"][:, 0]
    edges = [0, *(np.flatnonzero(np.diff(shift)) + 1).tolist(), len(shift)]
    spans = zip(edges, edges[1:], edges[2:], strict=False)
    return [t for t0, t, t1 in spans if t - t0 >= before and t1 - t >= after]
