"""NVML telemetry against a fake library that keeps its own account of energy and time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe.workload import WorkStats
from thermoe_env.device import nvml
from thermoe_env.device.nvml import Gpu, NvmlTelemetry
from thermoe_env.errors import GpuBusyError, GpuLostError, GpuUnavailableError, ReadingError

UINT, ULONGLONG = 1, 3  # NVML's type codes


class NVMLError(Exception):
    pass


class NVMLErrorFunctionNotFound(NVMLError):
    pass


class FakeNvml:
    """Two GPUs drawing `power_w` each; the clock is `now_s`, moved by the test."""

    NVMLError = NVMLError
    NVMLError_FunctionNotFound = NVMLErrorFunctionNotFound
    NVML_SUCCESS = 0
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0, 1
    NVML_TEMPERATURE_THRESHOLD_MEM_MAX, NVML_TEMPERATURE_THRESHOLD_GPU_MAX = 2, 3

    def __init__(self, uuid: str) -> None:
        self.uuids = [uuid, uuid + "-second"]
        self.now_s, self.power_w, self.energy_mj = 100.0, 500.0, 5_000_000.0
        self.counters = {74: 0, 269: 0, 270: 0, 271: 0}
        self.field_errors: dict[int, int] = {}
        self.fail_after: int | None = None
        self.missing: set[str] = set()
        self.started = self.device_calls = 0
        self.field_calls: list[list[int]] = []

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.energy_mj += 1e3 * self.power_w * seconds

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__").get("missing", ()):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def _call(self) -> None:
        self.device_calls += 1
        if self.fail_after is not None and self.device_calls > self.fail_after:
            raise NVMLError("GPU is lost")

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.started -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.uuids[handle]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "Fake H100"

    def nvmlDeviceGetTemperatureV(self, handle: int, sensor: int) -> int:
        self._call()
        return 47

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        self._call()
        return 46

    def nvmlDeviceGetTemperatureThreshold(self, handle: int, threshold: int) -> int:
        return (95, 89, 95, 87)[threshold]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:
        self._call()
        return self.energy_mj

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self._call()
        return round(1e3 * self.power_w)

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        self._call()
        return {1: 1965, 2: 2619}[clock]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=98, memory=12)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return 4

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[SimpleNamespace]:
        self._call()
        self.field_calls.append(fields)
        values = []
        for field in fields:
            # Only the member that the type names is right, as in a C union.
            if field in self.counters:
                value, kind = SimpleNamespace(ullVal=self.counters[field], uiVal=-1, dVal=-1.0), ULONGLONG
            else:
                number = 44 if field == 82 else round(1e3 * self.power_w)
                value, kind = SimpleNamespace(uiVal=number, ullVal=-1, dVal=-1.0), UINT
            returned = self.field_errors.get(field, 0)
            values.append(SimpleNamespace(fieldId=field, nvmlReturn=returned, valueType=kind, value=value))
        return values


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    library = FakeNvml("GPU-1234")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        nvml, "time", SimpleNamespace(perf_counter=lambda: library.now_s, sleep=lambda s: library.advance(s))
    )
    return library


@pytest.fixture
def telemetry(fake: FakeNvml) -> Iterator[NvmlTelemetry]:
    opened = NvmlTelemetry(nvml=fake)
    yield opened
    opened.close()


def test_values_and_units(fake: FakeNvml, telemetry: NvmlTelemetry) -> None:
    first = telemetry.reset(0)
    assert (first.temp_c, first.mem_temp_c, first.power_w, first.energy_j) == (47.0, 44.0, 500.0, 0.0)
    assert first.sm_clock_mhz == 1965.0
    # The interval took 1.25 s of true time for 1 s of service.
    fake.advance(1.25)
    fake.counters |= {74: 250_000_000, 271: 250_000_000, 269: 125_000_000, 270: 0}
    reading = telemetry.read(WorkStats(), 1.0)
    assert reading.power_w == pytest.approx(500.0)
    assert reading.energy_j == pytest.approx(500.0)
    assert reading.power_capped_s == pytest.approx(0.4)
    assert reading.thermal_throttle_s == pytest.approx(0.1)
    # Two reasons at once cannot hold the clock for longer than the interval.
    fake.advance(1.0)
    fake.counters |= {269: 1_125_000_000, 270: 1_000_000_000}
    assert telemetry.read(WorkStats(), 1.0).thermal_throttle_s == 1.0
    assert all(sorted(call) == [74, 82, 269, 270, 271] for call in fake.field_calls)


def test_what_one_interval_misses_of_a_ticking_counter_the_next_one_has(
    fake: FakeNvml, telemetry: NvmlTelemetry
) -> None:
    telemetry.reset(0)
    used, total = 0.0, 0.0
    shown = fake.energy_mj
    for step, power in enumerate((120.0, 650.0, 130.0, 400.0, 300.0, 650.0)):
        fake.now_s += 1.0
        used += power
        lag = 0.09 * power if step < 5 else 0.0  # the last tick was up to 100 ms ago
        fake.energy_mj = shown + 1e3 * (used - lag)
        reading = telemetry.read(WorkStats(), 1.0)
        assert abs(reading.energy_j - power) <= 0.1 * 650.0
        total += reading.energy_j
    assert total == pytest.approx(used)


def test_aligned_energy_waits_for_the_tick(fake: FakeNvml, telemetry: NvmlTelemetry) -> None:
    ticks_at = fake.now_s + 0.07

    def slept(seconds: float) -> None:
        fake.now_s += seconds
        if fake.now_s >= ticks_at:
            fake.energy_mj = 5_050_000.0

    nvml.time.sleep = slept  # type: ignore[assignment]
    energy_j, time_s = telemetry.aligned_energy()
    assert energy_j == 5050.0
    assert time_s == pytest.approx(ticks_at, abs=0.002)
    with pytest.raises(GpuLostError, match="stood still"):
        telemetry.aligned_energy()
    assert fake.now_s < ticks_at + 0.6


@pytest.mark.parametrize("calls", range(5))
def test_a_failure_at_any_call_is_a_lost_gpu(fake: FakeNvml, telemetry: NvmlTelemetry, calls: int) -> None:
    telemetry.reset(0)
    fake.advance(1.0)
    fake.fail_after = fake.device_calls + calls
    if calls == 4:  # a sample makes four calls
        telemetry.read(WorkStats(), 1.0)
        fake.advance(1.0)
    with pytest.raises(GpuLostError, match="stopped answering") as lost:
        telemetry.read(WorkStats(), 1.0)
    assert isinstance(lost.value.__cause__, NVMLError)


def test_the_return_code_of_every_field_counts(fake: FakeNvml, telemetry: NvmlTelemetry) -> None:
    telemetry.reset(0)
    for field in (82, 74, 269, 270, 271):
        fake.advance(1.0)
        fake.field_errors = {field: 15}
        with pytest.raises(GpuLostError, match="15"):
            telemetry.read(WorkStats(), 1.0)


def test_readings_that_are_no_readings_are_refused(fake: FakeNvml, telemetry: NvmlTelemetry) -> None:
    with pytest.raises(ReadingError, match="reset"):
        telemetry.read(WorkStats(), 1.0)
    telemetry.reset(0)
    fake.advance(0.01)
    with pytest.raises(ReadingError, match="energy counter needs"):
        telemetry.read(WorkStats(), 1.0)
    fake.advance(1.0)
    good, fake.energy_mj = fake.energy_mj, float("nan")
    with pytest.raises(ReadingError, match="energy_j is nan"):
        telemetry.read(WorkStats(), 1.0)
    fake.energy_mj = good - 1e6
    with pytest.raises(ReadingError, match="energy_j fell"):
        telemetry.read(WorkStats(), 1.0)


def test_older_drivers_have_the_older_temperature_call(fake: FakeNvml) -> None:
    def absent(handle: int, sensor: int) -> int:
        raise NVMLErrorFunctionNotFound

    fake.nvmlDeviceGetTemperatureV = absent  # type: ignore[method-assign]
    gpu = Gpu(nvml=fake)
    assert gpu.sample().temp_c == 46.0
    gpu.close()
    fake.missing = {"nvmlDeviceGetTemperatureV"}
    gpu = Gpu(nvml=fake)
    assert gpu.sample().temp_c == 46.0
    gpu.close()


def test_an_unusable_device_is_refused_and_nothing_stays_open(fake: FakeNvml) -> None:
    with pytest.raises(GpuUnavailableError, match="no GPU 7: NVML sees 2"):
        NvmlTelemetry(7, nvml=fake)
    fake.field_errors = {82: 3}
    with pytest.raises(GpuUnavailableError, match="memory temperature"):
        NvmlTelemetry(nvml=fake)
    assert fake.started == 0
    fake.field_errors = {}
    NvmlTelemetry(nvml=fake).close()  # no lock was left behind


def test_a_missing_driver_is_named(fake: FakeNvml) -> None:
    def absent() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    fake.nvmlInit = absent  # type: ignore[method-assign]
    with pytest.raises(GpuUnavailableError, match="install the NVIDIA driver"):
        NvmlTelemetry(nvml=fake)


def test_a_missing_or_shadowed_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(GpuUnavailableError, match="pip install nvidia-ml-py"):
        NvmlTelemetry()
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    with pytest.raises(GpuUnavailableError, match="shadows nvidia-ml-py"):
        NvmlTelemetry()


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [("1", 0, "GPU-1234-second"), ("1,0", 1, "GPU-1234"), ("GPU-1234-s", 0, "GPU-1234-second")],
)
def test_devices_are_counted_as_cuda_counts_them(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, index: int, uuid: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = Gpu(index, nvml=fake)
    assert gpu.uuid == uuid
    gpu.close()
    for hidden, match in (("", "names 0"), ("MIG-77", "MIG slices")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(GpuUnavailableError, match=match):
            Gpu(0, nvml=fake)


def test_one_live_user_per_gpu(fake: FakeNvml) -> None:
    first = NvmlTelemetry(nvml=fake)
    with pytest.raises(GpuBusyError, match=f"process {os.getpid()}"):
        NvmlTelemetry(nvml=fake)
    NvmlTelemetry(1, nvml=fake).close()  # the other GPU is free
    first.close()
    first.close()
    assert fake.started == 0
    second = NvmlTelemetry(nvml=fake)
    first.close()  # a late close takes nothing from the new owner
    with pytest.raises(GpuBusyError):
        NvmlTelemetry(nvml=fake)
    second.close()
    with pytest.raises(ReadingError, match="reset"):
        second.read(WorkStats(), 1.0)
    with pytest.raises(GpuLostError, match="closed"):
        second.reset(0)


def test_the_lock_holds_between_processes_and_ends_with_one(fake: FakeNvml, tmp_path: Path) -> None:
    code = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from thermoe_env.device.nvml import _Lock\n"
        "lock = _Lock('GPU-1234'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(GpuBusyError, match=f"process {other.pid}"):
            NvmlTelemetry(nvml=fake)
        assert fake.started == 0
        other.kill()
        other.wait()
    NvmlTelemetry(nvml=fake).close()


@pytest.mark.gpu
def test_a_real_gpu_agrees_with_itself() -> None:
    telemetry = NvmlTelemetry()
    try:
        first_j, first_s = telemetry.aligned_energy()
        start = telemetry.reset(0)
        time.sleep(2.0)
        reading = telemetry.read(WorkStats(), 2.0)
        last_j, last_s = telemetry.aligned_energy()
        assert 10.0 < reading.temp_c < 95.0 and 10.0 < reading.mem_temp_c < 105.0
        assert reading.power_w == pytest.approx((last_j - first_j) / (last_s - first_s), rel=0.15)
        assert reading.power_w == pytest.approx(start.power_w, rel=0.5)
    finally:
        telemetry.close()
