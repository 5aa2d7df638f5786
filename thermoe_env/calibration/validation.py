"""How far a twin is from a device on a recorded trace: heat, power, throughput, throttling.

Heat: the twin is started again after every interval, from the state of an observer that has seen only the
past, and runs freely on the true power. Persistence (the temperature stays as it is) stands beside it.
Power: from the workload's own record alone. The measured power is used to judge, never to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe.compiled import jit
from thermoe_env.calibration.traces import Intervals, Segment, TraceFormatError
from thermoe_env.calibration.workload_power import PredictedPower, predict_power
from thermoe_env.device.free_run import advance, thermal_vector
from thermoe_env.device.observer import follow, noise_vector
from thermoe_env.device.parameters import TwinParams

HORIZONS_S = (1, 10, 60, 180)
WARM_UP = 20
"""Intervals the observer sees before the first restart."""
POWER_WINDOW_S = 5.0
SHORTEST_S = 60.0
"""Least length of a trace that says anything of slow heat."""


@dataclass(frozen=True, kw_only=True)
class PowerErrors:
    """Error of the power that the workload's record predicts; ratios, 0.01 is a percent."""

    seconds: int
    """Seconds of the trace that segments cover."""
    power_mape: float
    """Mean absolute percentage error over windows of 5 s."""
    energy_error: float
    """Predicted over measured energy of all windows, less 1."""
    throughput_error: float
    """Predicted over recorded tokens, less 1."""
    throughput_mape: float
    """Mean absolute percentage error of a segment's forward passes."""


@dataclass(frozen=True, kw_only=True)
class ThrottleErrors:
    """Which seconds a twin says are throttled (power cap or heat); None where a ratio has no base."""

    true_s: int
    predicted_s: int
    precision: float | None
    recall: float | None


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
    throttle: ThrottleErrors
    power: PowerErrors | None
    """None without segments."""


@jit
def horizon_errors(power_w, measured_c, interval_s, p, noise, first, stride, steps):
    """Forecast less measurement, `steps` intervals after every restart.

    Args:
        power_w: float [N].
        measured_c: float [N, 2].
        interval_s: length of an interval.
        p: float [15], the `THERMAL` parameters.
        noise: float [6], the `NOISE` parameters.
        first: number of the first interval after which the twin is started again.
        stride: intervals between restarts.
        steps: int [H], ascending.

    Returns:
        float [N, H, 2], deg C; NaN where there is no restart or no measurement.
    """
    n = power_w.shape[0]
    states = follow(power_w, measured_c, interval_s, p, noise)
    errors = np.full((n, steps.shape[0], 2), np.nan)
    mean_c = np.empty(2)
    for now in range(first, n - 1, stride):
        state, at = states[now].copy(), 0
        for ahead in range(1, min(steps[-1], n - 1 - now) + 1):
            advance(power_w[now + ahead], interval_s, p, state, mean_c)
            if ahead == steps[at]:
                errors[now, at] = mean_c - measured_c[now + ahead]
                at += 1
    return errors


def validate_twin(
    intervals: Intervals, twin: TwinParams, segments: list[Segment] | None = None, first: int = WARM_UP
) -> Validation:
    """Error of a twin on a trace.

    Args:
        intervals: the trace.
        twin: the model.
        segments: what ran when, for the error of power.
        first: number of the first interval after which the twin is started again; what lies before serves
            the observer only.

    Raises:
        TraceFormatError: shorter than 60 s, or a load that the twin does not know.
    """
    dt = intervals.interval_s
    if len(intervals) * dt < SHORTEST_S:
        raise TraceFormatError(
            f"{len(intervals) * dt:.0f} s are too short to judge a twin: record {SHORTEST_S:.0f} or more"
        )
    measured_c = np.stack([intervals.temp_c, intervals.mem_temp_c], axis=1)  # [N, 2]
    steps = np.array([round(h / dt) for h in HORIZONS_S])
    errors = horizon_errors(
        intervals.power_w, measured_c, dt, thermal_vector(twin), noise_vector(twin), first, 1, steps
    )
    stays = np.full_like(errors, np.nan)
    for h, step in enumerate(steps):
        if len(stays) - step <= first:
            continue
        stays[first : len(stays) - step, h] = (measured_c[: len(stays) - step] - measured_c[step:])[first:]
    predicted = None if segments is None else predict_power(intervals, segments, twin)
    return Validation(
        restarts={str(h): int(np.isfinite(errors[:, i, 0]).sum()) for i, h in enumerate(HORIZONS_S)},
        temp_rmse_c=_table(errors[..., 0], _rms),
        temp_max_error_c=_table(errors[..., 0], _peak),
        mem_temp_rmse_c=_table(errors[..., 1], _rms),
        mem_temp_max_error_c=_table(errors[..., 1], _peak),
        persistence_rmse_c=_table(stays[..., 0], _rms),
        mem_persistence_rmse_c=_table(stays[..., 1], _rms),
        throttle=_throttle(intervals, twin, predicted),
        power=None
        if predicted is None
        else PowerErrors(
            seconds=int(predicted.covered.sum() * dt),
            power_mape=_mape(intervals, predicted.power_w, predicted.covered),
            energy_error=_ratio(
                predicted.power_w[predicted.covered].sum(), intervals.power_w[predicted.covered].sum()
            ),
            throughput_error=_ratio(
                (predicted.steps * predicted.tokens).sum(), (predicted.true_steps * predicted.tokens).sum()
            ),
            throughput_mape=_rounded(float(np.mean(np.abs(predicted.steps / predicted.true_steps - 1.0)))),
        ),
    )


def _mape(intervals: Intervals, power_w: np.ndarray, covered: np.ndarray) -> float:
    """Mean absolute percentage error over whole windows that segments cover."""
    width = round(POWER_WINDOW_S / intervals.interval_s)
    count = len(intervals) // width
    windows = np.stack([power_w, intervals.power_w, covered])[:, : count * width].reshape(3, count, width)
    predicted, true, whole = windows[0].mean(axis=1), windows[1].mean(axis=1), windows[2].all(axis=1)
    if not whole.any():
        raise TraceFormatError(
            f"segments cover no {POWER_WINDOW_S:.0f} s of the trace: do they belong to it?"
        )
    return _rounded(float(np.mean(np.abs(predicted[whole] / true[whole] - 1.0))))


def _throttle(intervals: Intervals, twin: TwinParams, work: PredictedPower | None) -> ThrottleErrors:
    """Throttled seconds: the sensors' own word against what ran, else against power at the cap's onset."""
    true = intervals.throttled > 0.5
    capped = intervals.power_w >= twin.cap_onset_w if work is None else work.capped_share > 0.5
    hot = (intervals.temp_c >= twin.slowdown_c) | (intervals.mem_temp_c >= twin.mem_limit_c)
    predicted = capped | hot
    both = int((true & predicted).sum())
    return ThrottleErrors(
        true_s=round(true.sum() * intervals.interval_s),
        predicted_s=round(predicted.sum() * intervals.interval_s),
        precision=_rounded(both / predicted.sum()) if predicted.any() else None,
        recall=_rounded(both / true.sum()) if true.any() else None,
    )


def _table(errors: np.ndarray, summary: Callable[[np.ndarray], float]) -> dict[str, float | None]:
    """One number per horizon from errors [N, H]."""
    columns = [column[np.isfinite(column)] for column in errors.T]
    return {str(h): summary(e) if len(e) else None for h, e in zip(HORIZONS_S, columns, strict=True)}


def _rms(errors: np.ndarray) -> float:
    return _rounded(np.sqrt(np.mean(errors**2)))


def _peak(errors: np.ndarray) -> float:
    return _rounded(np.abs(errors).max())


def _ratio(predicted: float, true: float) -> float:
    return _rounded(predicted / true - 1.0)


def _rounded(value: float) -> float:
    return float(round(float(value), 4))
