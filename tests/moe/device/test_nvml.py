"""The reader of NVML: which card, what it lets through, and what it needs of the installation."""

from __future__ import annotations

import sys
from contextlib import closing
from types import ModuleType

import pytest

from moe.device.nvml import Gpu, visible_uuid
from moe.errors import GpuLostError, GpuUnavailableError
from tests.moe.device.fake_nvml import FUNCTION_NOT_FOUND, NOT_SUPPORTED, POWER_INSTANT, FakeNvml, NVMLError

UUID = "GPU-1234"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return FakeNvml(UUID)


def test_a_card_is_opened_by_its_uuid(fake: FakeNvml) -> None:
    fake.names[1] = "Another"
    with closing(Gpu(fake.uuids[1], fake)) as gpu:
        assert (gpu.uuid, gpu.name, gpu.driver) == (fake.uuids[1], "Another", "580.1")
        assert (gpu.power_limit_w, gpu.averages, gpu.missing) == (700.0, True, ())
    gpu.close()
    assert fake.started == 0
    with pytest.raises(GpuLostError, match="closed"):
        gpu.energy()


def test_a_row_of_a_trace_has_every_column_in_its_unit(fake: FakeNvml) -> None:
    with closing(Gpu(UUID, fake)) as gpu:
        assert gpu.trace_row() == {
            "temp_c": 47.0, "mem_temp_c": 44.0, "power_w": 500.0, "power_inst_w": 500.0,
            "energy_mj": 5_000_000, "sm_mhz": 1965.0, "mem_mhz": 2619.0, "util": 98.0, "reasons": 4,
        }  # fmt: skip
    fake.fields[POWER_INSTANT] = {"nvmlReturn": NOT_SUPPORTED}
    with closing(Gpu(UUID, fake)) as gpu:
        fake.power_w = 300.0
        assert gpu.trace_row()["power_inst_w"] == 300.0


def test_a_threshold_that_the_driver_does_not_name_is_left_out(fake: FakeNvml) -> None:
    with closing(Gpu(UUID, fake)) as gpu:
        whole = gpu.limits()
        assert whole == {
            "thr_SHUTDOWN": 95, "thr_SLOWDOWN": 89, "thr_MEM_MAX": 95, "thr_GPU_MAX": 87,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        }  # fmt: skip
        fake.lies["MEM_MAX"] = NVMLError(NOT_SUPPORTED)
        assert gpu.limits() == {name: value for name, value in whole.items() if name != "thr_MEM_MAX"}


def test_older_drivers_have_the_older_temperature_call(fake: FakeNvml) -> None:
    fake.lies["temp"] = NVMLError(FUNCTION_NOT_FOUND)
    with closing(Gpu(UUID, fake)) as gpu:
        assert gpu.temperature_c() == 46.0
    fake.missing = {"nvmlDeviceGetTemperatureV"}
    with closing(Gpu(UUID, fake)) as gpu:
        assert gpu.temperature_c() == 46.0


def test_a_missing_driver_is_named(fake: FakeNvml) -> None:
    def absent() -> None:
        raise NVMLError(12)

    fake.nvmlInit = absent  # type: ignore[method-assign]
    for ask in (Gpu, lambda uuid, nvml: visible_uuid(0, nvml)):
        with pytest.raises(GpuUnavailableError, match="install the NVIDIA driver"):
            ask(UUID, fake)


def test_a_missing_or_shadowed_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(GpuUnavailableError, match="pip install nvidia-ml-py"):
        Gpu(UUID)
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    with pytest.raises(GpuUnavailableError, match="shadows nvidia-ml-py"):
        Gpu(UUID)


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 1, "GPU-1234-second"),
        ("1", 0, "GPU-1234-second"),
        ("1,0", 1, "GPU-1234"),
        ("GPU-1234-s", 0, "GPU-1234-second"),
        ("0,-1,1", 0, "GPU-1234"),
    ],
)
def test_devices_are_counted_as_cuda_counts_them(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, uuid: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_uuid(index, fake) == uuid
    assert fake.started == 0


@pytest.mark.parametrize(
    ("visible", "index", "says"),
    [
        (None, 7, "no GPU 7: NVML names 2"),
        (None, -1, "no GPU -1"),
        ("", 0, "names 0"),
        ("MIG-77", 0, "MIG slices"),
        ("0,-1,1", 1, "names 1"),  # CUDA sees nothing behind an entry that names no card
        ("2,0", 0, "names 0"),
        ("GPU-1", 0, "names 0"),  # the beginning of two
    ],
)
def test_a_device_that_cuda_does_not_see_is_refused(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, says: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(GpuUnavailableError, match=says):
        visible_uuid(index, fake)


def test_numbers_of_unlike_cards_are_refused_where_cuda_may_order_them_otherwise(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.names[1] = "Slower"
    with pytest.raises(GpuUnavailableError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_uuid(0, fake)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert visible_uuid(1, fake) == fake.uuids[1]
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", fake.uuids[1])
    assert visible_uuid(0, fake) == fake.uuids[1]
