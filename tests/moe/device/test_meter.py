"""The meter: windows run from tick to tick, and power over them is what the card draws."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from moe.device import meter, nvml
from moe.device.meter import EnergyMeter, open_meter
from moe.device.nvml import Gpu
from moe.errors import GpuUnavailableError, ReadingError
from tests.moe.device.fake_nvml import FakeNvml, NVMLError


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A card of 300 W whose counter ticks every 100 ms; a read takes 3 ms."""
    fake = FakeNvml("GPU-1234")
    fake.power_w = 300.0

    def read(truth: float) -> int:
        fake.now_s += 3e-3
        return round(300.0 * 1e3 * 0.1 * int(fake.now_s / 0.1 + 1e-9))

    fake.lies["energy"] = read
    for module in (nvml, meter):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: fake.now_s))
    return fake


def test_a_window_runs_from_tick_to_tick(ticking: FakeNvml) -> None:
    def wait() -> None:
        ticking.now_s += 1e-3

    with closing(Gpu("GPU-1234", ticking)) as gpu:
        card = EnergyMeter(gpu)
        for seconds in (0.5, 1.5):
            start, end = card.window(wait, seconds)
            assert end.energy_j - start.energy_j == pytest.approx(300.0 * seconds)
            assert end.time_s - start.time_s == pytest.approx(seconds, abs=5e-3)
        ticking.lies["energy"] = ticking.lies["energy"](0)  # stands still from now on
        with pytest.raises(ReadingError, match="stood still"):
            card.next_tick(wait)


def test_runs_before_the_first_tick_do_not_count(ticking: FakeNvml) -> None:
    def run() -> None:
        ticking.now_s += 0.02

    with closing(Gpu("GPU-1234", ticking)) as gpu:
        joules, seconds = EnergyMeter(gpu).per_run(run, 1.0)
    assert joules / seconds == pytest.approx(300.0, rel=0.03)
    assert 0.02 <= seconds <= 0.024  # with reads of 3 ms near the ticks


def test_a_cpu_has_no_meter_and_cuda_without_nvml_is_an_error(
    ticking: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_meter(torch.device("cpu")) is None

    def no_driver() -> None:
        raise NVMLError(12)

    ticking.nvmlInit = no_driver  # type: ignore[method-assign]
    monkeypatch.setattr(nvml.importlib, "import_module", lambda name: ticking)
    monkeypatch.setattr(ticking, "_nvmlGetFunctionPointer", None, raising=False)
    monkeypatch.setattr(meter, "uuid_of", lambda device: "GPU-1234")
    with pytest.raises(GpuUnavailableError, match="install the NVIDIA driver"):
        open_meter(torch.device("cuda"))
