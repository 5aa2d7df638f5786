"""Heat against closed forms and an independent solver; the observer against the textbook."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from thermoe_env.calibration.traces import (
    Trace,
)
from thermoe_env.calibration.validation import validate_twin
from thermoe_env.device import physics
from thermoe_env.device.free_run import STATE, advance, free_run, thermal_vector
from thermoe_env.device.observer import Observer, follow, noise_vector
from thermoe_env.device.parameters import TwinParams

# ---------------------------------------------------------------- physics


@settings(max_examples=20)
@given(
    tau_s=st.floats(0.5, 80.0),
    start=st.floats(-5.0, 40.0),
    powers=st.lists(st.floats(60.0, 700.0), min_size=1, max_size=6),
)
def test_relax_is_the_solution_of_the_equation(tau_s: float, start: float, powers: list[float]) -> None:
    x, whole = start, 0.0
    solved_x, area = start, 0.0
    for power in powers:
        target = 0.03 * power
        whole += physics.relax_mean(x, target, 2.0, tau_s) * 2.0
        x = physics.relax(x, target, 2.0, tau_s)
        solved = solve_ivp(
            lambda now, y, to: [(to - y[0]) / tau_s, y[0]],
            (0.0, 2.0),
            [solved_x, area],
            args=(target,),
            rtol=1e-9,
            atol=1e-9,
        )
        solved_x, area = solved.y[:, -1]
    assert x == pytest.approx(solved_x, abs=1e-5)
    assert whole == pytest.approx(area, abs=1e-4)


def test_free_run_does_not_depend_on_the_step_under_constant_power(shipped: TwinParams) -> None:
    start, p = np.array([1.0, 5.0, -2.0, 3.0, 2.0, 1.0, 0.1, 0.5]), thermal_vector(shipped)
    fine, end_fine = free_run(np.full(60, 400.0), 0.5, start, p)
    coarse, end_coarse = free_run(np.full(6, 400.0), 5.0, start, p)
    np.testing.assert_allclose(end_fine, end_coarse, rtol=1e-12)
    # What fades is held within an interval; apart from it, means of means are the mean.
    still = start * [1, 1, 1, 1, 0, 1, 0, 0]
    fine, _ = free_run(np.full(60, 400.0), 0.5, still, p)
    coarse, _ = free_run(np.full(6, 400.0), 5.0, still, p)
    np.testing.assert_allclose(fine.reshape(6, 10, 2).mean(axis=1), coarse, rtol=1e-12)


def test_heat_has_the_closed_forms_of_its_circuit(shipped: TwinParams) -> None:
    p, cold = thermal_vector(shipped), np.zeros(len(STATE))
    power, t = 500.0, np.arange(0.5, 20.0 * shipped.tau_fan_s)
    ran, end = free_run(np.full(len(t), power), 1.0, cold, p)
    # Steady state: the sum of the resistances times the power, and nothing left to do.
    resistance = shipped.r_die_c_per_w + shipped.r_spreader_c_per_w + shipped.r_sink_c_per_w
    resistance += shipped.r_fan_c_per_w
    assert ran[-1, 0] == pytest.approx(shipped.inlet_c + resistance * power, abs=1e-3)
    before = end.copy()
    advance(power, 1.0, p, end, np.empty(2))
    np.testing.assert_allclose(end, before, atol=1e-3)
    # Step response: a sum of exponentials, here averaged over each second.
    response = shipped.inlet_c + shipped.r_die_c_per_w * power
    for r, tau in (("r_spreader", "tau_spreader"), ("r_sink", "tau_sink"), ("r_fan", "tau_fan")):
        tau_s = getattr(shipped, f"{tau}_s")
        mean_decay = tau_s * (np.exp(-(t - 0.5) / tau_s) - np.exp(-(t + 0.5) / tau_s))
        response = response + getattr(shipped, f"{r}_c_per_w") * power * (1.0 - mean_decay)
    np.testing.assert_allclose(ran[:, 0], response, rtol=1e-9)


@settings(max_examples=30)
@given(
    powers=st.lists(st.floats(60.0, 700.0), min_size=2, max_size=40),
    more=st.lists(st.floats(0.0, 200.0), min_size=40, max_size=40),
)
def test_more_power_is_never_cooler_within_minutes(
    shipped: TwinParams, powers: list[float], more: list[float]
) -> None:
    """The fans take back within minutes less than the heatsink gains."""
    low, high = np.array(powers), np.array(powers) + np.array(more[: len(powers)])
    p, start = thermal_vector(shipped), np.zeros(len(STATE))
    assert np.all(free_run(high, 1.0, start, p)[0] >= free_run(low, 1.0, start, p)[0] - 1e-9)


# ---------------------------------------------------------------- validation


def test_restarts_know_only_the_past(cut: Trace, shipped: TwinParams) -> None:
    parts, p, noise = cut.intervals(), thermal_vector(shipped), noise_vector(shipped)
    measured = np.stack([parts.temp_c, parts.mem_temp_c], axis=1)
    changed, power = measured.copy(), parts.power_w.copy()
    changed[100:] += 30.0
    power[100:] = 0.0
    a = follow(parts.power_w, measured, 1.0, p, noise)
    b = follow(power, changed, 1.0, p, noise)
    np.testing.assert_array_equal(a[:100], b[:100])
    assert not np.array_equal(a[100], b[100])


@pytest.mark.parametrize("sensors", [2, 1], ids=["die and memory", "die alone"])
def test_the_observer_is_a_kalman_filter(cut: Trace, shipped: TwinParams, sensors: int) -> None:
    """Against the textbook's matrices, read off the model by differences."""
    parts, p, noise = cut.intervals().until(60), thermal_vector(shipped), noise_vector(shipped)
    measured = np.stack([parts.temp_c, parts.mem_temp_c], axis=1)
    measured[:, sensors:] = np.nan
    observer = Observer(shipped, parts.power_w[0])
    x = np.array(list(observer.state.values()))
    covariance = np.diag(np.array(list(observer.spread.values())) ** 2)
    spread = np.array([*[noise[0]] * 4, *noise[1:5]])
    for power, truth in zip(parts.power_w, measured, strict=True):
        one = np.array([power])
        base, end = free_run(one, 1.0, np.zeros(8), p)
        runs = [free_run(one, 1.0, unit, p) for unit in np.eye(8)]
        h = np.array([(mean - base)[0] for mean, _ in runs]).T[:sensors]  # [2, 8]
        f = np.array([state - end for _, state in runs]).T  # [8, 8]
        gain = covariance @ h.T @ np.linalg.inv(h @ covariance @ h.T + np.eye(sensors) * noise[5] ** 2)
        x = x + gain @ ((truth - base[0])[:sensors] - h @ x)
        covariance = (np.eye(8) - gain @ h) @ covariance
        x, covariance = f @ x + end, f @ covariance @ f.T + np.diag(spread**2) @ (np.eye(8) - f @ f)
        observer.update(power, *truth)
        np.testing.assert_allclose(list(observer.state.values()), x, atol=1e-8)
        np.testing.assert_allclose(
            np.array(list(observer.spread.values())) ** 2, np.diag(covariance), atol=1e-8
        )
    np.testing.assert_allclose(
        observer.forecast(parts.power_w), free_run(parts.power_w, 1.0, x, p)[0], atol=1e-6
    )


def test_the_observer_finds_todays_inlet(shipped: TwinParams) -> None:
    """A room four degrees warmer than the calibration's, within a minute and a half of service."""
    warm = dataclasses.replace(shipped, inlet_c=shipped.inlet_c + 4.0)
    power = np.repeat([130.0, 600.0, 300.0], 30)
    truth, _ = free_run(power, 1.0, np.zeros(8), thermal_vector(warm))
    observer = Observer(shipped, power[0])
    for watts, (die, memory) in zip(power, truth, strict=True):
        observer.update(watts, die, memory)
    ahead, _ = free_run(np.tile(power, 2), 1.0, np.zeros(8), thermal_vector(warm))
    assert np.abs(observer.forecast(power)[:60, 0] - ahead[len(power) :][:60, 0]).max() < 2.0


def test_a_perfect_twin_has_no_error(shipped: TwinParams, cut: Trace) -> None:
    parts = cut.intervals().until(270)
    start = np.array([1.0, 4.0, -2.0, 3.0, 0.0, 2.0, 0.0, 0.0])  # a warmer room
    truth, _ = free_run(parts.power_w, 1.0, start, thermal_vector(shipped))
    made = dataclasses.replace(parts, temp_c=truth[:, 0], mem_temp_c=truth[:, 1])
    sharp = dataclasses.replace(
        shipped, node_noise_c=1e-6, inlet_drift_c=0.0, die_gain_spread=0.0, mem_drift_c=0.0
    )
    errors = validate_twin(made, sharp, first=100)
    assert max(v for v in errors.temp_max_error_c.values() if v is not None) < 0.25
    assert errors.temp_rmse_c["180"] is None and errors.restarts["180"] == 0
    expected = np.sqrt(np.mean((truth[110:, 0] - truth[100:-10, 0]) ** 2))
    assert errors.persistence_rmse_c["10"] == pytest.approx(expected, abs=1e-3)
