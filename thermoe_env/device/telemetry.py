"""The seam between the environment and whatever reads a GPU: NVML or the twin."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from moe.workload import WorkStats


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """The device, or all devices, over one control interval."""

    temp_c: float
    """Temperature of the hottest die as the sensors give it at the end of the interval (whole degrees)."""
    mem_temp_c: float
    """Temperature of the hottest memory, likewise; of the hottest die where `Telemetry.missing` names it."""
    temp_mean_c: float
    """Mean over the devices of their die temperatures."""
    temp_spread_c: float
    """Hottest die less coolest."""
    power_w: float
    """Mean power over the interval, from the energy counters; sum over the devices."""
    energy_j: float
    """Energy of the interval; sum over the devices."""
    sm_clock_mhz: float
    """Clock of the slowest device."""
    power_capped_s: float
    """Time in the interval for which the power cap held the clock down; of the device with the longest."""
    thermal_throttle_s: float
    """Time in the interval for which a thermal slowdown, software or hardware, held it down; likewise."""


READING_NAMES: tuple[str, ...] = tuple(f.name for f in fields(GpuReading))

PER_DEVICE_NAMES = ("temp_c", "mem_temp_c", "power_w", "sm_clock_mhz")
"""Fields of a reading that are told device by device as well."""

PerDevice = dict[str, tuple[float, ...]]
"""`PER_DEVICE_NAMES` -> one number per device."""


def of_one_device(reading: GpuReading) -> PerDevice:
    """The reading of an only device."""
    return {name: (getattr(reading, name),) for name in PER_DEVICE_NAMES}


class Telemetry(Protocol):
    """The sensors of the device, or of all devices."""

    simulated: bool
    """Whether the readings come from a model."""
    tripped: bool
    """Whether a device passed its shutdown temperature in this episode."""
    missing: tuple[str, ...]
    """What the device cannot say, see `moe.device.nvml.Gpu`; () for a model."""

    def reset(self, seed: int) -> GpuReading:
        """Start an episode; returns the state before any work of it."""
        ...

    def read(self, work: WorkStats, duration_s: float) -> GpuReading:
        """Reading over the interval since the last call, in which `work` was done."""
        ...

    def per_device(self, reading: GpuReading) -> PerDevice:
        """What `reading`, the last one, sums up."""
        ...

    def close(self) -> None:
        """Release the device. May be called twice."""
