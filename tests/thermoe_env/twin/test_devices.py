"""Several devices: placement, the energy's split, heat that stays where it arises, and what is read of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thermoe_env  # noqa: F401  (registers the ids)
from moe.placement import Placement
from moe.profiles import save_profile
from moe.profiling.heat import forecast_expert_share
from moe.service.queueing import SLOT_S
from moe.workload import WorkStats
from tests.thermoe_env.conftest import WIDTHS, make_profile
from thermoe_env.device.physics import sensor_c
from thermoe_env.device.telemetry import READING_NAMES, GpuReading
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.telemetry import TwinTelemetry

WIDE, NARROW = [0, 1, 2, 3], [4, 5, 6, 7]
ALIKE = {"resistance": 0.0, "time_constant": 0.0, "leakage": 0.0, "energy": 0.0, "inlet_c": 0.0}
SLOTS = round(1.0 / SLOT_S)


def with_devices(problem: Problem, *devices: dict[str, Any], **overrides: Any) -> Problem:
    return Problem.of(load_scenario(problem.scenario, devices=devices, **overrides))


def split(warmer_c: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"experts": WIDE}, {"experts": NARROW, "inlet_offset_c": warmer_c}


def without_leakage(problem: Problem) -> Problem:
    return replace(problem, twin=replace(problem.twin, leakage_per_c=0.0))


def work(power_w: float, share: list[float]) -> WorkStats:
    """A second of even work that needs `power_w` above idle."""
    energy_j = np.tile(power_w * SLOT_S * np.array(share), (SLOTS, 1))
    return WorkStats(slot_energy_j=energy_j, device_clock=np.ones(len(share)))


def heated(telemetry: TwinTelemetry, powers: list[float], share: list[float]) -> list[GpuReading]:
    telemetry.reset(3)
    return [telemetry.read(work(power, share), 1.0) for power in powers]


def test_one_device_that_names_all_its_experts_is_the_default(problem: Problem) -> None:
    batches = [TwinBatch(p, 4) for p in (problem, with_devices(problem, {"experts": range(8)}))]
    rng = np.random.default_rng(0)
    first, second = (batch.reset(range(4)) for batch in batches)
    np.testing.assert_array_equal(first, second)
    for _ in range(60):
        index = problem.knobs.indices(rng.integers(0, problem.knobs.nvec, (4, 4)), "multi_discrete")
        first, second = (batch.step(index) for batch in batches)
        np.testing.assert_array_equal(first.reward, second.reward)
        np.testing.assert_array_equal(first.observation, second.observation)
        np.testing.assert_array_equal(batches[0].gpu, batches[1].gpu)
        np.testing.assert_array_equal(batches[0].gpu["temp_mean_c"], batches[0].gpu["temp_c"])
        assert not batches[0].gpu["temp_spread_c"].any()


@settings(max_examples=30)
@given(
    powers=st.lists(st.floats(0.0, 900.0), min_size=1, max_size=30),
    share=st.floats(0.0, 1.0),
    warmer_c=st.floats(-20.0, 20.0),
)
def test_devices_exchange_no_heat(problem: Problem, powers, share, warmer_c) -> None:
    """Whatever the neighbour's inlet, a device's whole state stays the same, bit for bit."""
    states = []
    for offset in (0.0, warmer_c):
        telemetry = TwinTelemetry(with_devices(problem, *split(offset)))
        heated(telemetry, powers, [share, 1.0 - share])
        states.append(telemetry._devices.copy())
    assert states[0][0] == states[1][0]
    assert states[1][1]["inlet_c"] - states[0][1]["inlet_c"] == pytest.approx(warmer_c, abs=1e-9)


@settings(max_examples=30)
@given(
    power=st.floats(0.0, 550.0),
    parts=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    offset=st.floats(-10.0, 10.0),
)
def test_energy_above_idle_is_the_work_s(problem: Problem, power, parts, offset) -> None:
    """Below the cap and without leakage: energy = idle of every device + what the slots need."""
    share = [part / sum(parts) for part in parts]
    first = {"experts": range(8), "inlet_offset_c": offset}
    shared = with_devices(problem, first, *({"experts": []} for _ in parts[1:]), randomize=ALIKE)
    readings = heated(TwinTelemetry(without_leakage(shared)), [power] * 20, share)
    for reading in readings:
        expected = len(parts) * problem.twin.idle_power_w + power
        assert reading.energy_j == pytest.approx(expected, rel=1e-12)
        assert reading.power_w == reading.energy_j


@pytest.mark.parametrize("n_devices", [1, 2, 4])
def test_energy_of_an_episode_is_conserved(problem: Problem, n_devices: int) -> None:
    placement = Placement.even(WIDTHS, n_devices)
    devices = [{"experts": placement.experts_on(d), "inlet_offset_c": 2.0 * d} for d in range(n_devices)]
    shared = without_leakage(with_devices(problem, *devices, randomize=ALIKE))
    assert shared.placement == placement
    batch = TwinBatch(shared, 3)
    batch.reset(range(3))
    rng, energy, dynamic = np.random.default_rng(1), np.zeros(3), np.zeros(3)
    for _ in range(100):
        index = shared.knobs.indices(rng.integers(0, shared.knobs.nvec, (3, 4)), "multi_discrete")
        batch.step(index)
        energy += batch.gpu["energy_j"]
        dynamic += batch.slot_energy.sum(axis=(1, 2))
        assert not batch.gpu["power_capped_s"].any()
    np.testing.assert_allclose(energy, dynamic + 100 * n_devices * shared.twin.idle_power_w, rtol=1e-12)


def test_a_device_without_experts_only_idles(problem: Problem) -> None:
    """Settled at idle it stays there, whatever the other one does: inlet + idle power times resistances."""
    shared = with_devices(problem, {"experts": range(8)}, {"experts": []}, randomize=ALIKE)
    np.testing.assert_array_equal(shared.device_share[..., 1], 0.0)
    shared = without_leakage(replace(shared, twin=replace(shared.twin, inlet_drift_c=0.0)))
    env = TwinBatch(shared, 1)
    env.reset([0])
    index = shared.knobs.indices(shared.knobs.action()[None], "multi_discrete")
    t = shared.twin
    rise = t.idle_power_w * (t.r_die_c_per_w + t.r_spreader_c_per_w + t.r_sink_c_per_w + t.r_fan_c_per_w)
    for _ in range(100):
        env.step(index)
        busy, idle = env.devices[0]
        assert idle["die_c"] == pytest.approx(t.inlet_c + rise, abs=1e-9)
    assert busy["die_c"] > idle["die_c"] + 5.0


def test_the_warmer_inlet_gives_the_hottest_reading(problem: Problem) -> None:
    """Twins but for their air: they differ by what their air does, in die and memory alike."""
    shared = without_leakage(with_devices(problem, *split(6.0), randomize=ALIKE))
    telemetry = TwinTelemetry(shared)
    for reading in heated(telemetry, [400.0] * 30, [0.5, 0.5]):
        assert reading.temp_spread_c == 6.0
        assert reading.temp_mean_c == reading.temp_c - 3.0
    cool, warm = telemetry._devices
    assert (reading.temp_c, reading.mem_temp_c) == (sensor_c(warm["die_c"]), sensor_c(warm["mem_c"]))
    assert warm["die_c"] - cool["die_c"] == pytest.approx(6.0, abs=1e-9)
    assert warm["mem_c"] - cool["mem_c"] == pytest.approx(6.0, abs=1e-9)


def test_the_slowest_device_sets_the_clock(problem: Problem) -> None:
    """One device so hot that it throttles: the service waits for it, the other one's clock stays."""
    shared = with_devices(problem, *split(), randomize=ALIKE)
    telemetry = TwinTelemetry(shared)
    telemetry.reset(0)
    telemetry._devices["inlet_c"][1] += 49.0
    reading = telemetry.read(work(400.0, [0.5, 0.5]), 1.0)
    assert shared.twin.slowdown_c <= telemetry._devices["die_c"][1] < shared.twin.shutdown_c
    assert (reading.thermal_throttle_s, reading.power_capped_s) == (1.0, 0.0)
    assert telemetry._devices["clock"][0] == 1.0 > telemetry._devices["clock"][1] == telemetry.clocks[1]
    assert reading.sm_clock_mhz == telemetry.clocks[1] * shared.twin.max_clock_mhz


def test_devices_are_drawn_apart(problem: Problem) -> None:
    """Device 0 is the one of a single-device world of the same seed; the next one is another draw."""
    alone, shared = (TwinTelemetry(with_devices(problem, *d)) for d in ([{}], split()))
    for telemetry in (alone, shared):
        telemetry.reset(11)
    assert alone._devices[0] == shared._devices[0]
    for name in ("r_die_c_per_w", "tau_fan_s", "leakage_per_c", "energy_factor", "inlet_c"):
        assert shared._devices[name][0] != shared._devices[name][1]
    np.testing.assert_array_equal(np.repeat(alone._here.drift_c, 2, axis=2), shared._here.drift_c)


def test_shares_follow_expert_work(problem: Problem) -> None:
    """At measured biases: tokens of a device's experts times their widths, over those of all."""
    devices = [{"experts": [0, 4, 5]}, {"experts": [1, 2, 3, 6]}, {"experts": [7]}]
    shared = with_devices(problem, *devices)
    share, profile = shared.device_share, problem.profile
    np.testing.assert_allclose(share.sum(axis=-1), 1.0, rtol=1e-12)
    for r, bias in enumerate(profile.routing_bias):
        b = shared.knobs.levels["routing_bias"].index(bias)
        for k in range(len(profile.expert_count)):
            work_of = [
                sum(profile.expert_share[k, r, layer, e] * WIDTHS[e] for layer in range(2) for e in held)
                for held in (d["experts"] for d in devices)
            ]
            assert share[k, b] == pytest.approx(np.array(work_of) / sum(work_of), rel=1e-12)


def test_bias_moves_work_to_the_narrow_experts(problem: Problem) -> None:
    narrow = with_devices(problem, *split()).device_share[:, :, 1]  # [K, B]
    assert np.all(np.diff(narrow, axis=1) > 0.0)


def test_the_twin_s_bias_is_that_of_equally_hot_devices() -> None:
    """Its shares are those forecast for signals of 1: the twin's routing knows no temperatures."""
    shared = Problem.of(load_scenario("two-devices"))
    profile = shared.profile
    share = forecast_expert_share(profile, shared.placement, [1.0, 1.0])  # [K, R, L, E]
    work = share.sum(axis=2) * profile.model["config"]["expert_widths"]
    of_device = shared.placement.per_device(work)
    levels = [shared.knobs.levels["routing_bias"].index(bias) for bias in profile.routing_bias]
    expected = of_device / of_device.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(shared.device_share[:, levels], expected, atol=1e-4)


def test_idle_power_of_all_devices_is_in_the_price(problem: Problem) -> None:
    more = with_devices(problem, *split()).reference_power_w - problem.reference_power_w
    assert more == pytest.approx(problem.power_profile.idle_power_w)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "at least one device"),
        ([{}, {"experts": [0]}], r"devices \[0\] do not; give `experts`"),
        ([{"experts": [0, 1, 1]}], r"experts \[1\] are named more than once"),
        ([{"experts": range(5)}, {"experts": range(3, 8)}], r"experts \[3, 4\] are named more than once"),
        ([{"experts": WIDE}, {"experts": [4, 5, 6]}], r"0 to 7 .* left out are \[7\]"),
        ([{"experts": range(9)}], r"unknown are \[8\]"),
        ([{"experts": range(-1, 8)}], r"experts.0: .*greater than or equal to 0, got -1"),
        ([{"inlet_offset_c": math.nan}], "inlet_offset_c: .*finite number, got nan"),
        ([{"inlet_offset": 6.0}], "known keys: .*inlet_offset_c"),
    ],
)
def test_other_placements_are_refused(problem: Problem, devices, message) -> None:
    with pytest.raises(ScenarioError, match=f"(?s){message}"):
        with_devices(problem, *devices)


def test_a_profile_that_cannot_split_the_work_is_refused(tmp_path) -> None:
    profile = make_profile()
    unnamed = replace(profile, model=profile.model | {"config": {"top_k": 4}})
    free = replace(profile, model=profile.model | {"config": {"top_k": 4, "expert_widths": [0] * 8}})
    for name, made in (("unnamed", unnamed), ("free", free)):
        save_profile(made, tmp_path / name)
    overrides = {"devices": split(), "profile": str(tmp_path / "unnamed"), "power_budget": {"brake": None}}
    scenario = load_scenario("vision", **overrides)
    with pytest.raises(ScenarioError, match="expert_widths"):
        Problem.of(scenario)
    with pytest.raises(ScenarioError, match="width 0"):
        _ = Problem.of(load_scenario(scenario, profile=str(tmp_path / "free"))).device_share


def test_the_live_world_serves_from_one_device(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    shared = with_devices(problem, *split()).scenario
    with pytest.raises(ScenarioError, match="2 devices and the live service serves from one GPU"):
        ThermalMoEEnv(shared, world="live")
    assert ThermalMoEEnv(shared, world="auto").world == "twin"
    assert "2 devices" in caplog.text


def test_the_shipped_scenario_plays() -> None:
    env = gymnasium.make("ThermalMoETwin-v0", scenario="two-devices")
    env.reset(seed=0)
    for _ in range(60):
        *_, info = env.step(env.action_space.sample())
        assert set(info["reading"]) == set(READING_NAMES)
        assert info["reading"]["temp_spread_c"] >= 0.0
    assert info["reading"]["temp_c"] >= info["reading"]["temp_mean_c"]
