"""Twin telemetry: the device's power, clock and temperature computed from the work done.

`heat` is the compiled interval over `physics`; `TwinTelemetry` is the same behind the seam.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe.queueing import SLOT_S, jit
from moe.randomness import derive, normal, uniform
from moe.workload import WorkStats, frozen
from thermoe_env.errors import ReadingError
from thermoe_env.physics import (
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
from thermoe_env.problem import Problem
from thermoe_env.telemetry import READING_NAMES, GpuReading

GPU_DTYPE = np.dtype([(name, np.float64) for name in READING_NAMES])

_PHYSICS = (
    "idle_power_w", "idle_reference_c", "leakage_per_c", "low_clock_power_w", "low_clock_mhz", "power_cap_w",
    "r_die_c_per_w", "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "r_fan_c_per_w",
    "tau_fan_s", "inlet_c", "r_stack_c_per_w", "r_mem_c_per_w", "tau_mem_s", "mem_offset_c",
    "slowdown_c", "hw_slowdown_c", "mem_limit_c", "shutdown_c", "max_clock_mhz",
)  # fmt: skip
_DECAY = ("keep_spreader", "keep_sink", "keep_fan", "keep_memory")
_STATE = ("die_c", "mem_c", "spreader_c", "sink_c", "fan_c", "memory_c", "clock")
DEVICE_DTYPE = np.dtype([(name, np.float64) for name in (*_PHYSICS, "energy_factor", *_DECAY, *_STATE)])
"""One device: its (randomised) parameters, what its nodes keep over a slot, its state. Nodes are rises above
the inlet."""


class Spread(NamedTuple):
    """How devices and their inlets differ between episodes, as compiled code reads it."""

    resistance: float
    time_constant: float
    leakage: float
    energy: float
    inlet_c: float
    drift_c: float
    """Standard deviation of the inlet's drift."""
    drift_keep: float
    """Share of the drift that is left after a second."""


@jit
def heat(device, slot_energy, sm_clock, drift_c, gpu):
    """Advance one device over an interval.

    Args:
        device: record of `DEVICE_DTYPE`; state updated.
        slot_energy: float [slots], J above idle that the work needs, at the device's nominal energy.
        sm_clock: clock fraction in the interval.
        drift_c: offset of the inlet in this interval.
        gpu: record of `GPU_DTYPE`; filled with what the sensors say.

    Returns:
        True when the die passed its shutdown temperature.
    """
    inlet = device.inlet_c + drift_c
    energy, demand_peak, tripped = 0.0, 0.0, False
    slots = slot_energy.shape[0]
    reference = idle_reference_w(
        device.idle_power_w, device.low_clock_power_w, sm_clock, device.low_clock_mhz / device.max_clock_mhz
    )
    for s in range(slots):
        idle = idle_power_w(reference, device.leakage_per_c, device.die_c, device.idle_reference_c)
        dynamic = slot_energy[s] * device.energy_factor / SLOT_S
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
    duration = slots * SLOT_S
    device.clock, capped, throttled = next_clock(
        device.clock, device.die_c, device.mem_c, demand_peak, device.power_cap_w, device.slowdown_c,
        device.hw_slowdown_c, device.mem_limit_c,
    )  # fmt: skip
    gpu.temp_c = sensor_c(device.die_c)
    gpu.mem_temp_c = sensor_c(device.mem_c)
    gpu.power_w = energy / duration
    gpu.energy_j = energy
    gpu.sm_clock_mhz = device.clock * device.max_clock_mhz
    gpu.power_capped_s = capped * duration
    gpu.thermal_throttle_s = throttled * duration
    return tripped


@jit
def _set_temperatures(device, inlet_c, power_w):
    """Die and memory from the nodes."""
    device.die_c = die_temperature_c(
        inlet_c, device.r_die_c_per_w, power_w, device.spreader_c, device.sink_c, device.fan_c
    )
    device.mem_c = memory_temperature_c(
        inlet_c, device.mem_offset_c, device.r_stack_c_per_w, power_w, device.memory_c, device.sink_c,
        device.fan_c,
    )  # fmt: skip


@jit
def start_device(spread, seed, device, drift_c, gpu):
    """Draw a device for an episode, settled at idle.

    Args:
        spread: `Spread`.
        seed: uint64.
        device: record of `DEVICE_DTYPE` as `nominal_device` makes it; varied, and its state set.
        drift_c: float [seconds]; filled with the offset of the inlet: a mean-reverting walk, as neighbours
            and fans make it.
        gpu: record of `GPU_DTYPE`; filled with its first reading.
    """
    key, walk = derive(seed, np.uint64(2)), derive(seed, np.uint64(4))
    vary = np.empty(12)  # in (-1, 1); one loop, as each literal number would compile a draw of its own
    for i in range(12):
        vary[i] = uniform(key, i, -1.0, 1.0)
    device.r_die_c_per_w *= 1.0 + spread.resistance * vary[0]
    device.r_spreader_c_per_w *= 1.0 + spread.resistance * vary[1]
    device.r_sink_c_per_w *= 1.0 + spread.resistance * vary[2]
    device.r_mem_c_per_w *= 1.0 + spread.resistance * vary[3]
    device.tau_spreader_s *= 1.0 + spread.time_constant * vary[4]
    device.tau_sink_s *= 1.0 + spread.time_constant * vary[5]
    device.tau_mem_s *= 1.0 + spread.time_constant * vary[6]
    device.r_fan_c_per_w *= 1.0 + spread.resistance * vary[10]
    device.tau_fan_s *= 1.0 + spread.time_constant * vary[11]
    device.leakage_per_c *= 1.0 + spread.leakage * vary[7]
    device.energy_factor = 1.0 + spread.energy * vary[8]
    device.inlet_c += spread.inlet_c * vary[9]
    device.keep_spreader = decay(SLOT_S, device.tau_spreader_s)
    device.keep_sink = decay(SLOT_S, device.tau_sink_s)
    device.keep_fan = decay(SLOT_S, device.tau_fan_s)
    device.keep_memory = decay(SLOT_S, device.tau_mem_s)
    power = device.idle_power_w
    device.spreader_c = device.r_spreader_c_per_w * power
    device.sink_c = device.r_sink_c_per_w * power
    device.fan_c = device.r_fan_c_per_w * power
    device.memory_c = device.r_mem_c_per_w * power
    _set_temperatures(device, device.inlet_c, power)
    device.clock = 1.0
    kick = math.sqrt(1.0 - spread.drift_keep * spread.drift_keep) * spread.drift_c
    level = 0.0
    for second in range(drift_c.shape[0]):
        level = spread.drift_keep * level + kick * normal(walk, second)
        drift_c[second] = level
    gpu.temp_c, gpu.mem_temp_c = sensor_c(device.die_c), sensor_c(device.mem_c)
    gpu.power_w, gpu.energy_j = power, 0.0
    gpu.sm_clock_mhz = device.clock * device.max_clock_mhz
    gpu.power_capped_s = gpu.thermal_throttle_s = 0.0


def nominal_device(problem: Problem) -> np.ndarray:
    """The calibrated device, `DEVICE_DTYPE` [1]: parameters only."""
    device = np.zeros(1, DEVICE_DTYPE)
    for name in _PHYSICS:
        device[name] = getattr(problem.twin, name)
    return device


def spread_of(problem: Problem) -> Spread:
    """`Spread` of a scenario on its twin."""
    spread, twin = problem.scenario.randomize, problem.twin
    return Spread(
        spread.resistance, spread.time_constant, spread.leakage, spread.energy, spread.inlet_c,
        twin.inlet_drift_c, math.exp(-1.0 / twin.inlet_drift_tau_s),
    )  # fmt: skip


@jit
def _start_one(spread, seed, nominal, device, drift_c, gpu):
    """`start_device` for arrays of one record: they cross into compiled code cheaper than records do."""
    device[0] = nominal[0]
    start_device(spread, seed, device[0], drift_c, gpu[0])


@jit
def _heat_one(device, slot_energy, sm_clock, drift_c, gpu):
    """`heat` for arrays of one record; returns (tripped, clock fraction)."""
    tripped = heat(device[0], slot_energy, sm_clock, drift_c, gpu[0])
    return tripped, device[0].clock


class TwinTelemetry:
    """`Telemetry` of the modelled device."""

    simulated = True

    def __init__(self, problem: Problem) -> None:
        self._nominal, self._spread = nominal_device(problem), spread_of(problem)
        self._drift = np.zeros(problem.scenario.episode_s + 1)
        self._device = np.zeros(1, DEVICE_DTYPE)
        self._gpu = np.zeros(1, GPU_DTYPE)
        self._gpu_row = self._gpu.view(np.float64)
        self.tripped = False
        """Whether the die passed its shutdown temperature in this episode."""
        self.clock = 1.0
        """Clock fraction that throttling leaves for the next interval."""

    def reset(self, seed: int) -> GpuReading:
        """Draw the device of `seed` and settle it at idle."""
        _start_one(self._spread, np.uint64(seed), self._nominal, self._device, self._drift, self._gpu)
        self.clock = 1.0
        self._elapsed_s = 0.0
        self.tripped = False
        return self._reading()

    def read(self, work: WorkStats, duration_s: float) -> GpuReading:
        """Heat the device with the work of the interval.

        Raises:
            ReadingError: the work carries no energies, or the model left the numbers.
        """
        if work.slot_energy_j is None:
            raise ReadingError(
                "this work carries no modelled energy; pair a live workload with NVML or `Shadow`"
            )
        drift = self._drift[int(self._elapsed_s + 1e-9)]
        tripped, self.clock = _heat_one(self._device, work.slot_energy_j, work.sm_clock, drift, self._gpu)
        self.tripped = tripped or self.tripped
        self._elapsed_s += duration_s
        return self._reading()

    def close(self) -> None:
        """Nothing to release."""

    def _reading(self) -> GpuReading:
        row = self._gpu_row.tolist()
        values = dict(zip(READING_NAMES, row, strict=True))
        if not math.isfinite(sum(row)):
            raise ReadingError(f"the twin left the numbers: {values}; check the calibration and the profile")
        return frozen(GpuReading, values)
