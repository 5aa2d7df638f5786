"""The twin's heat over equal intervals of known power: what fits, validation and the observer run.

A state has four nodes, rises above the inlet in deg C, and four things that power does not explain.
"""

from __future__ import annotations

import numpy as np

from moe.compiled import jit
from thermoe_env.device.parameters import TwinParams
from thermoe_env.device.physics import die_temperature_c, memory_temperature_c, relax, relax_mean

STATE = ("spreader", "sink", "fan", "memory", "inlet_drift", "inlet_offset", "die_gain", "mem_drift")
"""Entries of a state; `die_gain` is relative, the others in deg C. The offset stays, the other three fade."""

THERMAL = (
    "r_die_c_per_w", "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "r_fan_c_per_w",
    "tau_fan_s", "r_stack_c_per_w", "r_mem_c_per_w", "tau_mem_s", "mem_offset_c", "inlet_c",
    "inlet_drift_tau_s", "die_gain_tau_s", "mem_drift_tau_s",
)  # fmt: skip
"""Fields of `TwinParams` that `advance` takes, in its order."""


def thermal_vector(twin: TwinParams) -> np.ndarray:
    """The `THERMAL` fields of a twin, float [15]."""
    return np.array([getattr(twin, name) for name in THERMAL], dtype=np.float64)


@jit
def settled(power_w, p, state):
    """Fill `state` with a device settled under `power_w` that nothing disturbs."""
    state[:] = 0.0
    state[0], state[1], state[2], state[3] = p[1] * power_w, p[3] * power_w, p[5] * power_w, p[8] * power_w


@jit
def advance(power_w, interval_s, p, state, mean_c):
    """Advance a device by one interval of constant power.

    Args:
        power_w: mean power.
        interval_s: its length.
        p: float [15], the `THERMAL` parameters.
        state: float [8], updated.
        mean_c: float [2], filled with the interval's mean temperature of die and memory.
    """
    r_die, r_spreader, tau_spreader, r_sink, tau_sink, r_fan, tau_fan = (
        p[0],
        p[1],
        p[2],
        p[3],
        p[4],
        p[5],
        p[6],
    )
    r_stack, r_mem, tau_mem, offset = p[7], p[8], p[9], p[10]
    inlet = p[11] + state[4] + state[5]
    spreader = relax_mean(state[0], r_spreader * power_w, interval_s, tau_spreader)
    sink = relax_mean(state[1], r_sink * power_w, interval_s, tau_sink)
    fan = relax_mean(state[2], r_fan * power_w, interval_s, tau_fan)
    memory = relax_mean(state[3], r_mem * power_w, interval_s, tau_mem)
    mean_c[0] = die_temperature_c(inlet, r_die * (1.0 + state[6]), power_w, spreader, sink, fan)
    mean_c[1] = memory_temperature_c(inlet, offset, r_stack, power_w, memory, sink, fan) + state[7]
    state[0] = relax(state[0], r_spreader * power_w, interval_s, tau_spreader)
    state[1] = relax(state[1], r_sink * power_w, interval_s, tau_sink)
    state[2] = relax(state[2], r_fan * power_w, interval_s, tau_fan)
    state[3] = relax(state[3], r_mem * power_w, interval_s, tau_mem)
    state[4] = relax(state[4], 0.0, interval_s, p[12])
    state[6] = relax(state[6], 0.0, interval_s, p[13])
    state[7] = relax(state[7], 0.0, interval_s, p[14])


@jit
def free_run(power_w, interval_s, start, p):
    """Mean die and memory temperature over each interval, under known power.

    Args:
        power_w: float [N], mean power of each interval.
        interval_s: length of an interval.
        start: float [8], the state at the beginning.
        p: float [15], the `THERMAL` parameters.

    Returns:
        (float [N, 2], deg C; float [8], the state at the end).
    """
    state = start.copy()
    means_c = np.empty((power_w.shape[0], 2))
    for i in range(power_w.shape[0]):
        advance(power_w[i], interval_s, p, state, means_c[i])
    return means_c, state
