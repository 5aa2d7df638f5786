"""The one reader of NVML, NVIDIA's management library. Reads only; settings are never changed.

A card is named by its UUID, which CUDA, NVML and other processes agree on; their numbers differ. Every value
is checked against `moe.device.base.RANGES`. What a card may lack is in `Gpu.missing`, all else is an error.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe.device.base import Sample, Tick, usable
from moe.device.integral import PowerIntegral
from moe.errors import GpuLostError, GpuUnavailableError, ReadingError

_MEMORY_TEMP, _POWER_AVERAGE, _POWER_INSTANT = 82, 185, 186
_COUNTERS = (74, 271, 269, 270)
"""Nanoseconds under the power cap, the power brake, software and hardware thermal slowdown."""
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Members of NVML's value union, by its type code."""
_THRESHOLDS = ("SHUTDOWN", "SLOWDOWN", "MEM_MAX", "GPU_MAX")
_WITHOUT = {
    "mem_temp_c": "no memory temperature",
    "energy_j": "no energy counter (energy is power integrated over samples, to about 5%)",
    "power_inst_w": "no instant power (traces hold power_w in its place)",
    "power_limit_w": "no power limit (readings are not compared with it)",
}
_LOG = logging.getLogger("moe.device")


class Gpu:
    """One GPU's sensors.

    Attributes:
        uuid: As NVML writes it, ``GPU-...``.
        name: Of the kind of card.
        driver: Its version.
        power_limit_w: In force when the card was opened; infinite where unknown.
        averages: Whether `power_w` is that of the last second; before Ampere and on GA100 of the moment.
        missing: What the card lacks and can be without: ``mem_temp_c``, ``energy_j``, ``power_inst_w``,
            ``power_limit_w``. Logged once per process.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """Open a card and see what it can say.

        Args:
            uuid: see `visible_uuid` and `moe.device.torch_device.uuid_of`.
            nvml: module to use instead of `pynvml`.

        Raises:
            GpuUnavailableError: no driver, no such card, a MIG slice, or no usable reading; says what to do.
        """
        self._nvml = _start(nvml)
        self._open, self._integral = True, None
        self.uuid = self.name = uuid
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.name = _text(self._nvml.nvmlDeviceGetName(self._handle))
            self.driver = _text(self._nvml.nvmlSystemGetDriverVersion())
            self._look()
        except (self._nvml.NVMLError, GpuLostError, ReadingError) as error:
            self.close()
            raise GpuUnavailableError(
                f"GPU {self.name} gives no usable reading ({error}); needed are a current driver and a "
                "whole card, no MIG slice"
            ) from error
        except BaseException:
            self.close()
            raise

    def energy(self) -> Tick:
        """Energy so far. A counter stands still between its ticks; an integral does not.

        Raises:
            GpuLostError: the device stopped answering.
            ReadingError: a value that cannot be.
        """
        if self._integral is not None:
            return self._integral.read()
        with self._answering():
            energy_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        time_s = time.perf_counter()
        return Tick(usable(self.name, "energy_j", energy_mj, 1e-3), time_s)

    def power_w(self) -> float:
        """Power as the board reports it, see `averages`; raises like `energy`."""
        with self._answering():
            power_mw = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
        return usable(self.name, "power_w", power_mw, 1e-3)

    def temperature_c(self) -> float:
        """Temperature of the die, in whole degrees; raises like `energy`."""
        with self._answering():
            return usable(self.name, "temp_c", self._read_temp())

    def sample(self) -> Sample:
        """Read every sensor.

        Raises:
            GpuUnavailableError: the driver does not count throttled time.
            GpuLostError: the device stopped answering.
            ReadingError: a value that cannot be.
        """
        energy_j, time_s = self.energy()
        memory_c, _, counters = self._field_values(*_COUNTERS)
        power_cap, power_brake, sw_thermal, hw_thermal = counters
        return Sample(
            time_s=time_s,
            energy_j=energy_j,
            temp_c=self.temperature_c(),
            mem_temp_c=memory_c,
            sm_clock_mhz=self._clock_mhz("SM"),
            power_w=self.power_w(),
            power_capped_s=self._seconds("power_capped_s", power_cap, power_brake),
            thermal_throttle_s=self._seconds("thermal_throttle_s", sw_thermal, hw_thermal),
        )

    def trace_row(self) -> dict[str, float]:
        """The columns of a telemetry trace other than time (`thermoe_env.calibration.traces.COLUMNS`).

        Raises like `sample`.
        """
        temp_c = self.temperature_c()
        memory_c, instant_w, _ = self._field_values()
        power_w = self.power_w()
        with self._answering():
            util = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
            reasons = self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        return {
            "temp_c": temp_c,
            "mem_temp_c": memory_c,
            "power_w": power_w,
            "power_inst_w": power_w if math.isnan(instant_w) else instant_w,
            "energy_mj": round(1e3 * self.energy().energy_j),
            "sm_mhz": self._clock_mhz("SM"),
            "mem_mhz": self._clock_mhz("MEM"),
            "util": usable(self.name, "util", util),
            "reasons": reasons,
        }

    def limits(self) -> dict[str, float]:
        """Thresholds in deg C and the power limit in mW, under the keys that a trace's reader knows.

        A threshold that the driver does not name is absent.
        """
        limits: dict[str, float] = {}
        for name in _THRESHOLDS:
            threshold = getattr(self._nvml, f"NVML_TEMPERATURE_THRESHOLD_{name}")
            with self._answering():
                try:
                    value = self._nvml.nvmlDeviceGetTemperatureThreshold(self._handle, threshold)
                except self._absent:
                    continue
            limits[f"thr_{name}"] = usable(self.name, "temp_c", value)
        if math.isfinite(self.power_limit_w):
            limits["nvmlDeviceGetEnforcedPowerLimit"] = round(1e3 * self.power_limit_w)
        return limits

    def close(self) -> None:
        """Give NVML back. May be called twice."""
        if self._open:
            if self._integral is not None:
                self._integral.close()
            self._open = False
            self._nvml.nvmlShutdown()

    def _look(self) -> None:
        """Find out what the card lacks, and whether it answers all that every user of it needs."""
        nvml, handle = self._nvml, self._handle
        self._absent = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound)
        try:
            sliced = nvml.nvmlDeviceGetMigMode(handle)[0]
        except self._absent:
            sliced = False
        if sliced:
            raise ReadingError("MIG is on: its sensors are those of all slices together")
        self._read_temp = self._temperature_reader()
        missing = []
        self.power_limit_w = self._power_limit_w()
        if math.isinf(self.power_limit_w):
            missing.append("power_limit_w")
        self.averages = self._has(_POWER_AVERAGE)
        self._fields = []
        for name, field in (("mem_temp_c", _MEMORY_TEMP), ("power_inst_w", _POWER_INSTANT)):
            if self._has(field):
                self._fields.append(field)
            else:
                missing.append(name)
        self._field_values()
        self.temperature_c()
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except self._absent:
            missing.append("energy_j")
            self._integral = PowerIntegral(self.power_w)
        self.energy()
        self.power_w()
        self.missing = tuple(missing)
        _say_missing(self.name, self.missing)

    def _has(self, field: int) -> bool:
        """Whether the card has a sensor; some answer 0 in place of none."""
        try:
            return self._values([field])[0] != 0
        except self._absent:
            return False

    def _power_limit_w(self) -> float:
        try:
            limit_mw = self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)
            return usable(self.name, "power_w", limit_mw, 1e-3)
        except (*self._absent, ReadingError):
            return math.inf

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if not self._open:
            raise GpuLostError(f"{self.name} was closed; open it again")
        try:
            yield
        except self._absent as error:
            raise GpuUnavailableError(
                f"{self.name} lacks a sensor ({error}); update the driver {self.driver}"
            ) from error
        except self._nvml.NVMLError as error:
            raise GpuLostError(
                f"{self.name} ({self.uuid}) stopped answering: {error}; see `dmesg` for Xid"
            ) from error

    def _clock_mhz(self, clock: str) -> float:
        with self._answering():
            value = self._nvml.nvmlDeviceGetClockInfo(
                self._handle, getattr(self._nvml, f"NVML_CLOCK_{clock}")
            )
        return usable(self.name, f"{clock.lower()}_clock_mhz", value)

    def _seconds(self, name: str, *counters_ns: object) -> float:
        return sum(usable(self.name, name, value, 1e-9) for value in counters_ns)

    def _field_values(self, *more: int) -> tuple[float, float, list[object]]:
        """Memory temperature and instant power, NaN where there are none, and raw values of more fields."""
        with self._answering():
            values = dict(zip(self._fields, raw := self._values([*self._fields, *more]), strict=False))
        memory_c = instant_w = math.nan
        if _MEMORY_TEMP in values:
            memory_c = usable(self.name, "mem_temp_c", values[_MEMORY_TEMP])
        if _POWER_INSTANT in values:
            instant_w = usable(self.name, "power_w", values[_POWER_INSTANT], 1e-3)
        return memory_c, instant_w, raw[len(self._fields) :]

    def _values(self, fields: list[int]) -> list[object]:
        """Values of NVML fields, by one call; each carries its own return code and type."""
        answers = self._nvml.nvmlDeviceGetFieldValues(self._handle, fields) if fields else []
        if len(answers) != len(fields):
            raise ReadingError(
                f"{self.name}: {len(answers)} answers to {len(fields)} fields; update the driver"
            )
        values = []
        for field, answer in zip(fields, answers, strict=True):
            if answer.nvmlReturn != self._nvml.NVML_SUCCESS:
                raise self._nvml.NVMLError(answer.nvmlReturn)
            if answer.valueType not in range(len(_VALUE_MEMBERS)):
                raise ReadingError(
                    f"{self.name}: field {field} is of type {answer.valueType}, this version knows 0 to "
                    f"{len(_VALUE_MEMBERS) - 1}; use an older driver"
                )
            values.append(getattr(answer.value, _VALUE_MEMBERS[answer.valueType]))
        return values

    def _temperature_reader(self) -> Callable[[], object]:
        """The current call where module and driver both have it, else the one it replaces."""
        nvml, handle, sensor = self._nvml, self._handle, self._nvml.NVML_TEMPERATURE_GPU
        try:
            nvml.nvmlDeviceGetTemperatureV(handle, sensor)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):
            return lambda: nvml.nvmlDeviceGetTemperature(handle, sensor)
        return lambda: nvml.nvmlDeviceGetTemperatureV(handle, sensor)


def visible_uuid(index: int = 0, nvml: Any = None) -> str:
    """UUID of the device that CUDA numbers `index`, without starting CUDA.

    Args:
        index: within `CUDA_VISIBLE_DEVICES`, which ends at the first entry that names no card.
        nvml: module to use instead of `pynvml`.

    Raises:
        GpuUnavailableError: no driver, no such device, or cards of several kinds, which CUDA may number in
            another order.
    """
    nvml = _start(nvml)
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        kinds = {_text(nvml.nvmlDeviceGetName(handle)) for handle in handles}
    except nvml.NVMLError as error:
        raise GpuUnavailableError(f"NVML does not name the GPUs ({error}); see `nvidia-smi -L`") from error
    finally:
        nvml.nvmlShutdown()
    by_number = True
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        entries = [entry.strip() for entry in visible.split(",")]
        found = []
        for entry in entries:
            named = [uuid for uuid in uuids if entry and uuid.startswith(entry)]
            if entry.isdigit() and int(entry) < len(uuids):
                named = [uuids[int(entry)]]
            if len(named) != 1:
                break
            found += named
        by_number, uuids = entries[0].isdigit(), found
    if not 0 <= index < len(uuids):
        where = "NVML" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}"
        raise GpuUnavailableError(
            f"no GPU {index}: {where} names {len(uuids)} whole ones; MIG slices have no sensors of their own"
        )
    if by_number and len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise GpuUnavailableError(
            f"cards of several kinds ({', '.join(sorted(kinds))}) have other numbers in CUDA than in NVML: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the card's UUID in CUDA_VISIBLE_DEVICES"
        )
    return uuids[index]


def _start(nvml: Any) -> Any:
    """NVML, started: `nvmlShutdown` is the caller's."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise GpuUnavailableError(
                "the package nvidia-ml-py is missing; pip install nvidia-ml-py"
            ) from error
        if not hasattr(nvml, "_nvmlGetFunctionPointer"):
            raise GpuUnavailableError(
                "the module pynvml is not NVIDIA's: the PyPI package pynvml shadows nvidia-ml-py; "
                "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py"
            )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise GpuUnavailableError(f"NVML does not start ({error}); install the NVIDIA driver") from error
    return nvml


@functools.cache
def _say_missing(card: str, missing: tuple[str, ...]) -> None:
    """Name what a card lacks, once."""
    if missing:
        _LOG.warning("%s has %s", card, "; ".join(_WITHOUT[name] for name in missing))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
