"""Telemetry of a real GPU: readings of `moe.device.nvml` over control intervals, for one process at a time.

The energy counter ticks every 100 ms, so the energy of an interval between two samples is uncertain by up to
one tick at either end (at most 10% of the power step there, for 1 s); what one interval misses the next one
has, and sums over an episode are exact to a tick. Energy that is integrated from power is uncertain by about
5%.
"""

from __future__ import annotations

import fcntl
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from moe.device.base import Sample, check_energy
from moe.device.nvml import Gpu
from moe.workload import WorkStats
from thermoe_env.device.telemetry import GpuReading, PerDevice, of_one_device
from thermoe_env.errors import GpuBusyError, GpuLostError, GpuUnavailableError, ReadingError

MIN_INTERVAL_S = 0.2
"""Two ticks: below it a difference of the energy counter says little."""


class NvmlTelemetry:
    """`Telemetry` of a real GPU. One live instance per GPU and machine."""

    simulated = False
    tripped = False
    """A card that shuts itself down stops answering, which is `GpuLostError`."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """Open a GPU for this process alone.

        Args:
            uuid: as for `Gpu`.
            nvml: as for `Gpu`.

        Raises:
            GpuUnavailableError: as for `Gpu`, or a sensor that gives no usable reading.
            GpuBusyError: another live environment uses the GPU; names its process.
        """
        self.gpu = Gpu(uuid, nvml)
        self.missing = self.gpu.missing
        self._last: Sample | None = None
        try:
            self.gpu.sample()
            self._lock = _Lock(uuid)
        except (GpuLostError, ReadingError) as error:
            self.gpu.close()
            raise GpuUnavailableError(f"no usable reading: {error}") from error
        except BaseException:
            self.gpu.close()
            raise

    def reset(self, seed: int) -> GpuReading:
        """Start an episode. No energy is counted yet; power is the board's average over the last second.

        Raises:
            GpuLostError: the device stopped answering.
            ReadingError: a sensor gave what cannot be.
        """
        now = self._last = self.gpu.sample()
        return _reading(now, power_w=now.power_w, energy_j=0.0, power_capped_s=0.0, thermal_throttle_s=0.0)

    def read(self, work: WorkStats, duration_s: float) -> GpuReading:
        """Reading since the last call.

        Power is the difference of energy over the time that truly passed; energy and throttled times are that
        rate times `duration_s`, the interval's length on the service's clock.

        Raises:
            GpuLostError: the device stopped answering.
            ReadingError: a sensor gave what cannot be, energy that does not go with power, or calls so close
                together that the counter has hardly ticked.
        """
        if self._last is None:
            raise ReadingError("no episode has begun; call reset first")
        last, now = self._last, self.gpu.sample()
        elapsed_s = now.time_s - last.time_s
        if elapsed_s < MIN_INTERVAL_S:
            raise ReadingError(
                f"{elapsed_s:.3f} s since the last reading; the energy counter needs {MIN_INTERVAL_S} s"
            )
        energy_j = now.energy_j - last.energy_j
        check_energy(self.gpu, energy_j, elapsed_s, now.power_w)
        if energy_j == 0.0:
            raise ReadingError(
                f"{self.gpu.name}: energy_j stood still for {elapsed_s:.3g} s; reload the driver"
            )
        for name in ("power_capped_s", "thermal_throttle_s"):
            if getattr(now, name) < getattr(last, name):
                raise ReadingError(
                    f"{self.gpu.name}: {name} fell from {getattr(last, name)} to {getattr(now, name)}: "
                    "the driver was reloaded; begin a new episode"
                )
        self._last = now
        power_w = energy_j / elapsed_s
        scale = duration_s / elapsed_s
        return _reading(
            now,
            power_w=power_w,
            energy_j=power_w * duration_s,
            # Two reasons may hold at once, so their sum may exceed the interval.
            power_capped_s=min(duration_s, (now.power_capped_s - last.power_capped_s) * scale),
            thermal_throttle_s=min(duration_s, (now.thermal_throttle_s - last.thermal_throttle_s) * scale),
        )

    def per_device(self, reading: GpuReading) -> PerDevice:
        """What `reading` says, of the one device that it is of."""
        return of_one_device(reading)

    def close(self) -> None:
        """Release the GPU for others. May be called twice."""
        self._last = None
        try:
            self.gpu.close()
        finally:
            self._lock.release()


def _reading(now: Sample, **over_interval: float) -> GpuReading:
    return GpuReading(
        temp_c=now.temp_c,
        mem_temp_c=now.temp_c if math.isnan(now.mem_temp_c) else now.mem_temp_c,
        temp_mean_c=now.temp_c,
        temp_spread_c=0.0,
        sm_clock_mhz=now.sm_clock_mhz,
        **over_interval,
    )


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
