"""Energy of phases: the clock against the time it was given, and power against a device that is made up."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.data.streams import StreamConfig
from moe.device.base import Tick
from moe.device.meter import EnergyMeter, open_meter
from moe.model.config import model_config
from moe.model.transformer import MoEModel, initialise
from studies.ttt_config import Run, load_study
from studies.ttt_measure import Bench
from studies.ttt_meter import HOST, PHASES, PhaseClock, energy_around, measure_power, solve_power
from studies.ttt_streams import load_pool, make_stream

POWER_W = dict(zip(PHASES, (600.0, 650.0, 500.0, 250.0, 150.0), strict=True))


def test_the_clock_accounts_for_all_time_between_its_first_mark_and_its_stop():
    clock = PhaseClock(torch.device("cpu"))
    begin = time.perf_counter()
    clock.enter("serve")
    time.sleep(0.02)
    clock.enter(HOST)
    clock.enter("serve")
    seconds = clock.stop()
    whole = time.perf_counter() - begin
    assert set(seconds) == set(PHASES) and 0.02 <= seconds["serve"] <= sum(seconds.values()) <= whole
    assert clock.stop() == dict.fromkeys(PHASES, 0.0)  # as new


@given(
    st.lists(st.floats(50.0, 700.0), min_size=len(PHASES), max_size=len(PHASES)),
    st.floats(0.0, 0.4),
)
def test_power_follows_from_mixed_loads(power, mixed):
    seconds = (1.0 - mixed) * np.eye(len(PHASES)) + mixed * np.full((len(PHASES),) * 2, 1 / len(PHASES))
    found = solve_power(seconds.tolist(), (seconds @ np.array(power)).tolist())
    np.testing.assert_allclose(list(found.values()), power, rtol=1e-6)


def test_loads_that_tell_nothing_apart_and_power_below_nothing_are_refused():
    with pytest.raises(ArithmeticError, match="apart"):
        solve_power([[1.0] * len(PHASES)] * len(PHASES), [1.0] * len(PHASES))
    with pytest.raises(ArithmeticError, match="negative"):
        solve_power(np.eye(len(PHASES)).tolist(), [1.0, 1.0, -1.0, 1.0, 1.0])


class MadeUpDevice:
    """A device with a clock of its own, whose counter is exact: it plays `PhaseClock` and `EnergyMeter`."""

    def __init__(self) -> None:
        self.now_s, self.energy_j, self.phase = 0.0, 0.0, HOST
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def spend(self, phase: str, seconds: float) -> None:
        self.now_s += seconds
        self.energy_j += POWER_W[phase] * seconds
        self.seconds[phase] += seconds

    def enter(self, phase: str) -> None:
        self.phase = phase

    def stop(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def next_tick(self, between, not_before_s: float = 0.0) -> Tick:
        until = max(self.now_s + 0.05, not_before_s)
        while self.now_s < until:
            between()
        return Tick(self.energy_j, self.now_s)


def test_power_is_measured_from_tick_to_tick(monkeypatch):
    device = MadeUpDevice()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)

    def load(phase: str):
        def unit() -> None:
            device.spend(phase, 0.003)
            device.spend(HOST, 0.001)

        return unit

    power = measure_power(device, device, [load(phase) for phase in PHASES], 0.3)  # pyright: ignore
    assert power.power_w == pytest.approx(POWER_W)
    assert all(sum(row) >= 0.25 for row in power.seconds)


def test_energy_around_leaves_out_the_rest_before_the_last_tick(monkeypatch):
    device = MadeUpDevice()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)
    monkeypatch.setattr(time, "sleep", lambda seconds: device.spend(HOST, seconds))
    energy_j = energy_around(device, lambda: device.spend("serve", 0.123), POWER_W[HOST])  # pyright: ignore
    assert energy_j == pytest.approx(POWER_W["serve"] * 0.123)


class SteadyGpu:
    """A device that always draws 100 W, read without delay."""

    name, power_limit_w, averages = "steady", 200.0, True

    def energy(self) -> Tick:
        now_s = time.perf_counter()
        return Tick(100.0 * now_s, now_s)

    def power_w(self) -> float:
        return 100.0


def test_all_energy_of_a_stream_is_found_in_its_phases():
    """The metered path on a CPU: where power never changes, the phases add up to the counter."""
    device, study = torch.device("cpu"), load_study()
    steady: Any = SteadyGpu()
    model = initialise(MoEModel(model_config("vision", "tiny")), torch.Generator().manual_seed(0))
    model.requires_grad_(False).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = StreamConfig(task="vision", kinds=("clean",), batches=12, batch_size=8)
    streams = {"shifts": make_stream(config, load_pool("vision", "tiny", device), 0)}
    bench = Bench(study, "tiny", model, streams, EnergyMeter(steady), "tent")
    assert bench.power is not None and set(bench.power.power_w) == set(PHASES)
    run = Run(stream="shifts", norm="batch", adaptation="tent", gate="always", budget=0.5, guarded=True)
    result = bench.measure(run)
    assert sum(result["phase_cost"].values()) == pytest.approx(result["counter_j"], rel=0.1)
    assert 0 < sum(result["adapted"]) < 12 and 0.0 < result["price"]["serve"] < result["price"]["adapt"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.gpu
def test_phases_add_up_to_the_counter_on_a_gpu():
    device, study = torch.device("cuda"), load_study()
    with device:
        model = MoEModel(model_config("vision", "base"))
    initialise(model, torch.Generator(device).manual_seed(0))
    model.requires_grad_(False).eval().cast_weights(torch.bfloat16)
    streams = {
        "shifts": make_stream(study.stream_config("shifts", "base"), load_pool("vision", "tiny", device), 0)
    }
    bench = Bench(study, "base", model, streams, open_meter(device), "tent")
    run = Run(stream="shifts", norm="batch", adaptation="tent", gate="always", budget=None, guarded=True)
    result = bench.measure(run)
    assert result["counter_j"] is not None
    assert sum(result["phase_cost"].values()) == pytest.approx(result["counter_j"], rel=0.1)
