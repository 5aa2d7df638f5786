"""The energy meter of a CUDA device: NVML's total energy counter, read where it ticks.

The counter advances about every 100 ms and a read takes milliseconds, so energy is known exactly only at
ticks. A measurement therefore runs from tick to tick while the load goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import pynvml
import torch

PERIOD_S = 0.1
"""Time between ticks of the counter on data-centre boards."""
TIMEOUT_S = 5.0


class MeterUnavailableError(RuntimeError):
    """CUDA is used, but NVML does not give the device's energy."""


class Tick(NamedTuple):
    """One advance of the counter."""

    energy_j: float
    """Energy since the driver was loaded."""
    time_s: float
    """`time.perf_counter()` at the read that saw it."""


class EnergyCounter:
    """Total energy counter of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Open the counter of `device`.

        Raises:
            MeterUnavailableError: NVML is missing, or the device has no energy counter.
        """
        try:
            pynvml.nvmlInit()
            # By UUID: CUDA's numbering follows CUDA_VISIBLE_DEVICES, NVML's does not.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            raise MeterUnavailableError(
                f"NVML gives no energy for {device} ({error}); install the driver's libnvidia-ml, use a "
                "whole device (no MIG slice) of the Volta generation or later, or pass --device cpu"
            ) from error

    def read(self) -> Tick:
        """Read the counter now; between ticks the energy is that of the last tick."""
        energy_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return Tick(energy_mj / 1e3, time.perf_counter())

    def next_tick(self, between: Callable[[], object], not_before_s: float = 0.0) -> Tick:
        """Wait for the counter to tick.

        Args:
            between: called over and over meanwhile; it keeps the device loaded, or sleeps.
            not_before_s: `time.perf_counter()` before which the counter is not read: reads cost milliseconds.

        Raises:
            MeterUnavailableError: the counter stands still.
        """
        while time.perf_counter() < not_before_s:
            between()
        first = last = self.read()
        while last.energy_j == first.energy_j:
            if last.time_s - first.time_s > TIMEOUT_S:
                raise MeterUnavailableError(
                    f"the energy counter stood still for {TIMEOUT_S} s; reload the driver"
                )
            between()
            last = self.read()
        return last

    def window(self, between: Callable[[], object], seconds: float) -> tuple[Tick, Tick]:
        """Measure from tick to tick over about `seconds`, a whole number of the counter's periods.

        Args:
            between: as in `next_tick`.
            seconds: length of the window.
        """
        start = self.next_tick(between)
        periods = max(1, round(seconds / PERIOD_S))
        return start, self.next_tick(between, start.time_s + (periods - 0.5) * PERIOD_S)

    def temperature_c(self) -> float:
        """Temperature of the die, in whole degrees."""
        return float(pynvml.nvmlDeviceGetTemperatureV(self._handle, pynvml.NVML_TEMPERATURE_GPU))

    def driver(self) -> str:
        """Version of the driver."""
        return str(pynvml.nvmlSystemGetDriverVersion())


def open_meter(device: torch.device) -> EnergyCounter | None:
    """Open the device's meter; None on a CPU, which has none.

    Raises:
        MeterUnavailableError: the device is a CUDA device and NVML gives no energy for it.
    """
    return EnergyCounter(device) if device.type == "cuda" else None
