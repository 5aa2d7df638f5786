"""Power, clock and temperature of one device: pure scalar functions, compiled.

They are the only place where the twin's physics is written; the environment, the batched core, the
calibration and the tests call them.

Thermal model (Foster form of a series RC network, per device):

    T_die = T_inlet + r_die * P + x_spreader + x_sink + x_fan,   dx_i/dt = (r_i * P - x_i) / tau_i

The die itself settles within a few of the sensor's refresh periods, so its resistance acts at once.
`x_fan` is the chassis: its fans follow the heat within minutes and take part of the rise back, so its
resistance is negative. Memory sits under the same heatsink and has a node of its own, and an offset for
power that does not follow the device's: T_mem = T_inlet + offset + r_stack * P + x_mem + x_sink + x_fan.
Each node is advanced by the exact solution for constant power over a step, so the result does not depend
on the step where power is constant.

Leakage raises idle power linearly with the die's temperature (first-order form of the curves in
Price et al., arXiv:1407.8116). Frequency scaling is modelled, not measured: time of compute-bound
work goes with 1/f, its power with f V^2, V falling linearly with f down to a floor.
"""

from __future__ import annotations

import math

from moe.compiled import jit

MIN_CLOCK = 0.25
"""Lowest clock the throttles may set, as a fraction of the maximum."""
_VOLTAGE_SLOPE = 0.6
_VOLTAGE_FLOOR = 0.7


@jit
def decay(dt_s, tau_s):
    """Share of a node's distance from its target that is left after `dt_s`."""
    return math.exp(-dt_s / tau_s)


@jit
def approach(x, target, keep):
    """First-order approach of `x` to a constant `target`, exact; `keep` is the `decay` over the step."""
    return target + (x - target) * keep


@jit
def relax(x, target, dt_s, tau_s):
    """First-order approach of `x` to `target` over `dt_s`, exact for a constant target."""
    return approach(x, target, decay(dt_s, tau_s))


@jit
def relax_mean(x, target, dt_s, tau_s):
    """Mean over `dt_s` of what `relax` does to `x`: what a sensor averaged over the step shows."""
    return target - (x - target) * math.expm1(-dt_s / tau_s) * tau_s / dt_s


@jit
def idle_power_w(reference_w, leakage_per_c, die_c, reference_c):
    """Power of the device with a context and no work, in W."""
    return reference_w * (1.0 + leakage_per_c * (die_c - reference_c))


@jit
def idle_reference_w(full_clock_w, low_clock_w, clock, low_clock):
    """Idle power at a clock fraction: linear between the two clocks at which a card was seen to idle."""
    share = min(1.0, max(0.0, (clock - low_clock) / (1.0 - low_clock)))
    return low_clock_w + (full_clock_w - low_clock_w) * share


@jit
def clock_power_factor(clock):
    """Dynamic power at a clock fraction over that at full clock: f V(f)^2 (modelled)."""
    voltage = max(_VOLTAGE_FLOOR, 1.0 - _VOLTAGE_SLOPE * (1.0 - clock))
    return clock * voltage * voltage


@jit
def capped_power_w(idle_w, dynamic_w, power_cap_w):
    """Power drawn, with the power cap of the board holding it."""
    return min(idle_w + dynamic_w, max(power_cap_w, idle_w))


@jit
def capped_clock(clock, demand_w, power_cap_w):
    """Clock fraction at which a demand beyond the power cap meets it: power goes with its square here."""
    return max(MIN_CLOCK, clock * (power_cap_w / demand_w) ** 0.5)


@jit
def next_clock(clock, die_c, memory_c, demand_w, power_cap_w, slowdown_c, hw_slowdown_c, memory_limit_c):
    """Clock fraction for the next interval and which throttle holds it.

    Software thermal slowdown lowers the clock step by step while the die or the memory is at its
    operating limit; hardware slowdown halves it at once; the power cap scales it so that demand
    meets the cap; otherwise it recovers.

    Returns:
        (clock fraction, power-capped, thermally throttled); the last two are 0.0 or 1.0.
    """
    if die_c >= hw_slowdown_c:
        return max(MIN_CLOCK, 0.5 * clock), 0.0, 1.0
    if die_c >= slowdown_c or memory_c >= memory_limit_c:
        return max(MIN_CLOCK, clock - 0.08), 0.0, 1.0
    if demand_w > power_cap_w:
        return capped_clock(clock, demand_w, power_cap_w), 1.0, 0.0
    return min(1.0, clock + 0.04), 0.0, 0.0


@jit
def die_temperature_c(inlet_c, r_die, power_w, spreader_c, sink_c, fan_c):
    """Temperature of the hottest die in deg C; the nodes are rises above the inlet."""
    return inlet_c + r_die * power_w + spreader_c + sink_c + fan_c


@jit
def memory_temperature_c(inlet_c, offset_c, r_stack, power_w, memory_c, sink_c, fan_c):
    """Temperature of the memory in deg C; its node and the heatsink's are rises above the inlet."""
    return inlet_c + offset_c + r_stack * power_w + memory_c + sink_c + fan_c


@jit
def sensor_c(temperature_c):
    """What the driver reports: whole degrees."""
    return math.floor(temperature_c + 0.5)
