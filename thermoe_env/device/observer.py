"""The observer: a Kalman filter that follows a device through its sensors and learns what power does not say.

It estimates the state of `free_run`: the four nodes, the drift and the offset of the inlet, how
strongly the present work heats the die, and the memory's share. Validation starts the twin from it, and a
policy that plans ahead can do the same with a live card. The model is linear in its state, so this is the
exact filter (Kalman, 1960) for the noise that the calibration states.
"""

from __future__ import annotations

import math

import numpy as np

from moe.compiled import jit
from thermoe_env.device.free_run import STATE, advance, free_run, settled, thermal_vector
from thermoe_env.device.parameters import TwinParams
from thermoe_env.device.physics import relax_mean

NOISE = (
    "node_noise_c", "inlet_drift_c", "inlet_spread_c", "die_gain_spread", "mem_drift_c", "sensor_noise_c",
)  # fmt: skip
"""Fields of `TwinParams` that the filter takes, in its order."""


def noise_vector(twin: TwinParams) -> np.ndarray:
    """The `NOISE` fields of a twin, float [6]."""
    return np.array([getattr(twin, name) for name in NOISE], dtype=np.float64)


@jit
def start_filter(power_w, p, noise, state, covariance):
    """Fill `state` [8] and `covariance` [8, 8] for a device of which only the power is known.

    A trace begins in the middle of something: settled under its first power, give or take half of it.
    """
    settled(power_w, p, state)
    covariance[:] = 0.0
    for i in range(4):
        covariance[i, i] = (0.5 * state[i]) ** 2 + 1.0
    for i in range(4, 8):
        covariance[i, i] = noise[i - 3] ** 2


@jit
def filter_step(power_w, measured_c, interval_s, p, noise, state, covariance):
    """Follow one interval: correct by what was measured over it, then advance to its end.

    Args:
        power_w: mean power.
        measured_c: float [2], mean temperature of die and memory; the latter NaN where there is no sensor.
        interval_s: length of the interval.
        p: float [15], the `THERMAL` parameters.
        noise: float [6], the `NOISE` parameters.
        state: float [8], at the beginning of the interval; updated to its end.
        covariance: float [8, 8], likewise.
    """
    tau = np.array([p[2], p[4], p[6], p[9], p[12], np.inf, p[13], p[14]])
    h = np.zeros((2, 8))  # what each entry of the state adds to the two means
    for i in range(3):
        h[0, i] = relax_mean(1.0, 0.0, interval_s, tau[i])
    h[1, 1], h[1, 2] = h[0, 1], h[0, 2]
    h[1, 3] = relax_mean(1.0, 0.0, interval_s, tau[3])
    h[:, 4] = 1.0
    h[:, 5] = 1.0
    h[0, 6] = p[0] * power_w
    h[1, 7] = 1.0
    seen = not math.isnan(measured_c[1])
    if not seen:
        h[1] = 0.0  # says nothing of the state
    mean_c, trial = np.empty(2), state.copy()
    advance(power_w, interval_s, p, trial, mean_c)
    ch = np.zeros((8, 2))
    for i in range(8):
        for j in range(8):
            ch[i, 0] += covariance[i, j] * h[0, j]
            ch[i, 1] += covariance[i, j] * h[1, j]
    s00, s01, s11 = noise[5] ** 2, 0.0, noise[5] ** 2
    for i in range(8):
        s00 += h[0, i] * ch[i, 0]
        s01 += h[0, i] * ch[i, 1]
        s11 += h[1, i] * ch[i, 1]
    determinant = s00 * s11 - s01 * s01
    off0, off1 = measured_c[0] - mean_c[0], measured_c[1] - mean_c[1] if seen else 0.0
    gain = np.empty((8, 2))
    for i in range(8):
        gain[i, 0] = (ch[i, 0] * s11 - ch[i, 1] * s01) / determinant
        gain[i, 1] = (ch[i, 1] * s00 - ch[i, 0] * s01) / determinant
        state[i] += gain[i, 0] * off0 + gain[i, 1] * off1
    advance(power_w, interval_s, p, state, mean_c)
    for i in range(8):
        for j in range(8):
            covariance[i, j] -= gain[i, 0] * ch[j, 0] + gain[i, 1] * ch[j, 1]
    for i in range(8):
        for j in range(8):
            covariance[i, j] *= math.exp(-interval_s / tau[i] - interval_s / tau[j])
        spread = noise[0] if i < 4 else noise[i - 3]
        covariance[i, i] += spread * spread * (1.0 - math.exp(-2.0 * interval_s / tau[i]))


@jit
def follow(power_w, measured_c, interval_s, p, noise):
    """Filtered state after each interval, from it and those before.

    Args:
        power_w: float [N], mean power of each interval.
        measured_c: float [N, 2], mean temperature of die and memory; the latter NaN where there is no sensor.
        interval_s: length of an interval.
        p: float [15], the `THERMAL` parameters.
        noise: float [6], the `NOISE` parameters.

    Returns:
        float [N, 8], states as in `thermoe_env.device.free_run.STATE`.
    """
    state, covariance = np.empty(8), np.empty((8, 8))
    start_filter(power_w[0], p, noise, state, covariance)
    states = np.empty((power_w.shape[0], 8))
    for i in range(power_w.shape[0]):
        filter_step(power_w[i], measured_c[i], interval_s, p, noise, state, covariance)
        states[i] = state
    return states


class Observer:
    """Follows one device, interval by interval, and forecasts it."""

    def __init__(self, twin: TwinParams, power_w: float, interval_s: float = 1.0) -> None:
        """Begin with a device that has drawn about `power_w` for some minutes."""
        self.interval_s = interval_s
        self._p, self._noise = thermal_vector(twin), noise_vector(twin)
        self._state, self._covariance = np.empty(len(STATE)), np.empty((len(STATE), len(STATE)))
        start_filter(power_w, self._p, self._noise, self._state, self._covariance)

    def update(self, power_w: float, temp_c: float, mem_temp_c: float) -> None:
        """Take in the last interval: its mean power and temperatures; NaN for a memory without a sensor."""
        measured_c = np.array([temp_c, mem_temp_c])
        filter_step(power_w, measured_c, self.interval_s, self._p, self._noise, self._state, self._covariance)

    @property
    def state(self) -> dict[str, float]:
        """The estimate, by the names in `thermoe_env.device.free_run.STATE`."""
        return dict(zip(STATE, self._state.tolist(), strict=True))

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation of the estimate, likewise."""
        return dict(zip(STATE, np.sqrt(np.diag(self._covariance)).tolist(), strict=True))

    def forecast(self, power_w: np.ndarray) -> np.ndarray:
        """Mean temperature of die and memory over coming intervals of known power.

        Args:
            power_w: float [N].

        Returns:
            float [N, 2], deg C.
        """
        return free_run(np.asarray(power_w, np.float64), self.interval_s, self._state, self._p)[0]
