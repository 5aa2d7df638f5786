"""Twin telemetry: the device's power, clock and temperature computed from the work done.

`heat` is the compiled interval over `physics`; `TwinTelemetry` is the same behind the seam.
"""

from __future__ import annotations

import math

import numpy as np

from moe.queueing import SLOT_S, jit
from moe.workload import WorkStats
from thermoe_env.errors import ReadingError
from thermoe_env.physics import (
    capped_power_w,
    die_temperature_c,
    idle_power_w,
    memory_temperature_c,
    next_clock,
    relax,
    sensor_c,
)
from thermoe_env.problem import Problem
from thermoe_env.telemetry import READING_NAMES, GpuReading

GPU_DTYPE = np.dtype([(name, np.float64) for name in READING_NAMES])

_PHYSICS = (
    "idle_power_w", "idle_reference_c", "leakage_per_c", "power_cap_w", "r_die_c_per_w", "r_spreader_c_per_w",
    "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "inlet_c", "r_mem_c_per_w", "tau_mem_s", "mem_offset_c",
    "slowdown_c", "hw_slowdown_c", "mem_limit_c", "shutdown_c", "max_clock_mhz",
)  # fmt: skip
DEVICE_DTYPE = np.dtype(
    [
        (name, np.float64)
        for name in (
            *_PHYSICS,
            "energy_factor",
            "die_c",
            "mem_c",
            "spreader_c",
            "sink_c",
            "memory_c",
            "clock",
        )
    ]
)
"""One device: its (randomised) parameters, and its state. Nodes are rises above the inlet."""


@jit
def heat(device, slot_energy, drift_c, gpu):
    """Advance one device over an interval.

    Args:
        device: record of `DEVICE_DTYPE`; state updated.
        slot_energy: float [slots], J above idle that the work needs, at the device's nominal energy.
        drift_c: offset of the inlet in this interval.
        gpu: record of `GPU_DTYPE`; filled with what the sensors say.

    Returns:
        True when the die passed its shutdown temperature.
    """
    inlet = device.inlet_c + drift_c
    energy, demand_peak, tripped = 0.0, 0.0, False
    slots = slot_energy.shape[0]
    for s in range(slots):
        idle = idle_power_w(device.idle_power_w, device.leakage_per_c, device.die_c, device.idle_reference_c)
        dynamic = slot_energy[s] * device.energy_factor / SLOT_S
        power = capped_power_w(idle, dynamic, device.power_cap_w)
        device.spreader_c = relax(
            device.spreader_c, device.r_spreader_c_per_w * power, SLOT_S, device.tau_spreader_s
        )
        device.sink_c = relax(device.sink_c, device.r_sink_c_per_w * power, SLOT_S, device.tau_sink_s)
        device.memory_c = relax(device.memory_c, device.r_mem_c_per_w * power, SLOT_S, device.tau_mem_s)
        device.die_c = die_temperature_c(inlet, device.r_die_c_per_w, power, device.spreader_c, device.sink_c)
        device.mem_c = memory_temperature_c(inlet, device.mem_offset_c, device.memory_c, device.sink_c)
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
def _walk(noise, spread, tau_s):
    """Mean-reverting walk from 0 with stationary standard deviation `spread`, one step a second."""
    keep = math.exp(-1.0 / tau_s)
    walk = np.empty_like(noise)
    level = 0.0
    for second in range(noise.shape[0]):
        level = keep * level + math.sqrt(1.0 - keep * keep) * spread * noise[second]
        walk[second] = level
    return walk


def start_device(problem: Problem, seed: int, device: np.ndarray) -> np.ndarray:
    """Draw a device for an episode, settled at idle, into one record; returns its inlet drift.

    Returns:
        float [seconds], offset of the inlet: a mean-reverting walk, as neighbours and fans make it.
    """
    rng = np.random.default_rng([seed, 2])
    twin, spread = problem.twin, problem.scenario.randomize
    for name in _PHYSICS:
        device[name] = getattr(twin, name)

    def vary(half_width: float) -> float:
        return 1.0 + rng.uniform(-half_width, half_width)

    for name in ("r_die_c_per_w", "r_spreader_c_per_w", "r_sink_c_per_w", "r_mem_c_per_w"):
        device[name] *= vary(spread.resistance)
    for name in ("tau_spreader_s", "tau_sink_s", "tau_mem_s"):
        device[name] *= vary(spread.time_constant)
    device["leakage_per_c"] *= vary(spread.leakage)
    device["energy_factor"] = vary(spread.energy)
    device["inlet_c"] += rng.uniform(-spread.inlet_c, spread.inlet_c)
    seconds = problem.scenario.episode_s + 1
    drift = _walk(rng.standard_normal(seconds), twin.inlet_drift_c, twin.inlet_drift_tau_s)
    power = twin.idle_power_w
    device["spreader_c"] = device["r_spreader_c_per_w"] * power
    device["sink_c"] = device["r_sink_c_per_w"] * power
    device["memory_c"] = device["r_mem_c_per_w"] * power
    device["die_c"] = (
        device["inlet_c"] + device["r_die_c_per_w"] * power + device["spreader_c"] + device["sink_c"]
    )
    device["mem_c"] = device["inlet_c"] + device["mem_offset_c"] + device["memory_c"] + device["sink_c"]
    device["clock"] = 1.0
    return drift


def idle_reading(device: np.ndarray, gpu: np.ndarray) -> None:
    """Fill one reading record with an idle device as `start_device` leaves it."""
    gpu["temp_c"] = sensor_c(float(device["die_c"]))
    gpu["mem_temp_c"] = sensor_c(float(device["mem_c"]))
    gpu["power_w"] = device["idle_power_w"]
    gpu["energy_j"] = 0.0
    gpu["sm_clock_mhz"] = device["clock"] * device["max_clock_mhz"]
    gpu["power_capped_s"] = gpu["thermal_throttle_s"] = 0.0


class TwinTelemetry:
    """`Telemetry` of the modelled device."""

    simulated = True

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._device = np.zeros(1, DEVICE_DTYPE)
        self._gpu = np.zeros(1, GPU_DTYPE)
        self.tripped = False
        """Whether the die passed its shutdown temperature in this episode."""

    @property
    def clock(self) -> float:
        """Clock fraction that throttling leaves for the next interval."""
        return float(self._device[0]["clock"])

    def reset(self, seed: int) -> GpuReading:
        """Draw the device of `seed` and settle it at idle."""
        self._drift = start_device(self._problem, seed, self._device[0])
        self._elapsed_s = 0.0
        self.tripped = False
        idle_reading(self._device[0], self._gpu[0])
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
        self.tripped = bool(heat(self._device[0], work.slot_energy_j, drift, self._gpu[0])) or self.tripped
        self._elapsed_s += duration_s
        return self._reading()

    def close(self) -> None:
        """Nothing to release."""

    def _reading(self) -> GpuReading:
        values = {name: float(self._gpu[0][name]) for name in READING_NAMES}
        if not all(np.isfinite(list(values.values()))):
            raise ReadingError(f"the twin left the numbers: {values}; check the calibration and the profile")
        return GpuReading(**values)
