"""Devices of the twin, compiled: power, clock and temperature from the work done, interval by interval.

`heat_devices` is the interval over `physics`; `thermoe_env.twin.telemetry` is the same behind the seam.

Experts are placed on devices; the service says what energy the work of each needs and how long they take
together (`thermoe_env.twin.generate`, `thermoe_env.twin.score`). A device that waits for a slower one draws
its idle power, at its own clock. Devices exchange no heat. The drift of the chassis's inlet is one for all;
beside it each device's air may wander on its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe.compiled import inlined, inner
from moe.randomness import derive, normal, uniform
from moe.service.queueing import SLOT_S
from thermoe_env.device.physics import (
    approach,
    capped_power_w,
    decay,
    die_temperature_c,
    idle_power_w,
    idle_reference_w,
    memory_temperature_c,
    next_clock,
    sensor_c,
)
from thermoe_env.device.telemetry import READING_NAMES
from thermoe_env.problem.problem import Problem

GPU_DTYPE = np.dtype([(name, np.float64) for name in READING_NAMES])

_PHYSICS = (
    "idle_power_w", "idle_reference_c", "leakage_per_c", "low_clock_power_w", "low_clock_mhz", "power_cap_w",
    "r_die_c_per_w", "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "r_fan_c_per_w",
    "tau_fan_s", "inlet_c", "r_stack_c_per_w", "r_mem_c_per_w", "tau_mem_s", "mem_offset_c",
    "slowdown_c", "hw_slowdown_c", "mem_limit_c", "shutdown_c", "max_clock_mhz",
)  # fmt: skip
_DRIFT = ("drift_c", "drift_keep")
"""Of the device's own air, as in `Spread`."""
_DECAY = ("keep_spreader", "keep_sink", "keep_fan", "keep_memory")
_STATE = ("die_c", "mem_c", "spreader_c", "sink_c", "fan_c", "memory_c", "clock", "power_w")
DEVICE_DTYPE = np.dtype(
    [(name, np.float64) for name in (*_PHYSICS, *_DRIFT, "energy_factor", *_DECAY, *_STATE)]
)
"""One device: its (randomised) parameters, what its nodes keep over a slot, its state. Nodes are rises above
the inlet, the power is the last interval's mean."""
_DRAWS = 12
"""Random numbers that make one device."""


class Spread(NamedTuple):
    """How devices and their inlets differ between episodes, as compiled code reads it."""

    resistance: float
    time_constant: float
    leakage: float
    energy: float
    inlet_c: float
    drift_c: float
    """Standard deviation of the inlet's drift that is common to all devices."""
    drift_keep: float
    """Share of the drift that is left after a second."""


@inlined
def heat(device, slot_energy, d, sm_clock, drift_c):
    """Advance one device over an interval.

    Args:
        device: record of `DEVICE_DTYPE`; state updated.
        slot_energy: float [slots, D], J above idle that the work needs, at the nominal energy.
        d: number of the device.
        sm_clock: its clock fraction in the interval.
        drift_c: offset of its inlet in this interval.

    Returns:
        (energy in J, power-capped, thermally throttled, passed its shutdown temperature); the two throttles
        are 0.0 or 1.0.
    """
    inlet = device.inlet_c + drift_c
    energy, demand_peak, tripped = 0.0, 0.0, False
    reference = idle_reference_w(
        device.idle_power_w, device.low_clock_power_w, sm_clock, device.low_clock_mhz / device.max_clock_mhz
    )
    for s in range(slot_energy.shape[0]):
        idle = idle_power_w(reference, device.leakage_per_c, device.die_c, device.idle_reference_c)
        dynamic = slot_energy[s, d] * device.energy_factor / SLOT_S
        power = capped_power_w(idle, dynamic, device.power_cap_w)
        device.spreader_c = approach(
            device.spreader_c, device.r_spreader_c_per_w * power, device.keep_spreader
        )
        device.sink_c = approach(device.sink_c, device.r_sink_c_per_w * power, device.keep_sink)
        device.fan_c = approach(device.fan_c, device.r_fan_c_per_w * power, device.keep_fan)
        device.memory_c = approach(device.memory_c, device.r_mem_c_per_w * power, device.keep_memory)
        _set_temperatures(device, inlet, power)
        tripped = tripped or device.die_c >= device.shutdown_c
        energy += power * SLOT_S
        demand_peak = max(demand_peak, idle + dynamic)
    device.power_w = energy / (slot_energy.shape[0] * SLOT_S)
    device.clock, capped, throttled = next_clock(
        device.clock, device.die_c, device.mem_c, demand_peak, device.power_cap_w, device.slowdown_c,
        device.hw_slowdown_c, device.mem_limit_c,
    )  # fmt: skip
    return energy, capped, throttled, tripped


@inner
def heat_devices(devices, slot_energy, clocks, drift_c, gpu):
    """Advance all devices over an interval.

    Args:
        devices: records of `DEVICE_DTYPE` [D]; state updated.
        slot_energy: float [slots, D], as `heat` takes it.
        clocks: float [D], clock fractions in the interval.
        drift_c: float [D], offsets of the inlets.
        gpu: record of `GPU_DTYPE`; filled with what the sensors say, as `GpuReading` sums them up.

    Returns:
        True when a die passed its shutdown temperature.
    """
    energy, capped, throttled, tripped = 0.0, 0.0, 0.0, False
    for d in range(devices.shape[0]):
        joules, cap, throttle, trip = heat(devices[d], slot_energy, d, clocks[d], drift_c[d])
        energy += joules
        capped, throttled, tripped = max(capped, cap), max(throttled, throttle), tripped or trip
    duration = slot_energy.shape[0] * SLOT_S
    gpu.power_w = energy / duration
    gpu.energy_j = energy
    gpu.power_capped_s = capped * duration
    gpu.thermal_throttle_s = throttled * duration
    _read_sensors(devices, gpu)
    return tripped


@inlined
def _read_sensors(devices, gpu):
    """Temperatures and clock of a reading."""
    hottest, coolest, total, memory = -math.inf, math.inf, 0.0, -math.inf
    for d in range(devices.shape[0]):
        die = sensor_c(devices[d].die_c)
        hottest, coolest, total = max(hottest, die), min(coolest, die), total + die
        memory = max(memory, sensor_c(devices[d].mem_c))
    gpu.temp_c, gpu.mem_temp_c = hottest, memory
    gpu.temp_mean_c, gpu.temp_spread_c = total / devices.shape[0], hottest - coolest
    gpu.sm_clock_mhz = _slowest_clock(devices) * devices[0].max_clock_mhz


@inlined
def fill_clocks(devices, cap, clocks):
    """Fill the clock fractions [D] that devices [D] run at: what throttling leaves, `cap` at most."""
    for d in range(devices.shape[0]):
        clocks[d] = min(devices[d].clock, cap)


@inlined
def _slowest_clock(devices):
    """Clock fraction that throttling leaves to the slowest of devices [D]."""
    clock = devices[0].clock
    for d in range(1, devices.shape[0]):
        clock = min(clock, devices[d].clock)
    return clock


@inlined
def _set_temperatures(device, inlet_c, power_w):
    """Die and memory from the nodes."""
    device.die_c = die_temperature_c(
        inlet_c, device.r_die_c_per_w, power_w, device.spreader_c, device.sink_c, device.fan_c
    )
    device.mem_c = memory_temperature_c(
        inlet_c, device.mem_offset_c, device.r_stack_c_per_w, power_w, device.memory_c, device.sink_c,
        device.fan_c,
    )  # fmt: skip


@inner
def start_devices(spread, seed, nominal, inlet_offset_c, devices, drift_c, gpu):
    """Draw the devices of an episode, settled at idle.

    Args:
        spread: `Spread`.
        seed: uint64.
        nominal: records of `DEVICE_DTYPE` [D] as `nominal_devices` makes them.
        inlet_offset_c: float [seconds], how much warmer the inlet becomes.
        devices: records of `DEVICE_DTYPE` [D]; filled.
        drift_c: float [seconds, D]; filled with the offsets of the inlets: that one, a mean-reverting walk as
            neighbours and fans make it, and each device's own.
        gpu: record of `GPU_DTYPE`; filled with the first reading.
    """
    key, walk = derive(seed, np.uint64(2)), derive(seed, np.uint64(4))
    power = 0.0
    for d in range(devices.shape[0]):
        devices[d] = nominal[d]
        _start_device(spread, key, _DRAWS * d, inlet_offset_c[0], devices[d])
        power += devices[d].idle_power_w
    kick = math.sqrt(1.0 - spread.drift_keep * spread.drift_keep) * spread.drift_c
    level = 0.0
    for second in range(drift_c.shape[0]):
        level = spread.drift_keep * level + kick * normal(walk, second)
        for d in range(devices.shape[0]):
            drift_c[second, d] = level + inlet_offset_c[second]
    for d in range(devices.shape[0]):
        if devices[d].drift_c > 0.0:
            _wander(derive(walk, np.uint64(d)), devices[d].drift_c, devices[d].drift_keep, d, drift_c)
    gpu.power_w, gpu.energy_j = power, 0.0
    gpu.power_capped_s = gpu.thermal_throttle_s = 0.0
    _read_sensors(devices, gpu)


@inner
def _wander(key, deviation_c, keep, d, drift_c):
    """Add a mean-reverting walk of its own to the offsets of inlet `d` of `drift_c` [seconds, D]."""
    kick = math.sqrt(1.0 - keep * keep) * deviation_c
    level = 0.0
    for second in range(drift_c.shape[0]):
        level = keep * level + kick * normal(key, second)
        drift_c[second, d] += level


@inner
def _start_device(spread, key, first, offset_c, device):
    """Vary a nominal device by draws of `key` from number `first` on; settle it at idle, that much warmer."""
    vary = np.empty(_DRAWS)  # in (-1, 1); one loop, as each literal number would compile a draw of its own
    for i in range(_DRAWS):
        vary[i] = uniform(key, first + i, -1.0, 1.0)
    device.r_die_c_per_w *= 1.0 + spread.resistance * vary[0]
    device.r_spreader_c_per_w *= 1.0 + spread.resistance * vary[1]
    device.r_sink_c_per_w *= 1.0 + spread.resistance * vary[2]
    device.r_mem_c_per_w *= 1.0 + spread.resistance * vary[3]
    device.tau_spreader_s *= 1.0 + spread.time_constant * vary[4]
    device.tau_sink_s *= 1.0 + spread.time_constant * vary[5]
    device.tau_mem_s *= 1.0 + spread.time_constant * vary[6]
    device.leakage_per_c *= 1.0 + spread.leakage * vary[7]
    device.energy_factor = 1.0 + spread.energy * vary[8]
    device.inlet_c += spread.inlet_c * vary[9]
    device.r_fan_c_per_w *= 1.0 + spread.resistance * vary[10]
    device.tau_fan_s *= 1.0 + spread.time_constant * vary[11]
    device.keep_spreader = decay(SLOT_S, device.tau_spreader_s)
    device.keep_sink = decay(SLOT_S, device.tau_sink_s)
    device.keep_fan = decay(SLOT_S, device.tau_fan_s)
    device.keep_memory = decay(SLOT_S, device.tau_mem_s)
    device.power_w = power = device.idle_power_w
    device.spreader_c = device.r_spreader_c_per_w * power
    device.sink_c = device.r_sink_c_per_w * power
    device.fan_c = device.r_fan_c_per_w * power
    device.memory_c = device.r_mem_c_per_w * power
    _set_temperatures(device, device.inlet_c + offset_c, power)
    device.clock = 1.0


def nominal_devices(problem: Problem) -> np.ndarray:
    """The calibrated device at each of the scenario's inlets, `DEVICE_DTYPE` [D], at full clock."""
    devices = np.zeros(len(problem.scenario.devices), DEVICE_DTYPE)
    for name in _PHYSICS:
        devices[name] = getattr(problem.twin, name)
    devices["inlet_c"] += [device.inlet_offset_c for device in problem.scenario.devices]
    devices["drift_c"] = [device.drift_c for device in problem.scenario.devices]
    devices["drift_keep"] = [math.exp(-1.0 / device.drift_tau_s) for device in problem.scenario.devices]
    devices["clock"] = 1.0
    return devices


def spread_of(problem: Problem) -> Spread:
    """`Spread` of a scenario on its twin."""
    spread, twin = problem.scenario.randomize, problem.twin
    return Spread(
        spread.resistance, spread.time_constant, spread.leakage, spread.energy, spread.inlet_c,
        twin.inlet_drift_c, math.exp(-1.0 / twin.inlet_drift_tau_s),
    )  # fmt: skip
