"""Fit of a card's power: idling, the cap, and what a forward pass of a known load costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from thermoe_env.calibration.driver_info import DriverInfo
from thermoe_env.calibration.traces import Intervals, Segment
from thermoe_env.device.physics import idle_power_w
from thermoe_env.errors import TraceFormatError

_FREE_OF_CAP = 0.05
"""Share of a segment under the cap up to which its cost counts as that at full clock."""
_SETTLED_S = 1.0
"""What a segment's beginning is left out: power and counter trail the load."""


def fit_power(
    parts: Sequence[Intervals], segments: Sequence[list[Segment] | None], info: DriverInfo
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The power parameters of `TwinParams`, and notes on what they rest on.

    Raises:
        TraceFormatError: the traces hold too little idling.
    """
    max_clock_mhz = max(float(part.sm_mhz_min.max()) for part in parts)
    idle, notes = _idle(parts, max_clock_mhz)
    loads = _loads(parts, segments, idle)
    onset_w, capped_s = _cap_onset(parts, info.power_limit_w)
    values = {
        **idle,
        # The mean at the cap depends on the load (peaks are capped), so the limit itself is the bound.
        "power_cap_w": info.power_limit_w,
        "cap_onset_w": onset_w,
        "max_clock_mhz": max_clock_mhz,
        "loads": loads,
    }
    return values, {**notes, "at_power_cap_s": capped_s}


def _idle(parts: Sequence[Intervals], max_clock_mhz: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Idle power against temperature at full clock, and at the lowest clock."""
    power, temp, low_power, low_clock = [], [], [], []
    for part in parts:
        # Settled: the two intervals before were idle too, since power and sensor trail the load.
        still = part.util == 0.0
        still[2:] &= still[1:-1] & still[:-2]
        still[:2] = False
        full = still & (part.sm_mhz_min == max_clock_mhz)
        low = still & (part.sm_mhz_min < 0.5 * max_clock_mhz)
        power.append(part.power_w[full])
        temp.append(part.temp_c[full])
        low_power.append(part.power_w[low])
        low_clock.append(part.sm_mhz_min[low])
    idle_w, idle_c, low_w, low_mhz = (np.concatenate(x) for x in (power, temp, low_power, low_clock))
    if len(idle_w) < 10 or np.ptp(idle_c) < 3.0:
        raise TraceFormatError(
            f"the traces hold {len(idle_w)} s of idling with a context at {max_clock_mhz:.0f} MHz, over "
            f"{np.ptp(idle_c) if len(idle_c) else 0.0:.1f} degrees; record 30 s of it right after full load"
        )
    if len(low_w) < 2:
        raise TraceFormatError(
            "the traces hold no idling at a low clock; begin a recording before the first CUDA context opens"
        )
    slope, at_zero = np.polyfit(idle_c, idle_w, 1)
    reference_c = round(float(idle_c.mean()))
    reference_w = at_zero + slope * reference_c
    values = {
        "idle_power_w": reference_w,
        "idle_reference_c": reference_c,
        "leakage_per_c": max(0.0, slope / reference_w),
        "low_clock_power_w": float(np.median(low_w)),
        "low_clock_mhz": float(low_mhz.min()),
    }
    notes = {
        "idle": {
            "seconds": len(idle_w),
            "from_c": round(float(idle_c.min()), 1),
            "to_c": round(float(idle_c.max()), 1),
            "rmse_w": round(float(np.std(idle_w - at_zero - slope * idle_c)), 2),
        }
    }
    return {name: float(f"{value:.5g}") for name, value in values.items()}, notes


def _loads(
    parts: Sequence[Intervals], segments: Sequence[list[Segment] | None], idle: dict[str, float]
) -> dict[str, list[list[float]]]:
    """Energy above idle and time of a forward pass for every (load, k, tokens) that segments name."""
    seen: dict[tuple[str, float, float], list[tuple[float, float, float, float]]] = {}
    for part, rows in zip(parts, segments, strict=True):
        joules = np.append(0.0, np.cumsum(part.power_w)) * part.interval_s
        edges = np.append(part.t_s[0] - part.interval_s, part.t_s)
        for segment in rows or []:
            begin, end = segment.t0 + _SETTLED_S, segment.t1
            if segment.tokens == 0 or end - begin < 1.0 or begin < edges[0] or end > edges[-1]:
                continue
            inside = (part.t_s > begin) & (part.t_s <= end)
            die_c = part.temp_c[inside].mean() if inside.any() else np.interp(begin, part.t_s, part.temp_c)
            idle_w = idle_power_w(
                idle["idle_power_w"], idle["leakage_per_c"], float(die_c), idle["idle_reference_c"]
            )
            steps = segment.steps * (end - begin) / (segment.t1 - segment.t0)
            above_j = np.diff(np.interp([begin, end], edges, joules))[0] - idle_w * (end - begin)
            capped = part.power_capped[inside].mean() if inside.any() else 0.0
            key = (segment.load, segment.k, segment.tokens)
            capped_share = min(1.0, capped / segment.duty)
            seen.setdefault(key, []).append((steps, above_j, segment.mean_latency_s, capped_share))
    loads: dict[str, list[list[float]]] = {}
    for (load, k, tokens), visits in sorted(seen.items()):
        free = [v for v in visits if v[3] <= max(_FREE_OF_CAP, min(v[3] for v in visits))]
        steps, above_j, latency_s, _ = np.array(free).T
        energy_j = float(f"{above_j.sum() / steps.sum():.5g}")
        mean_latency_s = float(f"{(latency_s * steps).sum() / steps.sum():.5g}")
        if energy_j > 0.0:
            capped = round(float(max(v[3] for v in visits)), 3)
            loads.setdefault(load, []).append([k, tokens, energy_j, mean_latency_s, capped])
    return loads


def _cap_onset(parts: Sequence[Intervals], power_limit_w: float) -> tuple[float, int]:
    """Mean power that best tells seconds under the cap from others, and how many seconds are under it."""
    power_w = np.concatenate([part.power_w for part in parts])
    capped = np.concatenate([part.power_capped > 0.5 for part in parts])
    if not capped.any():
        return power_limit_w, 0
    order = np.argsort(-power_w)
    hits = np.cumsum(capped[order])
    f1 = 2.0 * hits / (np.arange(1, len(order) + 1) + capped.sum())
    return float(f"{power_w[order][int(np.argmax(f1))]:.4g}"), int(capped.sum())
