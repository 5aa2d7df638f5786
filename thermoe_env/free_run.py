"""How far a twin's temperatures drift from a device's when it runs on its own.

The twin is started again after every interval of a trace, from a state estimated by a Kalman filter that
has seen only the past, and runs freely on the true power. Persistence (the temperature stays as it is)
stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thermoe_env.calibration import TwinParams
from thermoe_env.physics import die_temperature_c, jit, memory_temperature_c, relax, relax_mean
from thermoe_env.traces import Intervals

HORIZONS_S = (1, 10, 60, 180)
WARM_UP = 20
"""Intervals the filter sees before the first restart."""

THERMAL = (
    "r_die_c_per_w", "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "r_mem_c_per_w",
    "tau_mem_s", "mem_offset_c", "inlet_c", "inlet_drift_tau_s",
)  # fmt: skip
"""Fields of `TwinParams` that `free_run` takes, in its order."""

# Noise the filter assumes: means of whole degrees, and what the model misses within a node.
_SENSOR_C = 0.3
_NODE_C = 0.7
_INLET_C = 5.0  # one place and day from another


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
    r_die, r_spreader, tau_spreader, r_sink, tau_sink = p[0], p[1], p[2], p[3], p[4]
    r_mem, tau_mem, offset, inlet_c, tau_drift = p[5], p[6], p[7], p[8], p[9]
    spreader, sink, memory, drift = start[0], start[1], start[2], start[3]
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
    states = filter_states(power, measured, intervals.interval_s, p, twin.inlet_drift_c)  # [N, 5]
    steps = {h: round(h / intervals.interval_s) for h in HORIZONS_S}
    errors: dict[int, list[np.ndarray]] = {h: [] for h in HORIZONS_S}
    stays: dict[int, list[np.ndarray]] = {h: [] for h in HORIZONS_S}
    for now in range(first, len(measured) - 1):
        ahead, _ = free_run(
            power[now + 1 : now + 1 + max(steps.values())], intervals.interval_s, states[now, :4], p
        )
        ahead += states[now, 4]
        for h, step in steps.items():
            if now + step < len(measured):
                errors[h].append(ahead[step - 1] - measured[now + step])
                stays[h].append(measured[now] - measured[now + step])

    def table(
        values: dict[int, list[np.ndarray]], column: int, peak: bool = False
    ) -> dict[str, float | None]:
        cells: dict[str, float | None] = {}
        for h, rows in values.items():
            e = np.abs(np.array(rows)[:, column]) if rows else None
            cells[str(h)] = (
                None if e is None else float(round(e.max() if peak else np.sqrt(np.mean(e**2)), 3))
            )
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


def filter_states(
    power_w: np.ndarray, measured: np.ndarray, interval_s: float, p: np.ndarray, drift_c: float
) -> np.ndarray:
    """Kalman-filtered state after each interval, from it and those before.

    Args:
        power_w: float [N], mean power of each interval.
        measured: float [N, 2], mean temperature of die and memory, deg C.
        interval_s: length of an interval.
        p: float [10], as for `free_run`.
        drift_c: standard deviation of the inlet's drift.

    Returns:
        float [N, 5]: the state of `free_run`, and how far the trace's inlet lies from the twin's.
    """
    # One interval is linear in the state, so its matrices are read off `free_run` itself.
    no_power = np.zeros(1)
    at_rest, _ = free_run(no_power, interval_s, np.zeros(4), p)
    runs = [free_run(no_power, interval_s, unit, p) for unit in np.eye(4)]
    observe = np.array([*((out - at_rest)[0] for out, _ in runs), [1.0, 1.0]]).T  # [2, 5]
    keep = np.array([*(end[i] for i, (_, end) in enumerate(runs)), 1.0])  # [5], each node decays by itself
    noise = np.diag(np.array([_NODE_C, _NODE_C, _NODE_C, drift_c, 0.0]) ** 2 * (1.0 - keep**2))
    sensor = np.eye(2) * _SENSOR_C**2
    # A trace begins in the middle of something: settled under its first power, give or take as much.
    nodes = p[[1, 3, 5]] * power_w[0]
    state = np.array([*nodes, 0.0, 0.0])
    covariance = np.diag(np.array([*nodes, drift_c, _INLET_C]) ** 2)
    states = np.empty((len(power_w), 5))
    for i in range(len(power_w)):
        ran, _ = free_run(power_w[i : i + 1], interval_s, state[:4], p)
        gain = covariance @ observe.T @ np.linalg.inv(observe @ covariance @ observe.T + sensor)
        state = state + gain @ (measured[i] - ran[0] - state[4])
        covariance = covariance - gain @ observe @ covariance
        _, state[:4] = free_run(power_w[i : i + 1], interval_s, state[:4], p)
        covariance = keep[:, None] * covariance * keep + noise
        states[i] = state
    return states
