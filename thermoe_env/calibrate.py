"""From recorded traces to a twin, and a twin's error on a trace: `python -m thermoe_env.calibrate`.

Fit: one free run over each whole trace, driven by its measured power, is brought as close as least squares
can to the measured temperatures, all thermal nodes at once. What remains varies slowly and is not
explained by power; its size and memory become the twin's inlet drift.

Error: the twin is started again at every second, from a state estimated by a Kalman filter that has seen
only the past, and runs freely on true power. Persistence (temperature stays as it is) stands beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.optimize import least_squares
from tyro.conf import OmitArgPrefixes, Positional

from thermoe_env.calibration import TwinParams, load_twin, save_twin
from thermoe_env.physics import die_temperature_c, jit, memory_temperature_c, relax, relax_mean
from thermoe_env.scenario import config_path
from thermoe_env.traces import DriverInfo, Intervals, Trace, driver_info_path, load_driver_info, load_trace

HORIZONS_S = (1, 10, 60, 180)
HELD_OUT = 0.45
"""Part of each trace, at its end, on which a fit to the rest is judged."""
WARM_UP = 20
"""Intervals the filter sees before the first restart."""

THERMAL = (
    "r_die_c_per_w", "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "r_mem_c_per_w",
    "tau_mem_s", "mem_offset_c", "inlet_c", "inlet_drift_tau_s",
)  # fmt: skip
"""Fields of `TwinParams` that `free_run` takes, in its order."""
_FITTED = THERMAL[:7]
_START = np.log([0.02, 0.01, 0.02, 4.0, 40.0, 0.02, 1.0])[[0, 1, 3, 2, 4, 5, 6]]
# Between these bounds the nodes keep their meaning: without them two could swap or merge.
_LOW = np.log([1e-4, 1e-4, 0.5, 1e-4, 10.0, 1e-4, 0.05])
_HIGH = np.log([1.0, 1.0, 10.0, 1.0, 1000.0, 1.0, 60.0])

# Noise the filter assumes: means of whole degrees, and what the two-node model misses within a node.
_SENSOR_C = 0.3
_NODE_C = 0.7


@jit
def free_run(power_w, interval_s, start, p):
    """Mean die and memory temperature over each interval, under known power.

    Args:
        power_w: float [N], mean power of each interval.
        interval_s: length of an interval.
        start: float [4], rises of spreader, sink and memory node and offset of the inlet, deg C.
        p: float [10], the `THERMAL` parameters.

    Returns:
        (float [N, 2], deg C; float [4], the state at the end).
    """
    r_die, r_spreader, tau_spreader, r_sink, tau_sink, r_mem, tau_mem, offset, inlet_c, tau_drift = p
    spreader, sink, memory, drift = start
    out = np.empty((power_w.shape[0], 2))
    for i in range(power_w.shape[0]):
        power = power_w[i]
        sink_mean = relax_mean(sink, r_sink * power, interval_s, tau_sink)
        spreader_mean = relax_mean(spreader, r_spreader * power, interval_s, tau_spreader)
        memory_mean = relax_mean(memory, r_mem * power, interval_s, tau_mem)
        out[i, 0] = die_temperature_c(inlet_c + drift, r_die, power, spreader_mean, sink_mean)
        out[i, 1] = memory_temperature_c(inlet_c + drift, offset, memory_mean, sink_mean)
        spreader = relax(spreader, r_spreader * power, interval_s, tau_spreader)
        sink = relax(sink, r_sink * power, interval_s, tau_sink)
        memory = relax(memory, r_mem * power, interval_s, tau_mem)
        drift = relax(drift, 0.0, interval_s, tau_drift)
    return out, np.array([spreader, sink, memory, drift])


def thermal_vector(twin: TwinParams) -> np.ndarray:
    """The `THERMAL` fields of a twin, float [10]."""
    return np.array([getattr(twin, name) for name in THERMAL], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Free-running error of a twin per horizon in s; None where the trace is too short for one."""

    restarts: dict[str, int]
    temp_rmse_c: dict[str, float | None]
    temp_max_error_c: dict[str, float | None]
    mem_temp_rmse_c: dict[str, float | None]
    mem_temp_max_error_c: dict[str, float | None]
    persistence_rmse_c: dict[str, float | None]
    mem_persistence_rmse_c: dict[str, float | None]


def validate_twin(intervals: Intervals, twin: TwinParams, first: int = WARM_UP) -> Validation:
    """Free-running error from every interval on, beginning with number `first`.

    Args:
        intervals: the trace; what lies before `first` serves the filter only.
        twin: the model.
        first: number of the first interval from whose end the twin is started again.
    """
    p, power = thermal_vector(twin), intervals.power_w
    measured = np.stack([intervals.temp_c, intervals.mem_temp_c], axis=1)  # [N, 2]
    states = _filter(power, measured, intervals.interval_s, p, twin.inlet_drift_c)  # [N, 4]
    steps = {h: round(h / intervals.interval_s) for h in HORIZONS_S}
    errors: dict[int, list[np.ndarray]] = {h: [] for h in HORIZONS_S}
    stays: dict[int, list[np.ndarray]] = {h: [] for h in HORIZONS_S}
    for now in range(first, len(measured) - 1):
        ahead, _ = free_run(power[now + 1 : now + 1 + max(steps.values())], intervals.interval_s, states[now], p)
        for h, step in steps.items():
            if now + step < len(measured):
                errors[h].append(ahead[step - 1] - measured[now + step])
                stays[h].append(measured[now] - measured[now + step])

    def table(values: dict[int, list[np.ndarray]], column: int, peak: bool = False) -> dict[str, float | None]:
        cells: dict[str, float | None] = {}
        for h, rows in values.items():
            e = np.abs(np.array(rows)[:, column]) if rows else None
            cells[str(h)] = None if e is None else float(round(e.max() if peak else np.sqrt(np.mean(e**2)), 3))
        return cells

    return Validation(
        restarts={str(h): len(rows) for h, rows in errors.items()},
        temp_rmse_c=table(errors, 0),
        temp_max_error_c=table(errors, 0, peak=True),
        mem_temp_rmse_c=table(errors, 1),
        mem_temp_max_error_c=table(errors, 1, peak=True),
        persistence_rmse_c=table(stays, 0),
        mem_persistence_rmse_c=table(stays, 1),
    )


def fit_twin(traces: list[Trace], info: DriverInfo, interval_s: float = 1.0) -> TwinParams:
    """Fit a twin to traces of one card and judge the method on the ends of the traces.

    Args:
        traces: recordings that hold idle stretches at full clock and steps of power.
        info: limits and names from the card's driver.
        interval_s: interval of the means that are fitted.

    Raises:
        ValueError: the traces lack what the fit needs; says what to record.
    """
    parts = [trace.intervals(interval_s) for trace in traces]
    twin = _fit(parts, info)
    cuts = [round((1.0 - HELD_OUT) * len(part)) for part in parts]
    early = _fit([part.until(cut) for part, cut in zip(parts, cuts, strict=True)], info)
    held_out = [dataclasses.asdict(validate_twin(p, early, c)) for p, c in zip(parts, cuts, strict=True)]
    provenance = {
        "measured_on": info.measured_on,
        "driver": info.driver,
        "traces": [
            {"file": t.path.name, "sha256": t.sha256, "duration_s": round(float(t.t[-1] - t.t[0]), 1)} for t in traces
        ],
        **twin.provenance,
        "held_out": [
            {"file": t.path.name, "fitted_before_s": round(float(p.t_s[c - 1]), 1), "first_part_of_all": True, **h}
            for t, p, c, h in zip(traces, parts, cuts, held_out, strict=True)
        ],
    }
    return dataclasses.replace(twin, provenance=provenance)


def _fit(parts: list[Intervals], info: DriverInfo) -> TwinParams:
    """Fit without judging."""
    max_clock_mhz = max(float(part.sm_mhz_min.max()) for part in parts)
    values, notes = _electrical(parts, info, max_clock_mhz)
    values |= _thermal(parts, notes)
    return TwinParams(
        gpu=info.name,
        **{name: float(f"{value:.5g}") for name, value in values.items()},
        slowdown_c=info.slowdown_c,
        hw_slowdown_c=info.hw_slowdown_c,
        mem_limit_c=info.mem_limit_c,
        shutdown_c=info.shutdown_c,
        max_clock_mhz=max_clock_mhz,
        provenance=notes,
    )


def _electrical(parts: list[Intervals], info: DriverInfo, max_clock_mhz: float) -> tuple[dict, dict]:
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
        raise ValueError(
            f"the traces hold {len(idle_w)} s of idling with a context at {max_clock_mhz:.0f} MHz, over "
            f"{np.ptp(idle_c) if len(idle_c) else 0.0:.1f} degrees; record 30 s of it right after full load"
        )
    slope, at_zero = np.polyfit(idle_c, idle_w, 1)
    reference_c = round(float(idle_c.mean()))
    idle_power_w = at_zero + slope * reference_c
    # A board caps peaks, so the mean power it holds is measured where it says that it does so.
    held = len(capped_w) >= 10
    values = {
        "idle_power_w": idle_power_w,
        "idle_reference_c": reference_c,
        "leakage_per_c": max(0.0, slope / idle_power_w),
        "power_cap_w": capped_w.mean() if held else info.power_limit_w,
    }
    notes = {
        "idle": {
            "seconds": len(idle_w),
            "from_c": round(float(idle_c.min()), 1),
            "to_c": round(float(idle_c.max()), 1),
            "rmse_w": round(float(np.std(idle_w - at_zero - slope * idle_c)), 2),
        },
        "power_cap": f"mean of {len(capped_w)} s at the cap" if held else "limit the board reports; never reached",
        "power_limit_w": info.power_limit_w,
    }
    return values, notes


def _thermal(parts: list[Intervals], notes: dict[str, Any]) -> dict[str, float]:
    """Resistances, time constants, inlet and drift; adds the residual and odd findings to `notes`."""
    span = max(float(np.ptp(part.power_w)) for part in parts)
    if span < 100.0:
        raise ValueError(f"mean power varies by {span:.0f} W only; record steps between idle and full load")
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
        raise ValueError(f"the fit did not converge ({solution.message}); record longer steps of power")
    residuals = misfit(solution.x)
    drift_c, drift_tau_s = _drift(residuals, parts[0].interval_s)
    at_bound = [name for name, side in zip(_FITTED, solution.active_mask, strict=False) if side]
    pooled = np.concatenate(residuals)
    notes["free_run_rmse_c"] = {
        "die": round(float(np.sqrt(np.mean(pooled[:, 0] ** 2))), 3),
        "memory": round(float(np.sqrt(np.mean(pooled[:, 1] ** 2))), 3),
    }
    if at_bound:
        notes["at_bound"] = at_bound
    return {
        **dict(zip(_FITTED, np.exp(solution.x[: len(_FITTED)]), strict=True)),
        "mem_offset_c": solution.x[len(_FITTED)],
        "inlet_c": float(np.mean(solution.x[own::4])),
        "inlet_drift_c": drift_c,
        "inlet_drift_tau_s": drift_tau_s,
    }


def _drift(residuals: list[np.ndarray], interval_s: float) -> tuple[float, float]:
    """Standard deviation and correlation time of the slow part of [N, 2] residuals.

    White sensor noise is in the autocovariance at lag 0 alone, so the slow part begins at lag 1.
    """
    common = [e.mean(axis=1) for e in residuals]
    longest = min(len(e) for e in common) // 2
    covariance = [np.mean(np.concatenate([e[lag:] * e[: len(e) - lag] for e in common])) for lag in range(1, longest)]
    if covariance[0] <= 0.0:
        return 0.0, interval_s
    fallen = np.flatnonzero(np.array(covariance) < covariance[0] / math.e)
    lag = int(fallen[0]) if len(fallen) else longest
    return math.sqrt(covariance[0]), max(1, lag) * interval_s


def _filter(power_w: np.ndarray, measured: np.ndarray, interval_s: float, p: np.ndarray, drift_c: float) -> np.ndarray:
    """Kalman-filtered state [N, 4] after each interval, from it and those before."""
    # One interval is linear in the state, so its matrices are read off `free_run` itself.
    idle = np.zeros(1)
    out0, end0 = free_run(idle, interval_s, np.zeros(4), p)
    runs = [free_run(idle, interval_s, unit, p) for unit in np.eye(4)]
    observe = np.stack([out[0] - out0[0] for out, _ in runs], axis=1)  # [2, 4]
    keep = np.array([end[i] - end0[i] for i, (_, end) in enumerate(runs)])  # [4], each node decays by itself
    spread = np.array([_NODE_C, _NODE_C, _NODE_C, drift_c]) ** 2
    noise = np.diag(spread * (1.0 - keep**2))
    sensor = np.eye(2) * _SENSOR_C**2
    # A trace begins at an unknown moment of its past: at rest under its first power, give or take that.
    state = np.array([p[1] * power_w[0], p[3] * power_w[0], p[5] * power_w[0], 0.0])
    covariance = np.diag([*(np.maximum(state[:3], 1.0) ** 2), drift_c**2])
    states = np.empty((len(power_w), 4))
    for i in range(len(power_w)):
        expected, _ = free_run(power_w[i : i + 1], interval_s, state, p)
        gain = covariance @ observe.T @ np.linalg.inv(observe @ covariance @ observe.T + sensor)
        state = state + gain @ (measured[i] - expected[0])
        covariance = covariance - gain @ observe @ covariance
        _, state = free_run(power_w[i : i + 1], interval_s, state, p)
        covariance = keep[:, None] * covariance * keep + noise
        states[i] = state
    return states
