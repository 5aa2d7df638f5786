"""Tables and figure of `benchmarks.expert_parallel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from agents.play.metrics import student_interval
from moe.model.config import ModelConfig
from moe.placement import Placement
from moe.profiles import Profile
from moe.profiling.heat import forecast_expert_share

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def interval(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and 95% interval (Student's t) of repeats; None where there is no measurement.

    One repeat has no interval: its ends are left out.
    """
    if any(math.isnan(value) for value in values):
        return None
    mean, low, high = student_interval(values)
    if len(values) < 2:
        return {"mean": mean, "repeats": len(values)}
    return {"mean": mean, "low": low, "high": high, "repeats": len(values)}


def summarise(conditions: list[dict[str, Any]], windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each condition the latency of a step (of the slowest device) and each device's measurements."""
    summary = []
    for number, condition in enumerate(conditions):
        own = [window for window in windows if window["condition"] == number]
        repeats = sorted({window["repeat"] for window in own})
        latency = [max(w["latency_s"] for w in own if w["repeat"] == repeat) for repeat in repeats]
        devices = [
            {
                name: interval([w[name] for w in own if w["device"] == device])
                for name in ("power_w", "energy_j_per_answer", "temperature_c")
            }
            for device in range(len(condition["signal"]))
        ]
        together = [sum(w["energy_j_per_answer"] for w in own if w["repeat"] == r) for r in repeats]
        summary.append(
            condition
            | {"latency_s": interval(latency), "energy_j_per_answer": interval(together), "devices": devices}
        )
    return summary


def add_forecast(
    conditions: list[dict[str, Any]], profile: Profile, placement: Placement, config: ModelConfig, top_k: int
) -> list[dict[str, Any]]:
    """Add to each condition the token share of each device that a profile forecasts, linear between biases.

    None where the profile is of another model or was not measured there.
    """
    result = []
    for condition in conditions:
        share = None
        bias = condition["routing_bias"]
        measured = top_k in profile.expert_count and bias <= profile.routing_bias[-1]
        if measured and profile.model["config"] == config.to_dict():
            of_expert = forecast_expert_share(profile, placement, condition["signal"])[
                list(profile.expert_count).index(top_k)
            ].mean(axis=1)  # [R, E]
            of_device = placement.per_device(of_expert).T  # [D, R]
            share = [float(np.interp(bias, profile.routing_bias, row)) for row in of_device]
        result.append(condition | {"forecast_tokens_share": share})
    return result


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw tokens, power, latency and quality over the routing bias, one line per thermal signal."""
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.5), layout="constrained")
    conditions = document["conditions"]
    last = len(conditions[0]["signal"]) - 1
    panels = (
        (axes[0, 0], f"tokens on device {last} (%)", lambda c: _exact(100.0 * c["tokens_share"][last])),
        (axes[0, 1], f"power of device {last} (W)", lambda c: c["devices"][last]["power_w"]),
        (axes[1, 0], "latency of a step (ms)", lambda c: _times(c["latency_s"], 1e3)),
        (axes[1, 1], "accuracy (%)", lambda c: _exact(100.0 * c["quality"])),
    )
    for signal in dict.fromkeys(tuple(c["signal"]) for c in conditions):
        own = [c for c in conditions if tuple(c["signal"]) == signal]
        label = "signals " + ", ".join(f"{s:g}" for s in signal)
        for axis, _, value in panels:
            _line(axis, [(c["routing_bias"], found) for c in own if (found := value(c)) is not None], label)
        forecast = [(c["routing_bias"], c["forecast_tokens_share"]) for c in own]
        if all(share is not None for _, share in forecast):
            share = [100.0 * share[last] for _, share in forecast]
            colour = axes[0, 0].lines[-1].get_color() if axes[0, 0].lines else None
            axes[0, 0].plot([bias for bias, _ in forecast], share, ":", color=colour)
    for axis, title, value in panels:
        axis.set(xlabel="routing bias", ylabel=title)
        axis.grid(alpha=0.3)
        if value(conditions[0]) is None:
            axis.text(0.5, 0.5, "not measured: no meter", ha="center", transform=axis.transAxes)
    axes[0, 0].legend()
    figure.suptitle(
        f"{document['machine']}, {document['date'][:10]}; bars: 95% interval of the repeats, "
        "dotted: forecast from the profile of one device", fontsize=9,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(axis: Axes, points: list[tuple[float, dict[str, float]]], label: str) -> None:
    if not points:
        return
    mean = np.array([y["mean"] for _, y in points])
    low = np.array([y.get("low", y["mean"]) for _, y in points])
    high = np.array([y.get("high", y["mean"]) for _, y in points])
    bars = np.stack([mean - low, high - mean])
    axis.errorbar([x for x, _ in points], mean, bars, marker="o", capsize=3, label=label)


def _exact(value: float) -> dict[str, float]:
    """A value that is counted, not sampled in repeats."""
    return {"mean": value}


def _times(values: dict[str, float] | None, factor: float) -> dict[str, float] | None:
    if values is None:
        return None
    return {name: value if name == "repeats" else value * factor for name, value in values.items()}
