"""NVML telemetry: intervals, and one user per GPU, against a fake library; faults are in tests/moe/device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe.device import nvml
from moe.workload import WorkStats
from tests.moe.device.fake_nvml import FakeNvml, NVMLError
from thermoe_env.device.nvml import NvmlTelemetry
from thermoe_env.errors import GpuBusyError, GpuLostError, ReadingError

UUID = "GPU-1234"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    library = FakeNvml(UUID)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(nvml, "time", SimpleNamespace(perf_counter=lambda: library.now_s))
    return library


@pytest.fixture
def telemetry(fake: FakeNvml) -> Iterator[NvmlTelemetry]:
    opened = NvmlTelemetry(UUID, fake)
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
    assert all(call == [82, 186, 74, 271, 269, 270] for call in fake.field_calls[-3:])  # at once


def test_what_one_interval_misses_of_a_ticking_counter_the_next_one_has(
    fake: FakeNvml, telemetry: NvmlTelemetry
) -> None:
    telemetry.reset(0)
    used, total = 0.0, 0.0
    shown = fake.energy_mj
    for step, power in enumerate((120.0, 650.0, 130.0, 400.0, 300.0, 650.0)):
        fake.now_s += 1.0
        used += power
        fake.power_w = power
        lag = 0.09 * power if step < 5 else 0.0  # the last tick was up to 100 ms ago
        fake.energy_mj = shown + 1e3 * (used - lag)
        reading = telemetry.read(WorkStats(), 1.0)
        assert abs(reading.energy_j - power) <= 0.1 * 650.0
        total += reading.energy_j
    assert total == pytest.approx(used)


@pytest.mark.parametrize("calls", range(6))
def test_a_failure_at_any_call_is_a_lost_gpu(fake: FakeNvml, telemetry: NvmlTelemetry, calls: int) -> None:
    telemetry.reset(0)
    fake.advance(1.0)
    fake.fail_after = fake.device_calls + calls
    if calls == 5:  # a sample makes five calls
        telemetry.read(WorkStats(), 1.0)
        fake.advance(1.0)
    with pytest.raises(GpuLostError, match="stopped answering") as lost:
        telemetry.read(WorkStats(), 1.0)
    assert isinstance(lost.value.__cause__, NVMLError)


def test_a_reading_needs_an_episode_and_two_ticks(fake: FakeNvml, telemetry: NvmlTelemetry) -> None:
    with pytest.raises(ReadingError, match="reset"):
        telemetry.read(WorkStats(), 1.0)
    telemetry.reset(0)
    fake.advance(0.01)
    with pytest.raises(ReadingError, match="energy counter needs"):
        telemetry.read(WorkStats(), 1.0)
    fake.now_s += 0.3  # too short for the board's average to say anything
    fake.energy_mj = 5_000_000.0
    with pytest.raises(ReadingError, match=r"stood still for 0\.31 s"):
        telemetry.read(WorkStats(), 1.0)


def test_one_live_user_per_gpu(fake: FakeNvml) -> None:
    first = NvmlTelemetry(UUID, fake)
    with pytest.raises(GpuBusyError, match=f"process {os.getpid()}"):
        NvmlTelemetry(UUID, fake)
    NvmlTelemetry(fake.uuids[1], fake).close()  # the other GPU is free
    first.close()
    first.close()
    assert fake.started == 0
    second = NvmlTelemetry(UUID, fake)
    first.close()  # a late close takes nothing from the new owner
    with pytest.raises(GpuBusyError):
        NvmlTelemetry(UUID, fake)
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
            NvmlTelemetry(UUID, fake)
        assert fake.started == 0
        other.kill()
        other.wait()
    NvmlTelemetry(UUID, fake).close()


@pytest.mark.gpu
def test_a_real_gpu_says_the_same_both_ways() -> None:
    """Intervals of the telemetry beside windows of the meter, at rest and under load."""
    import torch

    from moe.device.meter import open_meter
    from moe.device.torch_device import uuid_of

    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def rest() -> None:
        time.sleep(2e-3)

    def load() -> None:
        for _ in range(20):
            torch.mm(a, a)
        torch.cuda.synchronize()

    assert nvml.visible_uuid(torch.cuda.current_device()) == uuid_of(device)
    telemetry, meter = NvmlTelemetry(uuid_of(device)), open_meter(device)
    assert meter is not None
    try:
        for work in (rest, load, rest):
            meter.window(work, 2.0)  # until it has settled
            telemetry.reset(0)
            start, end = meter.window(work, 2.0)
            reading = telemetry.read(WorkStats(), 2.0)
            power_w = (end.energy_j - start.energy_j) / (end.time_s - start.time_s)
            assert reading.power_w == pytest.approx(power_w, rel=0.15)
            assert reading.temp_c == pytest.approx(meter.gpu.temperature_c(), abs=2.0)
            assert 10.0 < reading.temp_c < 95.0 and 10.0 < reading.mem_temp_c < 105.0
    finally:
        telemetry.close()
