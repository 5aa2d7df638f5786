"""Fit of a twin to recorded traces.

Heat: what the twin is used for is what it is fitted to. From every third second of every trace it is started
again in its observer's state and runs freely on the measured power; least squares bring its errors after
1, 10, 60 and 180 s down together, over all parameters of the model and of the observer at once. A weak prior
holds what a trace does not determine near values typical of air-cooled data-centre cards, and what it was
left to decide is named.
Power: `thermoe_env.calibration.power`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from tqdm import tqdm

from thermoe_env.calibration.driver_info import DriverInfo
from thermoe_env.calibration.power import fit_power
from thermoe_env.calibration.traces import Intervals, Segment, Trace, refuse_foreign_temperature
from thermoe_env.calibration.validation import HORIZONS_S, SHORTEST_S, WARM_UP, horizon_errors, validate_twin
from thermoe_env.configs import validated
from thermoe_env.device.free_run import THERMAL
from thermoe_env.device.observer import NOISE
from thermoe_env.device.parameters import TwinParams
from thermoe_env.errors import TraceFormatError

HELD_OUT = 0.45
"""Part of a single trace, at its end, on which a fit to the rest is judged."""

# Typical values; steps of the search are relative to a unit of the logarithm, or to the unit given.
_PRIOR: dict[str, tuple[float, float | None]] = {
    "r_die_c_per_w": (0.021, None),
    "r_spreader_c_per_w": (0.008, None),
    "tau_spreader_s": (3.5, None),
    "r_sink_c_per_w": (0.029, None),
    "tau_sink_s": (38.0, None),
    "r_fan_c_per_w": (-0.014, None),
    "tau_fan_s": (230.0, None),
    "r_stack_c_per_w": (0.015, None),
    "r_mem_c_per_w": (0.012, None),
    "tau_mem_s": (3.0, None),
    "mem_offset_c": (1.2, 1.0),
    "inlet_c": (29.0, 3.0),
    "inlet_drift_tau_s": (90.0, None),
    "die_gain_tau_s": (100.0, None),
    "mem_drift_tau_s": (5.0, None),
    "node_noise_c": (0.6, None),
    "inlet_drift_c": (1.0, None),
    "inlet_spread_c": (2.5, None),
    "die_gain_spread": (0.12, None),
    "mem_drift_c": (1.5, None),
    "sensor_noise_c": (0.35, None),
}
_PRIOR_WEIGHT = 0.12
_SCALE_C = np.array([0.45, 0.75, 1.3, 1.6])
"""Errors after 1, 10, 60 and 180 s that count alike."""
_MEMORY_WEIGHT = 0.3
_STRIDE = 3
_UNKNOWN = 0.5
"""Share of the prior's variance that is left where a trace says little of a parameter."""
_ESSENTIAL = ("r_die_c_per_w", "r_sink_c_per_w", "tau_sink_s")
_CENTRE = np.array([np.log(abs(v)) if unit is None else v / unit for v, unit in _PRIOR.values()])
_LIMIT = np.array([2.5 if unit is None else 20.0 / unit for _, unit in _PRIOR.values()])


def fit_twin(
    traces: Sequence[Trace],
    info: DriverInfo,
    segments: Sequence[list[Segment] | None] | None = None,
    judge: bool = True,
) -> TwinParams:
    """Fit a twin to traces of one kind of card and judge the method on what it was not fitted to.

    Args:
        traces: recordings with idle stretches at full clock and steps of power.
        info: limits and names from the card's driver.
        segments: what ran in each trace, for the power of loads; None where unknown.
        judge: fit again without each trace (without the end of a single one) and judge on it.

    Raises:
        TraceFormatError: the traces lack what the fit needs; says what to record.
    """
    parts = [trace.intervals() for trace in traces]
    for trace, part in zip(traces, parts, strict=True):
        refuse_foreign_temperature(trace.path, part)
        if len(part) < SHORTEST_S:
            raise TraceFormatError(
                f"{trace.path}: {len(part)} s are too short, a fit needs {SHORTEST_S:.0f} s"
            )
    loads: list[list[Segment] | None] = list(segments or [None] * len(parts))
    thermal, thermal_notes = fit_heat(parts)
    power, power_notes = fit_power(parts, loads, info)
    names = ("slowdown_c", "hw_slowdown_c", "mem_limit_c", "shutdown_c")
    limits = {name: getattr(info, name) for name in names}
    fitted = {"gpu": info.name, **power, **thermal, **limits, "provenance": {}}
    twin = validated(TwinParams, fitted, "the fit")
    missing = set(info.missing)
    if all(np.isnan(part.mem_temp_c).all() for part in parts):
        missing.add("mem_temp_c")
    provenance = {
        "measured_on": info.measured_on,
        "driver": info.driver,
        "missing": sorted(missing),
        "traces": [
            {"file": t.path.name, "sha256": t.sha256, "duration_s": round(float(t.t[-1] - t.t[0]), 1)}
            for t in traces
        ],
        **power_notes,
        **thermal_notes,
        "held_out": _held_out(traces, parts, loads, info, twin) if judge else [],
    }
    return dataclasses.replace(twin, provenance=provenance)


def _held_out(
    traces: Sequence[Trace],
    parts: list[Intervals],
    loads: list[list[Segment] | None],
    info: DriverInfo,
    twin: TwinParams,
) -> list[dict[str, Any]]:
    """Errors of fits that have not seen what they are judged on."""
    if len(parts) == 1:
        cut = round((1.0 - HELD_OUT) * len(parts[0]))
        heat, _ = fit_heat([parts[0].until(cut)])
        judged = validated(TwinParams, {**vars(twin), **heat}, "the fit to its beginning")
        errors = validate_twin(parts[0], judged, first=cut)
        fitted = f"the same trace before {parts[0].t_s[cut - 1]:.0f} s"
        return [{"file": traces[0].path.name, "fitted_to": fitted, **dataclasses.asdict(errors)}]
    held = []
    for i, trace in enumerate(traces):
        others = [j for j in range(len(parts)) if j != i]
        heat, _ = fit_heat([parts[j] for j in others])
        power, _ = fit_power([parts[j] for j in others], [loads[j] for j in others], info)
        judged = validated(TwinParams, {**vars(twin), **heat, **power}, f"the fit without {trace.path.name}")
        own = loads[i]
        known = own is not None and {segment.load for segment in own if segment.tokens} <= set(judged.loads)
        errors = validate_twin(parts[i], judged, own if known else None)
        fitted = ", ".join(traces[j].path.name for j in others)
        held.append({"file": trace.path.name, "fitted_to": fitted, **dataclasses.asdict(errors)})
    return held


def fit_heat(parts: Sequence[Intervals]) -> tuple[dict[str, float], dict[str, Any]]:
    """The `THERMAL` and `NOISE` parameters of traces, and notes on what they determine.

    Raises:
        TraceFormatError: the traces do not determine an essential parameter; names it.
    """
    measured = [np.stack([part.temp_c, part.mem_temp_c], axis=1) for part in parts]  # [N, 2] each
    steps = np.array([round(h / parts[0].interval_s) for h in HORIZONS_S])

    bar = tqdm(desc=f"fit of {sum(map(len, parts))} s", unit="run", leave=False, delay=2.0)

    def residuals(z: np.ndarray) -> np.ndarray:
        bar.update()
        values = np.array(list(_values(z).values()))
        p, noise = values[: len(THERMAL)], values[len(THERMAL) :]
        rows = [_PRIOR_WEIGHT * (z - _CENTRE)]
        for part, truth in zip(parts, measured, strict=True):
            errors = horizon_errors(
                part.power_w, truth, part.interval_s, p, noise, WARM_UP, _STRIDE, steps
            )  # [N, H, 2]
            for h in range(len(steps)):
                seen = errors[np.isfinite(errors[:, h, 0]), h]  # [n, 2]
                weight = 1.0 / _SCALE_C[h] / np.sqrt(max(1, len(seen)) * len(parts))
                memory = seen[np.isfinite(seen[:, 1]), 1]  # none where the card has no such sensor
                rows += [weight * seen[:, 0], weight * _MEMORY_WEIGHT * memory]
        return np.concatenate(rows)

    solution = least_squares(
        residuals, _CENTRE, bounds=(_CENTRE - _LIMIT, _CENTRE + _LIMIT), x_scale=1.0, max_nfev=60
    )
    bar.close()
    left = np.diag(np.linalg.inv(solution.jac.T @ solution.jac)) * _PRIOR_WEIGHT**2
    unknown = [name for name, share in zip(_PRIOR, left, strict=True) if share > _UNKNOWN]
    missing = [name for name in _ESSENTIAL if name in unknown]
    if missing:
        raise TraceFormatError(
            f"the traces do not determine {', '.join(missing)}: record steps of power, each held for a "
            "minute or more (calibrate record does)"
        )
    notes = {"left_to_the_prior": unknown} if unknown else {}
    return {name: float(f"{value:.5g}") for name, value in _values(solution.x).items()}, notes


def _values(z: np.ndarray) -> dict[str, float]:
    """Parameters by name from the search's coordinates."""
    return {
        name: float(np.copysign(np.exp(x), value) if unit is None else x * unit)
        for (name, (value, unit)), x in zip(_PRIOR.items(), z, strict=True)
    }


assert tuple(_PRIOR) == (*THERMAL, *NOISE)
