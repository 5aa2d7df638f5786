"""Twin telemetry: the compiled devices of `thermoe_env.twin.heat` behind the seam."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moe.compiled import jit
from moe.memory import Held, as_record, held
from moe.service.queueing import SLOT_S
from moe.workload import WorkStats, frozen
from thermoe_env.device.physics import sensor_c
from thermoe_env.device.telemetry import (
    PER_DEVICE_NAMES,
    READING_NAMES,
    GpuReading,
    PerDevice,
    of_one_device,
)
from thermoe_env.errors import ReadingError
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.heat import GPU_DTYPE, heat_devices, nominal_devices, spread_of, start_devices


class Heating(NamedTuple):
    """Devices [n, D], and all that heating them reads and writes."""

    spread: np.ndarray
    """`Spread`, an array of one record."""
    nominal: np.ndarray
    """Records of `DEVICE_DTYPE` [D]."""
    inlet_offset_c: np.ndarray  # [seconds]
    devices: np.ndarray
    """Records of `DEVICE_DTYPE` [n, D]."""
    drift_c: np.ndarray
    """float64 [n, seconds, D]: offsets of the inlets."""
    clocks: np.ndarray
    """float64 [n, D]: clock fractions of the interval."""
    slot_energy: np.ndarray
    """float64 [n, slots, D]: J above idle."""
    gpu: np.ndarray
    """Records of `GPU_DTYPE` [n]."""
    first_gpu: np.ndarray
    """Likewise, of an episode's beginning."""


@cache
def heating_rows(kind: Any) -> tuple[Any, Any]:
    """What settles one row of a `Heating` of some type at an episode's beginning, and what heats it.

    Args:
        kind: of a `Held` of it.

    Returns:
        (`cool_row` of (address, seed, row), `heat_row` of (address, row, second), which says whether a die
        passed its shutdown temperature)
    """

    @jit
    def cool_row(address, seed, i):
        here = held(address, kind)
        start_devices(
            here.spread[0], seed, here.nominal, here.inlet_offset_c, here.devices[i], here.drift_c[i],
            here.first_gpu[i],
        )  # fmt: skip

    @jit
    def heat_row(address, i, second):
        here = held(address, kind)
        return heat_devices(
            here.devices[i], here.slot_energy[i], here.clocks[i], here.drift_c[i, second], here.gpu[i]
        )

    return cool_row, heat_row


class TwinTelemetry:
    """`Telemetry` of the modelled devices."""

    simulated = True
    missing: tuple[str, ...] = ()

    def __init__(self, problem: Problem) -> None:
        seconds, slots = problem.scenario.episode_s + 1, round(problem.scenario.interval_s / SLOT_S)
        nominal = nominal_devices(problem)
        gpu = np.zeros(1, GPU_DTYPE)
        self._here = Heating(
            as_record(spread_of(problem)), nominal, problem.inlet_offset_c, nominal[None].copy(),
            np.zeros((1, seconds, len(nominal))), np.zeros((1, len(nominal))),
            np.zeros((1, slots, len(nominal))), gpu, gpu,
        )  # fmt: skip
        self._hold()
        self.tripped = False
        """Whether a die passed its shutdown temperature in this episode."""

    def __getstate__(self) -> dict[str, Any]:
        """All but compiled functions and where they find their memory."""
        return {**vars(self), "_held": None, "_cool": None, "_heat": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the place of what was copied, and let compiled code find it."""
        self.__dict__.update(state)
        self._hold()

    def _hold(self) -> None:
        self._held = Held(self._here)
        self._cool, self._heat = heating_rows(self._held.kind)
        here = self._here
        self._devices, self._clocks, self._slot_energy = here.devices[0], here.clocks[0], here.slot_energy[0]
        self._gpu_row, self._leaves = here.gpu.view(np.float64), self._devices["clock"]

    def reset(self, seed: int) -> GpuReading:
        """Draw the devices of `seed` and settle them at idle."""
        self._cool(self._held.address, np.uint64(seed), 0)
        self._elapsed_s = 0.0
        self.tripped = False
        return self._reading()

    def read(self, work: WorkStats, duration_s: float) -> GpuReading:
        """Heat the devices with the work of the interval.

        Raises:
            ReadingError: the work carries no energies, or the model left the numbers.
        """
        if work.slot_energy_j is None or work.device_clock is None:
            raise ReadingError(
                "this work carries no modelled energy; pair a live workload with NVML or `Shadow`"
            )
        self._slot_energy[...], self._clocks[...] = work.slot_energy_j, work.device_clock
        tripped = self._heat(self._held.address, 0, int(self._elapsed_s + 1e-9))
        self.tripped = tripped or self.tripped
        self._elapsed_s += duration_s
        return self._reading()

    @property
    def clocks(self) -> np.ndarray:
        """Clock fractions that throttling leaves for the next interval, float [D]."""
        return self._leaves

    def per_device(self, reading: GpuReading) -> PerDevice:
        """The last reading, device by device."""
        if len(self._devices) == 1:
            return of_one_device(reading)
        now = self._devices
        temperatures = map(sensor_c, now["die_c"]), map(sensor_c, now["mem_c"])
        columns = *temperatures, now["power_w"], now["clock"] * now["max_clock_mhz"]
        return {
            name: tuple(map(float, column)) for name, column in zip(PER_DEVICE_NAMES, columns, strict=True)
        }

    def close(self) -> None:
        """Nothing to release."""

    def _reading(self) -> GpuReading:
        row = self._gpu_row.tolist()
        values = dict(zip(READING_NAMES, row, strict=True))
        if not math.isfinite(sum(row)):
            raise ReadingError(f"the twin left the numbers: {values}; check the calibration and the profile")
        return frozen(GpuReading, values)
