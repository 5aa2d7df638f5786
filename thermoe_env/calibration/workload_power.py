"""Power and throughput of a calibration load from its own record: what ran, not what was measured.

A forward pass costs the energy and time in the calibration's table for its load, linear between measured
numbers of tokens. Idle power leaks with the die's temperature, which the twin computes from the very power
it predicts; the power cap holds the sum and stretches the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thermoe_env.calibration.traces import Intervals, Segment
from thermoe_env.device.free_run import STATE, advance, settled, thermal_vector
from thermoe_env.device.parameters import TwinParams
from thermoe_env.device.physics import capped_clock, capped_power_w, idle_power_w
from thermoe_env.errors import TraceFormatError


@dataclass(frozen=True)
class PredictedPower:
    """N intervals of a trace, G segments that did work."""

    power_w: np.ndarray
    """float [N]; the measured power where no segment says what ran."""
    covered: np.ndarray
    """bool [N]: segments say what ran in the whole interval."""
    tokens: np.ndarray
    """float [G], tokens per forward pass."""
    steps: np.ndarray
    """float [G], predicted forward passes."""
    true_steps: np.ndarray
    """float [G]"""
    capped_share: np.ndarray
    """float [N], share of the interval under the power cap."""


def cost_of(twin: TwinParams, segment: Segment) -> tuple[float, float, float]:
    """Cost of a forward pass of a segment: (J above idle, s, share of the time under the power cap).

    Raises:
        TraceFormatError: a load, an expert count or a number of tokens that the calibration never saw.
    """
    if segment.load not in twin.loads:
        raise TraceFormatError(
            f"the twin knows the loads {sorted(twin.loads)}, not {segment.load!r}; "
            "fit it with the segments of a trace of this load (calibrate fit --segments)"
        )
    rows = np.array([row for row in twin.loads[segment.load] if row[0] == segment.k])
    if not len(rows) or not rows[0, 1] <= segment.tokens <= rows[-1, 1]:
        seen = f"{rows[0, 1]:g} to {rows[-1, 1]:g} tokens" if len(rows) else "nothing"
        raise TraceFormatError(
            f"of load {segment.load!r} at k={segment.k:g} the twin has seen {seen}, "
            f"the segment from {segment.t0} s has {segment.tokens:g}"
        )
    energy_j, latency_s, capped = (
        float(np.interp(segment.tokens, rows[:, 1], rows[:, i])) for i in (2, 3, 4)
    )
    return energy_j, latency_s, capped


def predict_power(intervals: Intervals, segments: list[Segment], twin: TwinParams) -> PredictedPower:
    """Power of every interval and forward passes of every segment from the record.

    Raises:
        TraceFormatError: as `cost_of`.
    """
    n, dt = len(intervals), intervals.interval_s
    begin_s = intervals.t_s - dt
    dynamic_w, covered_s, capped_share = np.zeros(n), np.zeros(n), np.zeros(n)
    tokens, steps, true_steps = [], [], []
    for segment in segments:
        overlap_s = np.minimum(intervals.t_s, segment.t1) - np.maximum(begin_s, segment.t0)
        overlap_s = np.maximum(overlap_s, 0.0)
        covered_s += overlap_s
        if segment.tokens == 0:
            continue
        seconds = segment.t1 - segment.t0
        energy_j, latency_s, capped = cost_of(twin, segment)
        capped_share += overlap_s / dt * capped * segment.duty
        dynamic_w += overlap_s / dt * energy_j * segment.steps / seconds
        demand_w = twin.idle_power_w + energy_j / latency_s
        clock = capped_clock(1.0, demand_w, twin.power_cap_w) if demand_w > twin.power_cap_w else 1.0
        tokens.append(segment.tokens)
        steps.append(seconds * segment.duty / (latency_s / clock))
        true_steps.append(segment.steps)
    # Segments are a few milliseconds apart.
    covered = covered_s > 0.98 * dt
    power_w = np.empty(n)
    p, state, mean_c = thermal_vector(twin), np.empty(len(STATE)), np.empty(2)
    settled(intervals.power_w[0], p, state)
    state[5] = intervals.temp_c[0] - p[11] - p[0] * intervals.power_w[0] - state[:3].sum()  # today's inlet
    die_c = intervals.temp_c[0]
    for i in range(n):
        if covered[i]:
            idle_w = idle_power_w(twin.idle_power_w, twin.leakage_per_c, die_c, twin.idle_reference_c)
            power_w[i] = capped_power_w(idle_w, dynamic_w[i], twin.power_cap_w)
        else:
            power_w[i] = intervals.power_w[i]
        advance(power_w[i], dt, p, state, mean_c)
        die_c = mean_c[0]
    return PredictedPower(
        power_w, covered, np.array(tokens), np.array(steps), np.array(true_steps), capped_share
    )
