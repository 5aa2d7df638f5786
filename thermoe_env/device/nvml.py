"""Telemetry of a real GPU through NVML, NVIDIA's management library. Reads only; settings are never changed.

All sensors are read in one place, `Gpu.sample`. The energy counter ticks every 100 ms, so the energy of an
interval between two samples is uncertain by up to one tick at either end (at most 10% of the power step
there, for 1 s); what one interval misses the next one has, and sums over an episode are exact to a tick.
"""

from __future__ import annotations

import fcntl
import importlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moe.workload import WorkStats
from thermoe_env.device.telemetry import GpuReading
from thermoe_env.errors import GpuBusyError, GpuLostError, GpuUnavailableError, ReadingError

MEMORY_TEMP = 82
SW_POWER_CAP_NS = 74
SW_THERMAL_NS = 269
HW_THERMAL_NS = 270
HW_POWER_BRAKE_NS = 271
_FIELDS = (MEMORY_TEMP, SW_POWER_CAP_NS, HW_POWER_BRAKE_NS, SW_THERMAL_NS, HW_THERMAL_NS)
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Members of NVML's value union, by its type code."""
TICK_TIMEOUT_S = 0.5
MIN_INTERVAL_S = 0.2
"""Two ticks: below it a difference of the energy counter says little."""


class Sample(NamedTuple):
    """What the sensors say at one moment; energy and times are cumulative."""

    time_s: float
    """`time.perf_counter()` when the energy counter was read."""
    energy_j: float
    temp_c: float
    mem_temp_c: float
    sm_clock_mhz: float
    power_capped_s: float
    thermal_throttle_s: float


class Gpu:
    """One GPU's sensors."""

    def __init__(self, device_index: int = 0, nvml: Any = None) -> None:
        """Open a device and read every sensor once.

        Args:
            device_index: number of the device as CUDA counts it, within `CUDA_VISIBLE_DEVICES`. Hosts with
                different cards need `CUDA_DEVICE_ORDER=PCI_BUS_ID` for both to count alike.
            nvml: module to use instead of `pynvml`.

        Raises:
            GpuUnavailableError: no driver, no such device, or a sensor that it lacks; says what to do.
        """
        self._nvml = _import_nvml() if nvml is None else nvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise GpuUnavailableError(f"NVML does not start ({error}); install the NVIDIA driver") from error
        self._open = True
        try:
            self._handle = _visible_device(self._nvml, device_index)
            self.uuid = _text(self._nvml.nvmlDeviceGetUUID(self._handle))
            self.name = _text(self._nvml.nvmlDeviceGetName(self._handle))
            self.driver = _text(self._nvml.nvmlSystemGetDriverVersion())
            self._read_temp = self._temperature_reader()
            self._read_all()
        except self._nvml.NVMLError as error:
            self.close()
            raise GpuUnavailableError(
                f"device {device_index} lacks a sensor or does not answer ({error}); needs a current "
                "driver and a whole data-centre GPU (no MIG slice) with energy counter and memory temperature"
            ) from error
        except BaseException:
            self.close()
            raise

    def sample(self) -> Sample:
        """Read every sensor.

        Raises:
            GpuLostError: the device stopped answering.
            ReadingError: a value that is not a finite number.
        """
        with self._answering():
            sample = self._read_all()
        for name, value in sample._asdict().items():
            if not math.isfinite(value):
                raise ReadingError(f"{self.name}: {name} is {value}; the driver gives no usable value")
        return sample

    def average_power_w(self) -> float:
        """Power as the board averages it over the last second."""
        with self._answering():
            return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3

    def aligned_energy(self) -> tuple[float, float]:
        """Wait for the next tick of the energy counter.

        Between two such reads energy and time belong together exactly.

        Returns:
            (energy in J, `time.perf_counter()` at the tick).

        Raises:
            GpuLostError: no tick within 0.5 s.
        """
        with self._answering():
            first, start_s = self._energy()
            while True:
                energy_j, time_s = self._energy()
                if energy_j != first:
                    return energy_j, time_s
                if time_s - start_s > TICK_TIMEOUT_S:
                    raise GpuLostError(
                        f"{self.name}: the energy counter stood still for {TICK_TIMEOUT_S} s; "
                        "check `nvidia-smi -q`"
                    )
                time.sleep(0.001)  # faster polling raises the power it measures

    def trace_row(self) -> dict[str, float]:
        """The columns of a telemetry trace other than time (`thermoe_env.calibration.traces.COLUMNS`)."""
        nvml, handle = self._nvml, self._handle
        with self._answering():
            memory_temp, power_inst = self._field_values((MEMORY_TEMP, nvml.NVML_FI_DEV_POWER_INSTANT))
            return {
                "temp_c": self._read_temp(),
                "mem_temp_c": memory_temp,
                "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                "power_inst_w": power_inst / 1e3,
                "energy_mj": nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
                "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "mem_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                "util": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                "reasons": nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            }

    def limits(self) -> dict[str, int]:
        """Thresholds in deg C and the power limit in mW, under the keys that a trace's reader knows."""
        nvml = self._nvml
        with self._answering():
            thresholds = {
                f"thr_{name}": nvml.nvmlDeviceGetTemperatureThreshold(
                    self._handle, getattr(nvml, f"NVML_TEMPERATURE_THRESHOLD_{name}")
                )
                for name in ("SHUTDOWN", "SLOWDOWN", "MEM_MAX", "GPU_MAX")
            }
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)
        return {**thresholds, "nvmlDeviceGetEnforcedPowerLimit": limit}

    def close(self) -> None:
        """Give NVML back. May be called twice."""
        if self._open:
            self._open = False
            self._nvml.nvmlShutdown()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if not self._open:
            raise GpuLostError(f"{self.name} was closed; open it again")
        try:
            yield
        except self._nvml.NVMLError as error:
            raise GpuLostError(
                f"{self.name} ({self.uuid}) stopped answering: {error}; see `dmesg` for Xid"
            ) from error

    def _energy(self) -> tuple[float, float]:
        energy_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return energy_mj / 1e3, time.perf_counter()

    def _read_all(self) -> Sample:
        energy_j, time_s = self._energy()
        memory_temp, power_cap, power_brake, sw_thermal, hw_thermal = self._field_values(_FIELDS)
        return Sample(
            time_s=time_s,
            energy_j=energy_j,
            temp_c=float(self._read_temp()),
            mem_temp_c=memory_temp,
            sm_clock_mhz=float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)),
            power_capped_s=(power_cap + power_brake) / 1e9,
            thermal_throttle_s=(sw_thermal + hw_thermal) / 1e9,
        )

    def _field_values(self, fields: tuple[int, ...]) -> list[float]:
        """Values of NVML fields, by one call; each carries its own return code and type."""
        values = []
        for value in self._nvml.nvmlDeviceGetFieldValues(self._handle, list(fields)):
            if value.nvmlReturn != self._nvml.NVML_SUCCESS:
                raise self._nvml.NVMLError(value.nvmlReturn)
            values.append(float(getattr(value.value, _VALUE_MEMBERS[value.valueType])))
        return values

    def _temperature_reader(self) -> Any:
        """The current call where module and driver both have it, else the one it replaces."""
        nvml, handle, sensor = self._nvml, self._handle, self._nvml.NVML_TEMPERATURE_GPU
        try:
            nvml.nvmlDeviceGetTemperatureV(handle, sensor)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):
            return lambda: nvml.nvmlDeviceGetTemperature(handle, sensor)
        return lambda: nvml.nvmlDeviceGetTemperatureV(handle, sensor)


class NvmlTelemetry:
    """`Telemetry` of a real GPU. One live instance per GPU and machine."""

    simulated = False
    tripped = False
    """A card that shuts itself down stops answering, which is `GpuLostError`."""

    def __init__(self, device_index: int = 0, nvml: Any = None) -> None:
        """Open a GPU for this process alone.

        Args:
            device_index: as for `Gpu`.
            nvml: as for `Gpu`.

        Raises:
            GpuUnavailableError: as for `Gpu`.
            GpuBusyError: another live environment uses the GPU; names its process.
        """
        self.gpu = Gpu(device_index, nvml)
        self._last: Sample | None = None
        try:
            self._lock = _Lock(self.gpu.uuid)
        except BaseException:
            self.gpu.close()
            raise

    def reset(self, seed: int) -> GpuReading:
        """Start an episode. No energy is counted yet; power is the board's average over the last second."""
        now = self._last = self.gpu.sample()
        return GpuReading(
            temp_c=now.temp_c,
            mem_temp_c=now.mem_temp_c,
            temp_mean_c=now.temp_c,
            temp_spread_c=0.0,
            power_w=self.gpu.average_power_w(),
            energy_j=0.0,
            sm_clock_mhz=now.sm_clock_mhz,
            power_capped_s=0.0,
            thermal_throttle_s=0.0,
        )

    def read(self, work: WorkStats, duration_s: float) -> GpuReading:
        """Reading since the last call.

        Power is the energy counter's difference over the time that truly passed; energy and throttled times
        are that rate times `duration_s`, the interval's length on the service's clock.

        Raises:
            GpuLostError: the device stopped answering.
            ReadingError: a counter that fell, or calls so close together that it has hardly ticked.
        """
        if self._last is None:
            raise ReadingError("no episode has begun; call reset first")
        last, now = self._last, self.gpu.sample()
        elapsed_s = now.time_s - last.time_s
        if elapsed_s < MIN_INTERVAL_S:
            raise ReadingError(
                f"{elapsed_s:.3f} s since the last reading; the energy counter needs {MIN_INTERVAL_S} s"
            )
        for name in ("energy_j", "power_capped_s", "thermal_throttle_s"):
            if getattr(now, name) < getattr(last, name):
                raise ReadingError(
                    f"{self.gpu.name}: {name} fell from {getattr(last, name)} to {getattr(now, name)}: "
                    "the driver was reloaded; begin a new episode"
                )
        self._last = now
        power_w = (now.energy_j - last.energy_j) / elapsed_s
        scale = duration_s / elapsed_s
        return GpuReading(
            temp_c=now.temp_c,
            mem_temp_c=now.mem_temp_c,
            temp_mean_c=now.temp_c,
            temp_spread_c=0.0,
            power_w=power_w,
            energy_j=power_w * duration_s,
            sm_clock_mhz=now.sm_clock_mhz,
            # Two reasons may hold at once, so their sum may exceed the interval.
            power_capped_s=min(duration_s, (now.power_capped_s - last.power_capped_s) * scale),
            thermal_throttle_s=min(duration_s, (now.thermal_throttle_s - last.thermal_throttle_s) * scale),
        )

    def aligned_energy(self) -> tuple[float, float]:
        """Energy in J and time in s at the counter's next tick; see `Gpu.aligned_energy`."""
        return self.gpu.aligned_energy()

    def close(self) -> None:
        """Release the GPU for others. May be called twice."""
        self._last = None
        try:
            self.gpu.close()
        finally:
            self._lock.release()


class _Lock:
    """A lock on one GPU for this machine; the system frees it when the process ends, however it ends."""

    def __init__(self, uuid: str) -> None:
        path = Path(tempfile.gettempdir()) / f"thermalmoe-{uuid}.lock"
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags)
        except FileNotFoundError:
            self._file = os.open(path, flags | os.O_CREAT, 0o666)
            os.fchmod(self._file, 0o666)  # whatever the umask: the next user of the GPU may be another one
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._file, 20, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise GpuBusyError(
                f"{uuid} is used by another live environment, in process {pid or '?'}; "
                "close it or wait for its end"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # also frees it from a fork that inherited the file
            os.close(self._file)
            self._file = -1


def _import_nvml() -> Any:
    try:
        module = importlib.import_module("pynvml")
    except ImportError as error:
        raise GpuUnavailableError("the package nvidia-ml-py is missing; pip install nvidia-ml-py") from error
    if not hasattr(module, "_nvmlGetFunctionPointer"):
        raise GpuUnavailableError(
            "the module pynvml is not NVIDIA's: the PyPI package pynvml shadows nvidia-ml-py; "
            "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py"
        )
    return module


def _visible_device(nvml: Any, index: int) -> Any:
    """Handle of the device that CUDA numbers `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = nvml.nvmlDeviceGetCount()
        if not 0 <= index < count:
            raise GpuUnavailableError(f"no GPU {index}: NVML sees {count}")
        return nvml.nvmlDeviceGetHandleByIndex(index)
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if not 0 <= index < len(entries):
        raise GpuUnavailableError(f"no GPU {index}: CUDA_VISIBLE_DEVICES={visible!r} names {len(entries)}")
    if entries[index].isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(entries[index]))
    for i in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(i)
        if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(entries[index]):
            return handle
    raise GpuUnavailableError(
        f"no whole GPU {entries[index]!r}, which CUDA_VISIBLE_DEVICES names; "
        "MIG slices have no energy counter"
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
