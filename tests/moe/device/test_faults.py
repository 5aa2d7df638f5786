"""What a driver may answer and no card says: a named error each, or the right value and what is missing.

Every fault goes through the telemetry of the environment, those of energy and power through the meter too.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe.device import integral, meter, nvml
from moe.device.meter import EnergyMeter
from moe.device.nvml import Gpu
from moe.errors import GpuLostError, GpuUnavailableError, ReadingError
from moe.workload import WorkStats
from tests.moe.device.fake_nvml import (
    FUNCTION_NOT_FOUND,
    LOST,
    MEMORY_TEMP,
    NOT_SUPPORTED,
    POWER_AVERAGE,
    POWER_INSTANT,
    FakeNvml,
    NVMLError,
)  # fmt: skip
from thermoe_env.device.nvml import NvmlTelemetry

UUID = "GPU-1234"
ALL_ONES_32, ALL_ONES_64 = 2**32 - 1, 2**64 - 1


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    library = FakeNvml(UUID)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for module in (nvml, meter, integral):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: library.now_s))
    nvml._say_missing.cache_clear()
    yield library
    assert library.started == 0  # whatever went wrong, NVML was given back


def lie(name: str, value: object) -> Callable[[FakeNvml], None]:
    """A function that answers something else."""
    return lambda fake: fake.lies.update({name: value})


def field(number: int, **answer: object) -> Callable[[FakeNvml], None]:
    """A field that answers something else."""
    return lambda fake: fake.fields.update({number: answer})


def memory(celsius: object) -> Callable[[FakeNvml], None]:
    """Another temperature of the memory."""
    return field(MEMORY_TEMP, value=SimpleNamespace(uiVal=celsius))


def counter(number: int, value: object) -> Callable[[FakeNvml], None]:
    """A counter of throttled time that has another value."""
    return lambda fake: fake.counters.update({number: value})


def slowed(factor: float) -> Callable[[FakeNvml], None]:
    """An energy counter that from now on counts a share of what it should."""

    def inject(fake: FakeNvml) -> None:
        start_mj = fake.energy_mj
        fake.lies["energy"] = lambda truth: start_mj + factor * (truth - start_mj)

    return inject


RUNNING: dict[str, tuple[Callable[[FakeNvml], None], type[Exception], str]] = {
    "energy stands still": (slowed(0.0), ReadingError, "energy_j"),
    "energy counts a tenth": (slowed(0.1), ReadingError, "energy_j rose by .* the board reports 500 W"),
    "energy counts joules": (slowed(1e-3), ReadingError, "energy_j rose by .* the board reports 500 W"),
    "energy counts ten times": (slowed(10.0), ReadingError, "energy_j rose by .* on a board of 700 W"),
    "energy jumps by a megajoule": (lie("energy", lambda mj: mj + 1e9), ReadingError, "the counter jumped"),
    "energy jumps by three kilojoules": (lie("energy", lambda mj: mj + 3e6), ReadingError, "jumped"),
    "energy falls": (lie("energy", lambda mj: mj - 1e6), ReadingError, "energy_j fell"),
    "energy wraps": (lie("energy", lambda mj: mj % 2**22), ReadingError, "energy_j fell"),
    "energy is reset": (lie("energy", 0), ReadingError, "energy_j fell"),
    "energy is below nothing": (lie("energy", -5), ReadingError, "energy_j is -0.005"),
    "energy is all ones": (lie("energy", ALL_ONES_64), ReadingError, "energy_j is 1.84"),
    "energy is not a number": (lie("energy", float("nan")), ReadingError, "energy_j is nan"),
    "energy is infinite": (lie("energy", float("inf")), ReadingError, "energy_j is inf"),
    "energy is None": (lie("energy", None), ReadingError, "energy_j is None"),
    "energy is a text": (lie("energy", "N/A"), ReadingError, "energy_j is 'N/A'"),
    "energy is lost": (lie("energy", NVMLError(LOST)), GpuLostError, "GPU is lost"),
    "energy is an error of no name": (lie("energy", NVMLError(999)), GpuLostError, "999"),
    "energy is gone": (lie("energy", NVMLError(NOT_SUPPORTED)), GpuUnavailableError, "lacks a sensor"),
    "power is 0": (lie("power", 0), ReadingError, "power_w is 0"),
    "power is all ones": (lie("power", ALL_ONES_32), ReadingError, "power_w is 4.29"),
    "power is None": (lie("power", None), ReadingError, "power_w is None"),
    "power is lost": (lie("power", NVMLError(LOST)), GpuLostError, "GPU is lost"),
    "die at 0": (lie("temp", 0), ReadingError, "temp_c is 0"),
    "die at 255": (lie("temp", 255), ReadingError, "temp_c is 255"),
    "die at all ones": (lie("temp", ALL_ONES_32), ReadingError, "temp_c is 4.29"),
    "die below zero": (lie("temp", -3), ReadingError, "temp_c is -3"),
    "die is None": (lie("temp", None), ReadingError, "temp_c is None"),
    "die is lost": (lie("temp", NVMLError(LOST)), GpuLostError, "GPU is lost"),
    "memory at 0": (memory(0), ReadingError, "mem_temp_c is 0"),
    "memory at 255": (memory(255), ReadingError, "mem_temp_c is 255"),
    "memory at all ones": (memory(ALL_ONES_32), ReadingError, "mem_temp_c is 4.29"),
    "memory is None": (memory(None), ReadingError, "mem_temp_c is None"),
    "memory of an unknown type": (field(MEMORY_TEMP, valueType=7), ReadingError, "field 82 is of type 7"),
    "memory of no type": (field(MEMORY_TEMP, valueType=None), ReadingError, "field 82 is of type None"),
    "memory is an error": (field(MEMORY_TEMP, nvmlReturn=LOST), GpuLostError, "GPU is lost"),
    "clock 0": (lie("clock", 0), ReadingError, "sm_clock_mhz is 0"),
    "clock all ones": (lie("clock", ALL_ONES_32), ReadingError, "sm_clock_mhz is 4.29"),
    "clock None": (lie("clock", None), ReadingError, "sm_clock_mhz is None"),
    "clock lost": (lie("clock", NVMLError(LOST)), GpuLostError, "GPU is lost"),
    "capped time falls": (counter(74, 10**9 - 1), ReadingError, "power_capped_s fell"),
    "capped time all ones": (counter(271, ALL_ONES_64), ReadingError, "power_capped_s is 1.84"),
    "throttled time below nothing": (counter(269, -1), ReadingError, "thermal_throttle_s is -1e-09"),
    "throttled time None": (counter(270, None), ReadingError, "thermal_throttle_s is None"),
    "throttled time is an error": (field(270, nvmlReturn=999), GpuLostError, "999"),
    "fewer answers than fields": (lie("fields", lambda answers: answers[1:]), ReadingError, "5 answers to 6"),
    "more answers than fields": (lie("fields", lambda answers: answers * 2), ReadingError, "12 answers to 6"),
}  # fmt: skip
METERED = [name for name in RUNNING if name.split()[0] in ("energy", "power")]


@pytest.mark.parametrize("fault", RUNNING)
def test_an_interval_with_a_fault_is_no_reading(fake: FakeNvml, fault: str) -> None:
    inject, error, says = RUNNING[fault]
    fake.counters |= {74: 10**9}
    with closing(NvmlTelemetry(UUID, fake)) as telemetry:
        telemetry.reset(0)
        fake.advance(1.0)
        assert telemetry.read(WorkStats(), 1.0).power_w == pytest.approx(500.0)
        inject(fake)
        fake.advance(1.0)
        with pytest.raises(error, match=says):
            telemetry.read(WorkStats(), 1.0)


@pytest.mark.parametrize("fault", METERED)
def test_a_window_with_a_fault_is_no_measurement(fake: FakeNvml, fault: str) -> None:
    inject, error, _ = RUNNING[fault]

    def load() -> None:
        fake.advance(5e-3)

    with closing(Gpu(UUID, fake)) as gpu:
        card = EnergyMeter(gpu)
        start, end = card.window(load, 1.5)
        assert (end.energy_j - start.energy_j) / (end.time_s - start.time_s) == pytest.approx(500.0)
        inject(fake)
        with pytest.raises(error, match=fault.split()[0] if error is ReadingError else None):
            card.window(load, 1.5)


OPENING: dict[str, tuple[Callable[[FakeNvml], None], str]] = {
    "MIG": (lie("mig", [1, 1]), "MIG is on"),
    "no power": (lie("power", NVMLError(NOT_SUPPORTED)), "lacks a sensor"),
    "die at 0": (lie("temp", 0), "temp_c is 0"),
    "memory at 255": (memory(255), "mem_temp_c is 255"),
    "memory of an unknown type": (field(MEMORY_TEMP, valueType=9), "field 82 is of type 9"),
    "energy None": (lie("energy", None), "energy_j is None"),
    "lost": (lie("temp", NVMLError(LOST)), "GPU is lost"),
    "no such card": (lambda fake: fake.uuids.clear(), "code 6"),
}


@pytest.mark.parametrize("fault", OPENING)
def test_a_card_with_a_fault_is_not_opened(fake: FakeNvml, fault: str) -> None:
    inject, says = OPENING[fault]
    inject(fake)
    for open_card in (Gpu, NvmlTelemetry):
        with pytest.raises(GpuUnavailableError, match=says):
            open_card(UUID, fake)


def test_a_card_that_does_not_count_throttled_time_is_metered_but_not_played(fake: FakeNvml) -> None:
    fake.fields = {269: {"nvmlReturn": NOT_SUPPORTED}}
    with pytest.raises(GpuUnavailableError, match=r"lacks a sensor .*update the driver 580\.1"):
        NvmlTelemetry(UUID, fake)
    with closing(Gpu(UUID, fake)) as gpu:
        assert gpu.energy().energy_j == pytest.approx(5000.0) and gpu.missing == ()


LACKING: dict[str, tuple[Callable[[FakeNvml], None], str]] = {
    "mem_temp_c": (field(MEMORY_TEMP, nvmlReturn=NOT_SUPPORTED), "no memory temperature"),
    "mem_temp_c of 0": (memory(0), "no memory temperature"),
    "energy_j": (lie("energy", NVMLError(NOT_SUPPORTED)), "no energy counter"),
    "energy_j of an old driver": (lie("energy", NVMLError(FUNCTION_NOT_FOUND)), "no energy counter"),
    "power_inst_w": (field(POWER_INSTANT, nvmlReturn=NOT_SUPPORTED), "no instant power"),
    "power_limit_w": (lie("limit", NVMLError(NOT_SUPPORTED)), "no power limit"),
    "power_limit_w of 0": (lie("limit", 0), "no power limit"),
    "power_limit_w of all ones": (lie("limit", ALL_ONES_32), "no power limit"),
}


@pytest.mark.parametrize("fault", LACKING)
def test_a_card_is_usable_without_what_it_lacks_and_says_so_once(
    fake: FakeNvml, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    inject, says = LACKING[fault]
    inject(fake)
    for _ in range(2):
        with closing(NvmlTelemetry(UUID, fake)) as telemetry, caplog.at_level(logging.WARNING):
            assert telemetry.missing == (fault.split()[0],)
            telemetry.reset(0)
            fake.advance(1.0)
            reading = telemetry.read(WorkStats(), 1.0)
            assert reading.power_w == pytest.approx(500.0) and reading.energy_j == pytest.approx(500.0)
            # In place of the memory's temperature stands the die's.
            assert reading.mem_temp_c == (47.0 if "mem_temp_c" in telemetry.missing else 44.0)
    assert [says in record.message for record in caplog.records] == [True]


def test_values_of_every_known_type_are_read(fake: FakeNvml) -> None:
    for code, member in enumerate(("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")):
        fake.fields[MEMORY_TEMP] = {"valueType": code, "value": SimpleNamespace(**{member: 51})}
        with closing(Gpu(UUID, fake)) as gpu:
            assert gpu.sample().mem_temp_c == 51.0


def test_power_of_the_moment_is_no_judge_of_the_second_before(fake: FakeNvml) -> None:
    fake.fields[POWER_AVERAGE] = {"nvmlReturn": NOT_SUPPORTED}
    with closing(NvmlTelemetry(UUID, fake)) as telemetry:
        fake.power_w = 60.0
        telemetry.reset(0)
        fake.advance(1.0)
        fake.power_w = 600.0  # a step right before the reading
        assert telemetry.read(WorkStats(), 1.0).power_w == pytest.approx(60.0)
        slowed(0.0)(fake)
        fake.advance(1.0)
        with pytest.raises(ReadingError, match="the board reports 600 W"):
            telemetry.read(WorkStats(), 1.0)


def test_power_is_integrated_by_trapezoids_and_its_faults_are_not_lost(fake: FakeNvml) -> None:
    power = integral.PowerIntegral(lambda: fake.nvmlDeviceGetPowerUsage(0) / 1e3)
    fake.now_s, fake.power_w = fake.now_s + 2.0, 300.0  # from 500 W
    assert power.read().energy_j == pytest.approx(800.0)
    power.close()
    failing = Gpu(UUID, fake)
    fake.lies["power"] = None
    with closing(failing), pytest.raises(ReadingError, match="power_w is None"):
        integral.PowerIntegral(failing.power_w)
    fake.lies.clear()
    calls = iter([500.0, ReadingError("for a moment")])

    def once() -> float:
        value = next(calls, 500.0)
        if isinstance(value, ReadingError):
            raise value
        return value

    power = integral.PowerIntegral(once)
    power._thread.join(5.0)  # the thread met the fault and ended
    with pytest.raises(ReadingError, match="for a moment"):
        power.read()
    power.close()
