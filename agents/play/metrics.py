"""What a policy achieved: indicators per episode, and their comparison over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from agents.play.rollout import Recording
from agents.play.statistics import CONFIDENCE, bootstrap_interval, mean, pair, per_unit, unit_name
from moe.service.queueing import latency_quantile
from moe.workload import KNOB_NAMES, REQUEST_CLASSES, STAT_COLUMNS
from thermoe_env.device.telemetry import READING_NAMES
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Feasibility

KPIS: dict[str, str] = {
    "j_per_good": "energy over good answers (correct and in time), J; the headline",
    "energy_j": "energy of the episode, J",
    "mean_power_w": "energy over time, W",
    "quality": "correct over answered",
    "goodput_rps": "good answers per second",
    "latency_p50_s": "median latency of the answered, s (bins 5% wide)",
    "latency_p95_s": "95th percentile, s",
    "latency_p99_s": "99th percentile, s",
    "late_fraction": "late or expired over answered or expired",
    "late_interactive": "the same of interactive requests",
    "late_deferrable": "the same of deferrable requests",
    "waiting_fraction": "requests still waiting at the end over those that arrived",
    "peak_c": "highest die temperature, degC",
    "mean_c": "mean die temperature, degC",
    "above_limit_s": "time above the virtual temperature limit, s",
    "throttled_s": "time a thermal slowdown held the clock down, s",
    "power_capped_s": "time the board's power cap held the clock down, s",
    "over_budget_j": "energy above the power budget, J",
    "expert_entropy": "entropy of the tokens per expert over its maximum, mean over layers",
    "ttt_time_share": "busy time spent on adaptation",
    "return": "sum of the rewards",
}
"""Indicators of an episode: name -> meaning, unit."""


def episode_metrics(recording: Recording, run: str = "") -> pd.DataFrame:
    """Indicators of every episode: one row each, columns `KPIS` and what identifies the episode.

    What has no value is NaN (the quality of no answers), energy per good answer of no good answer infinite.

    Args:
        recording: the episodes.
        run: which training of the policy played them, where the policy is an algorithm trained several times.
    """
    work = {name: recording.work[name].sum(0) for name in recording.work.dtype.names or ()}
    gpu = {name: recording.gpu[name].sum(0) for name in recording.gpu.dtype.names or ()}
    cost = dict(zip(COST_NAMES, recording.cost.sum(0).T, strict=True))
    answered = work["answered"].sum(axis=-1)
    expired = work["expired"].sum(axis=-1)
    arrived = work["arrived"].sum(axis=-1)
    time_s = recording.length * recording.interval_s
    histogram = recording.histogram.sum(0)  # [n, bins]
    quantiles = {q: np.array([latency_quantile(row, q) for row in histogram]) for q in (0.5, 0.95, 0.99)}
    with np.errstate(divide="ignore", invalid="ignore"):
        late = (work["late"] + work["expired"]) / (work["answered"] + work["expired"])  # [n, classes]
        values = {
            "j_per_good": gpu["energy_j"] / work["good"],
            "energy_j": gpu["energy_j"],
            "mean_power_w": gpu["energy_j"] / time_s,
            "quality": work["correct"] / answered,
            "goodput_rps": work["good"] / time_s,
            "latency_p50_s": quantiles[0.5],
            "latency_p95_s": quantiles[0.95],
            "latency_p99_s": quantiles[0.99],
            "late_fraction": cost["missed"] / (answered + expired),
            **{f"late_{c}": late[..., k] for k, c in enumerate(REQUEST_CLASSES)},
            "waiting_fraction": 1.0 - (answered + expired) / arrived,
            "peak_c": recording.gpu["temp_c"].max(0),
            "mean_c": gpu["temp_c"] / recording.length,
            "above_limit_s": cost["above_limit_s"],
            "throttled_s": gpu["thermal_throttle_s"],
            "power_capped_s": gpu["power_capped_s"],
            "over_budget_j": cost["over_budget_j"],
            "expert_entropy": expert_entropy(recording.tokens_per_expert.sum(0)),
            "ttt_time_share": work["ttt_busy_s"] / work["busy_s"],
            "return": recording.reward.sum(0),
        }
    whole = np.ones(len(recording.seeds), bool)
    whole[-1] = recording.error is None
    head = {
        "policy": recording.policy, "run": run, "world": recording.world, "device": recording.device,
        "seed": recording.seeds, "time_s": time_s,
    }  # fmt: skip
    return pd.DataFrame({**head, **values, "whole": whole, "shut_down": recording.shut_down})


def world_of(episodes: pd.DataFrame) -> tuple[str, str]:
    """World and device of an episodes table; all its rows have the same."""
    return str(episodes.world.iloc[0]), str(episodes.device.iloc[0])


def expert_entropy(tokens: np.ndarray) -> np.ndarray:
    """Entropy of the tokens per expert over its maximum log E, mean over layers; 1 is an even load.

    Args:
        tokens: [..., L, E].
    """
    share = tokens / tokens.sum(-1, keepdims=True)
    entropy = -np.where(share > 0.0, share * np.log(np.where(share > 0.0, share, 1.0)), 0.0).sum(-1)
    return np.where(np.isfinite(share).all(-1), entropy, np.nan).mean(-1) / np.log(tokens.shape[-1])


def steps_table(recording: Recording, problem: Problem, run: str = "") -> pd.DataFrame:
    """Every interval of every episode in physical units, one row each; `run` as for `episode_metrics`."""
    played = recording.played
    t, i = np.nonzero(played.T)[::-1]  # episode by episode
    columns: dict[str, np.ndarray | str] = {
        "policy": recording.policy,
        "run": run,
        "seed": recording.seeds[i],
        "time_s": (t + 1) * recording.interval_s,
    }
    levels = problem.knobs.levels
    for k, name in enumerate(KNOB_NAMES):
        columns[name] = np.array(levels[name])[recording.index[t, i, k]]
    columns["budget_w"] = recording.budget_w[t, i]
    columns["stage"] = recording.field("stage")[t, i].round().astype(int)
    done = recording.work[t, i].view(np.float64).reshape(len(t), -1)
    for name, values in (
        {name: recording.gpu[name][t, i] for name in READING_NAMES}
        | dict(zip(STAT_COLUMNS, done.T, strict=True))
    ).items():
        # The knob `ttt_steps` is what was asked for per batch, the count what was done.
        columns[name if name not in columns else f"{name}_done"] = values
    columns["reward"] = recording.reward[t, i]
    columns |= {f"reward_{name}": recording.terms[t, i, k] for k, name in enumerate(REWARD_TERMS)}
    columns |= {f"cost_{name}": recording.cost[t, i, k] for k, name in enumerate(COST_NAMES)}
    return pd.DataFrame(columns)


def summarize(episodes: pd.DataFrame, feasible: Feasibility, baseline: str = "static") -> pd.DataFrame:
    """Compare policies over their units: training seeds of an algorithm, else episode seeds.

    Per indicator the mean over units and its bootstrap interval (`_low`, `_high`; NaN from fewer than
    `statistics.MIN_UNITS`). `j_per_good_vs_<baseline>` is the ratio of the means on the seeds that
    both played, with pairs resampled together. Episodes that were cut short by a failing world or by the
    user are left out. A policy that breaks a limit has its reasons in `infeasible` and no `rank`.

    Args:
        episodes: rows of `episode_metrics`, all policies.
        feasible: when a policy counts at all.
        baseline: policy to compare with; quality is held against its own on the same seeds.

    Returns:
        One row per policy: ranked ones first, by energy per good answer.
    """
    whole: Any = episodes[episodes.whole]
    base = whole[whole.policy == baseline]
    rows = []
    for policy in episodes.policy.unique():
        own = whole[whole.policy == policy]
        values = per_unit(own, list(KPIS))
        row: dict[str, object] = {
            "policy": policy, "episodes": len(own), "unit": unit_name(own), "units": len(values)
        }  # fmt: skip
        middle, (low, high) = mean(values), bootstrap_interval(mean, values)
        for k, name in enumerate(KPIS):
            row |= {name: middle[k], f"{name}_low": low[k], f"{name}_high": high[k]}
        both = pair(own, base, ["j_per_good"])
        low, high = bootstrap_interval(_ratio, both.own, both.base, paired=both.paired)
        ratio = f"j_per_good_vs_{baseline}"
        row |= {ratio: _ratio(both.own, both.base)[0], f"{ratio}_low": low[0], f"{ratio}_high": high[0]}
        row["infeasible"] = "; ".join(_broken(own, base, feasible, baseline))
        rows.append(row)
    table = pd.DataFrame(rows)
    order = table.j_per_good.where(table.infeasible == "").rank(method="min")
    table.insert(1, "rank", order.astype("Int64"))
    return table.sort_values("rank", kind="stable", na_position="last").reset_index(drop=True)


def student_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean of repeats and its 95% Student interval; NaN limits from a single value."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), math.nan, math.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean()), float(array.mean() - half), float(array.mean() + half)


def _broken(own: pd.DataFrame, base: pd.DataFrame, limits: Feasibility, baseline: str) -> list[str]:
    """Why a policy does not count; empty when it does."""
    paired, paired_base = own[own.seed.isin(base.seed)], base[base.seed.isin(own.seed)]
    if not len(paired):
        return [f"no whole episode to compare with {baseline}"]
    reasons = []
    if own.shut_down.any():
        reasons.append(f"device shut down in {int(own.shut_down.sum())} episode(s)")
    quality, floor = paired.quality.mean(), paired_base.quality.mean() * limits.quality_share
    if not quality >= floor:
        reasons.append(f"quality {quality:.3f} < {floor:.3f}")
    for name in REQUEST_CLASSES:
        late = own[f"late_{name}"].to_numpy(float)
        late = late[~np.isnan(late)]  # where somebody asked
        if late.size and late.mean() > limits.late_share:
            reasons.append(f"{name} late {late.mean():.2%} > {limits.late_share:.2%}")
    hot = own.above_limit_s.sum() / own.time_s.sum()
    if not hot <= limits.hot_share:
        reasons.append(f"above limit {hot:.2%} of the time > {limits.hot_share:.2%}")
    return reasons


def _ratio(own: np.ndarray, base: np.ndarray, axis: int = 0) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinite over infinite
        return mean(own, axis) / mean(base, axis)
