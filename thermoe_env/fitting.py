"""Fit of a twin to recorded traces.

Heat: one free run over each whole trace, driven by its measured power, is brought as close to the
measured temperatures as least squares can, all nodes at once. What remains varies slowly and is not
explained by power; its size and its memory become the twin's inlet drift.
Power: idle power against temperature while the device cools without work, and the mean power it holds
at its cap.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from thermoe_env.calibration import TwinParams
from thermoe_env.errors import TraceFormatError
from thermoe_env.free_run import THERMAL, free_run, validate_twin
from thermoe_env.traces import DriverInfo, Intervals, Trace

HELD_OUT = 0.45
"""Part of each trace, at its end, on which a fit to the rest is judged."""

_FITTED = THERMAL[:7]
_START = np.log([0.02, 0.01, 4.0, 0.02, 40.0, 0.02, 1.0])
# Between these bounds the nodes keep their meaning: without them two could swap or merge.
_LOW = np.log([1e-4, 1e-4, 0.5, 1e-4, 10.0, 1e-4, 0.05])
_HIGH = np.log([1.0, 1.0, 10.0, 1.0, 1000.0, 1.0, 60.0])


def fit_twin(traces: list[Trace], info: DriverInfo, interval_s: float = 1.0) -> TwinParams:
    """Fit a twin to traces of one card and judge the method on the ends of the traces.

    Args:
        traces: recordings that hold idle stretches at full clock and steps of power.
        info: limits and names from the card's driver.
        interval_s: interval of the means that are fitted.

    Raises:
        TraceFormatError: the traces lack what the fit needs; says what to record.
    """
    parts = [trace.intervals(interval_s) for trace in traces]
    max_clock_mhz = max(float(part.sm_mhz_min.max()) for part in parts)
    electrical, electrical_notes = _electrical(parts, info, max_clock_mhz)
    thermal, thermal_notes = _thermal(parts)
    twin = TwinParams(
        gpu=info.name,
        **electrical,
        **thermal,
        slowdown_c=info.slowdown_c,
        hw_slowdown_c=info.hw_slowdown_c,
        mem_limit_c=info.mem_limit_c,
        shutdown_c=info.shutdown_c,
        max_clock_mhz=max_clock_mhz,
        provenance={},
    )
    cuts = [round((1.0 - HELD_OUT) * len(part)) for part in parts]
    earlier, _ = _thermal([part.until(cut) for part, cut in zip(parts, cuts, strict=True)])
    judged = dataclasses.replace(twin, **earlier)
    provenance = {
        "measured_on": info.measured_on,
        "driver": info.driver,
        "traces": [
            {"file": t.path.name, "sha256": t.sha256, "duration_s": round(float(t.t[-1] - t.t[0]), 1)}
            for t in traces
        ],
        **electrical_notes,
        **thermal_notes,
        # Of a fit to what lies before `fitted_before_s`, on what lies after; the twin is fitted to the whole.
        "held_out": [
            {
                "file": trace.path.name,
                "fitted_before_s": round(float(part.t_s[cut - 1]), 1),
                **dataclasses.asdict(validate_twin(part, judged, cut)),
            }
            for trace, part, cut in zip(traces, parts, cuts, strict=True)
        ],
    }
    return dataclasses.replace(twin, provenance=provenance)


def _electrical(
    parts: list[Intervals], info: DriverInfo, max_clock_mhz: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Idle power, leakage and power cap, and what they rest on."""
    power, temp, capped = [], [], []
    for part in parts:
        still = (part.util == 0.0) & (part.sm_mhz_min == max_clock_mhz)
        # Settled: the two intervals before were idle too, since power and sensor trail the load.
        still[2:] &= still[1:-1] & still[:-2]
        still[:2] = False
        power.append(part.power_w[still])
        temp.append(part.temp_c[still])
        capped.append(part.power_w[part.power_capped > 0.5])
    idle_w, idle_c, capped_w = (np.concatenate(x) for x in (power, temp, capped))
    if len(idle_w) < 10 or np.ptp(idle_c) < 3.0:
        raise TraceFormatError(
            f"the traces hold {len(idle_w)} s of idling with a context at {max_clock_mhz:.0f} MHz, over "
            f"{np.ptp(idle_c) if len(idle_c) else 0.0:.1f} degrees; record 30 s of it right after full load"
        )
    slope, at_zero = np.polyfit(idle_c, idle_w, 1)
    reference_c = round(float(idle_c.mean()))
    idle_power_w = at_zero + slope * reference_c
    values = {
        "idle_power_w": idle_power_w,
        "idle_reference_c": reference_c,
        "leakage_per_c": max(0.0, slope / idle_power_w),
        # The mean at the cap depends on the load (peaks are capped), so the limit itself is the bound.
        "power_cap_w": info.power_limit_w,
    }
    notes = {
        "idle": {
            "seconds": len(idle_w),
            "from_c": round(float(idle_c.min()), 1),
            "to_c": round(float(idle_c.max()), 1),
            "rmse_w": round(float(np.std(idle_w - at_zero - slope * idle_c)), 2),
        },
        "at_power_cap": {
            "seconds": len(capped_w),
            "mean_power_w": round(float(capped_w.mean()), 1) if len(capped_w) else None,
        },
    }
    return _rounded(values), notes


def _thermal(parts: list[Intervals]) -> tuple[dict[str, float], dict[str, Any]]:
    """Resistances, time constants, inlet and drift, and what the fit leaves."""
    span = max(float(np.ptp(part.power_w)) for part in parts)
    if span < 100.0:
        raise TraceFormatError(
            f"mean power varies by {span:.0f} W only; record steps between idle and full load"
        )
    measured = [np.stack([part.temp_c, part.mem_temp_c], axis=1) for part in parts]  # [N, 2] each
    own = len(_FITTED) + 1  # then, per trace: inlet and the three nodes at its start

    def misfit(x: np.ndarray) -> list[np.ndarray]:
        wide, offset = np.exp(x[: len(_FITTED)]), x[len(_FITTED)]
        result = []
        for i, part in enumerate(parts):
            inlet, *nodes = x[own + 4 * i : own + 4 * i + 4]
            p = np.array([*wide, offset, inlet, 1.0])
            ran, _ = free_run(part.power_w, part.interval_s, np.array([*nodes, 0.0]), p)
            result.append(measured[i] - ran)
        return result

    start, low, high = [*_START, 0.0], [*_LOW, -20.0], [*_HIGH, 20.0]
    for part in parts:
        start += [float(part.temp_c.min()) - 5.0, *(np.exp(_START[[1, 3, 5]]) * part.power_w[0])]
        low += [-20.0, -50.0, -50.0, -50.0]
        high += [80.0, 100.0, 100.0, 100.0]
    # No robust loss: a mean of whole degrees is off by half a degree at most, so there are no outliers.
    solution = least_squares(
        lambda x: np.concatenate([e.ravel() for e in misfit(x)]), start, bounds=(low, high), x_scale="jac"
    )
    if not solution.success:
        raise TraceFormatError(f"the fit did not converge ({solution.message}); record longer steps of power")
    residuals = misfit(solution.x)
    drift_c, drift_tau_s = _drift(residuals, parts[0].interval_s)
    at_bound = [name for name, side in zip(_FITTED, solution.active_mask, strict=False) if side]
    pooled = np.concatenate(residuals)
    notes: dict[str, Any] = {
        "free_run_rmse_c": {
            "die": round(float(np.sqrt(np.mean(pooled[:, 0] ** 2))), 3),
            "memory": round(float(np.sqrt(np.mean(pooled[:, 1] ** 2))), 3),
        }
    }
    if at_bound:
        notes["at_bound"] = at_bound
    values = {
        **dict(zip(_FITTED, np.exp(solution.x[: len(_FITTED)]), strict=True)),
        "mem_offset_c": solution.x[len(_FITTED)],
        "inlet_c": np.mean(solution.x[own::4]),
        "inlet_drift_c": drift_c,
        "inlet_drift_tau_s": drift_tau_s,
    }
    return _rounded(values), notes


def _drift(residuals: list[np.ndarray], interval_s: float) -> tuple[float, float]:
    """Standard deviation and correlation time of the slow part of [N, 2] residuals.

    White sensor noise is in the autocovariance at lag 0 alone, so the slow part begins at lag 1.
    """
    common = [e.mean(axis=1) for e in residuals]
    longest = min(len(e) for e in common) // 2
    covariance = [
        np.mean(np.concatenate([e[lag:] * e[: len(e) - lag] for e in common])) for lag in range(1, longest)
    ]
    if covariance[0] <= 0.0:
        return 0.0, interval_s
    fallen = np.flatnonzero(np.array(covariance) < covariance[0] / math.e)
    lag = int(fallen[0]) if len(fallen) else longest
    return math.sqrt(covariance[0]), max(1, lag) * interval_s


def _rounded(values: dict[str, Any]) -> dict[str, float]:
    """Five digits are more than a trace determines."""
    return {name: float(f"{value:.5g}") for name, value in values.items()}
