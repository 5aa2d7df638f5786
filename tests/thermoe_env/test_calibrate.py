"""Calibration: physics against an independent solver, fits of known devices, the recorded H100, bad files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from thermoe_env import calibrate, physics
from thermoe_env.calibration import TwinParams, load_twin, save_twin
from thermoe_env.errors import ScenarioError, TraceFormatError
from thermoe_env.fitting import fit_twin
from thermoe_env.free_run import THERMAL, WARM_UP, filter_states, free_run, thermal_vector, validate_twin
from thermoe_env.traces import (
    COLUMNS,
    SENSOR_LAG_S,
    Trace,
    load_driver_info,
    load_segments,
    load_trace,
)

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "configs/traces/h100_steps_telemetry.csv"
CUT = ROOT / "tests/data/h100_cut_telemetry.csv"
SHIPPED = ROOT / "configs/twin/h100.yaml"
INFO = load_driver_info(ROOT / "configs/traces/h100_steps_nvml_info.json")


@pytest.fixture(scope="module")
def shipped() -> TwinParams:
    return load_twin(SHIPPED)


@pytest.fixture(scope="module")
def cut() -> Trace:
    return load_trace(CUT)


def write_trace(path: Path, columns: dict[str, np.ndarray]) -> Path:
    rows = zip(*(columns[name] for name in COLUMNS), strict=True)
    path.write_text(
        "\n".join([",".join(COLUMNS), *(",".join(f"{v:.10g}" for v in row) for row in rows)]) + "\n"
    )
    return path


def simulate(twin: TwinParams, seconds: int, seed: int) -> dict[str, np.ndarray]:
    """A trace of a known device at 20 Hz, through `solve_ivp`, whole-degree sensors and a ticking counter."""
    rng = np.random.default_rng(seed)
    t = np.arange(0.0, seconds, 0.05)
    phases = rng.integers(0, 4, size=seconds // 20 + 1)
    phases[:4] = (0, 3, 3, 0)
    work = np.array([0.0, 150.0, 300.0, 500.0])[np.minimum(phases[(t // 20).astype(int)], 3)]

    def rates(now: float, x: np.ndarray, power: float) -> list[float]:
        return [
            (twin.r_spreader_c_per_w * power - x[0]) / twin.tau_spreader_s,
            (twin.r_sink_c_per_w * power - x[1]) / twin.tau_sink_s,
            (twin.r_mem_c_per_w * power - x[2]) / twin.tau_mem_s,
        ]

    def power_at(die_c: float, dynamic_w: float) -> float:
        return twin.idle_power_w * (1.0 + twin.leakage_per_c * (die_c - twin.idle_reference_c)) + dynamic_w

    power, die, memory = np.empty_like(t), np.empty_like(t), np.empty_like(t)
    x, last = np.array([1.0, 4.0, 3.0]), 40.0
    for begin in range(0, len(t), 5):  # power is constant within 0.25 s
        p = power_at(last, work[begin])
        end = min(begin + 5, len(t))
        span = (0.0, 0.05 * (end - begin))
        solved = solve_ivp(rates, span, x, args=(p,), t_eval=0.05 * np.arange(end - begin), rtol=1e-8)
        power[begin:end] = p
        die[begin:end] = twin.inlet_c + twin.r_die_c_per_w * p + solved.y[0] + solved.y[1]
        memory[begin:end] = twin.inlet_c + twin.mem_offset_c + solved.y[2] + solved.y[1]
        x = solve_ivp(rates, span, x, args=(p,), rtol=1e-8).y[:, -1]
        last = die[end - 1]
    late = np.maximum(0, np.arange(len(t)) - round(SENSOR_LAG_S / 0.05))
    energy_mj = 1e3 * np.append(0.0, np.cumsum(power[:-1] * 0.05))
    return {
        "t": t,
        "temp_c": np.floor(die[late] + 0.5),
        "mem_temp_c": np.floor(memory[late] + 0.5),
        "power_w": power,
        "power_inst_w": power,
        "energy_mj": energy_mj[np.arange(len(t)) // 2 * 2],
        "sm_mhz": np.full(len(t), 1980.0),
        "mem_mhz": np.full(len(t), 2619.0),
        "util": np.where(work > 0.0, 100.0, 0.0),
        "reasons": np.where(work >= 500.0, 4.0, 0.0),
    }


# ---------------------------------------------------------------- physics


@settings(max_examples=20, deadline=None)
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
    start, p = np.array([1.0, 5.0, 3.0, 2.0]), thermal_vector(shipped)
    fine, end_fine = free_run(np.full(60, 400.0), 0.5, start, p)
    coarse, end_coarse = free_run(np.full(6, 400.0), 5.0, start, p)
    np.testing.assert_allclose(end_fine, end_coarse, rtol=1e-12)
    # The drift is held within an interval; apart from it, means of means are the mean.
    still = start * [1, 1, 1, 0]
    fine, _ = free_run(np.full(60, 400.0), 0.5, still, p)
    coarse, _ = free_run(np.full(6, 400.0), 5.0, still, p)
    np.testing.assert_allclose(fine.reshape(6, 10, 2).mean(axis=1), coarse, rtol=1e-12)


# ---------------------------------------------------------------- traces


def test_power_comes_from_the_energy_counter(cut: Trace) -> None:
    parts = cut.intervals()
    ticks = np.append(0, np.flatnonzero(np.diff(cut.energy_mj) > 0) + 1)[1:]
    begin, end = parts.t_s[0] - 1.0, parts.t_s[-1]
    joules = np.interp([begin, end], cut.t[ticks], cut.energy_mj[ticks] / 1e3)
    assert parts.power_w.sum() == pytest.approx(joules[1] - joules[0], rel=1e-9)
    # The board's own 1 s average, read at the same moments, is a second witness.
    steady = parts.power_w[np.abs(np.gradient(parts.power_w)) < 5.0]
    board = np.interp(parts.t_s, cut.t, cut.power_w)[np.abs(np.gradient(parts.power_w)) < 5.0]
    assert np.median(np.abs(steady - board)) < 3.0


def test_idle_seconds_are_those_the_segments_call_idle() -> None:
    trace = load_trace(RECORDED)
    loads = [s for s in load_segments(RECORDED.with_name("h100_steps_segments.csv")) if s.tokens > 0]
    parts = trace.intervals()
    idle = parts.t_s[(parts.util == 0.0) & (parts.sm_mhz_min == 1980.0)]
    # Judged at the middle: utilisation trails by a sampling period of NVML, so a load may reach into an edge.
    assert len(idle) > 100
    assert not any(s.t0 < end - 0.5 < s.t1 for s in loads for end in idle)


def _rows(**changes: dict[int, str]) -> str:
    """A good trace of 40 rows, with cells replaced: column -> {row: text}."""
    rows = []
    for i in range(40):
        cells = dict.fromkeys(COLUMNS, "0") | {"t": f"{0.1 * i:.1f}", "energy_mj": str(1000 + 12000 * i)}
        rows.append(cells)
    for column, cells in changes.items():
        for i, text in cells.items():
            rows[i][column] = text
    return "\n".join([",".join(COLUMNS), *(",".join(row[c] for c in COLUMNS) for row in rows)])


@pytest.mark.parametrize(
    ("text", "row", "field"),
    [
        (_rows().replace("energy_mj", "energy"), "row 1", "energy_mj"),
        (_rows(t={5: "0.4"}), "row 7", "t:"),
        (_rows(t={5: "0.35", 6: "0.3"}), "row 7", "t:"),
        (_rows(t={39: "9.0"}), "row 41", "gap"),
        (_rows(temp_c={3: "N/A"}), "row 5", "temp_c"),
        (_rows(power_w={3: "nan"}), "row 5", "power_w"),
        (_rows(mem_temp_c={3: ""}), "row 5", "mem_temp_c"),
        (_rows(energy_mj={9: "0"}), "row 11", "energy_mj"),
        (_rows() + "\n1,2,3", "row 42", "3 fields"),
        ("", "row 1", "t"),
        (",".join(COLUMNS), "0 rows", "at least 3"),
    ],
)
def test_malformed_traces_are_refused(tmp_path: Path, text: str, row: str, field: str) -> None:
    path = tmp_path / "bad_telemetry.csv"
    path.write_text(text)
    with pytest.raises(TraceFormatError) as refusal:
        load_trace(path)
    message = str(refusal.value)
    assert str(path) in message and row in message and field in message


def test_a_missing_trace_or_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match=r"none\.csv"):
        load_trace(tmp_path / "none.csv")
    with pytest.raises(TraceFormatError, match="--nvml-info"):
        load_driver_info(tmp_path / "none.json")
    raw = json.loads((RECORDED.parent / "h100_steps_nvml_info.json").read_text())
    path = tmp_path / "info.json"
    path.write_text(json.dumps(raw | {"thr_GPU_MAX": "ERR NotSupported"}))
    with pytest.raises(TraceFormatError, match="thr_GPU_MAX"):
        load_driver_info(path)
    assert (INFO.slowdown_c, INFO.hw_slowdown_c, INFO.mem_limit_c, INFO.shutdown_c) == (87, 89, 95, 95)


def test_overlapping_segments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "segments.csv"
    path.write_text("phase,t0,t1,k,tokens,duty\nstep,0,5,1,64,1\nidle,4,8,0,0,1\n")
    with pytest.raises(TraceFormatError, match="row 3: t0"):
        load_segments(path)


# ---------------------------------------------------------------- fit


def test_fit_recovers_a_known_device(tmp_path: Path, shipped: TwinParams) -> None:
    true = dataclasses.replace(
        shipped,
        r_die_c_per_w=0.02,
        r_spreader_c_per_w=0.012,
        tau_spreader_s=5.0,
        r_sink_c_per_w=0.02,
        tau_sink_s=45.0,
        r_mem_c_per_w=0.025,
        tau_mem_s=2.0,
        mem_offset_c=3.0,
        inlet_c=27.0,
        leakage_per_c=0.005,
    )
    path = write_trace(tmp_path / "known_telemetry.csv", simulate(true, 500, seed=3))
    twin = fit_twin([load_trace(path)], INFO)
    for name in THERMAL[:7]:
        assert getattr(twin, name) == pytest.approx(getattr(true, name), rel=0.12), name
    assert twin.inlet_c == pytest.approx(true.inlet_c, abs=0.5)
    assert twin.mem_offset_c == pytest.approx(true.mem_offset_c, abs=0.3)
    at_reference = true.idle_power_w * (
        1 + true.leakage_per_c * (twin.idle_reference_c - true.idle_reference_c)
    )
    assert twin.idle_power_w == pytest.approx(at_reference, rel=0.01)
    assert twin.leakage_per_c == pytest.approx(true.leakage_per_c, rel=0.1)
    assert twin.inlet_drift_c < 0.3  # it has none
    # Whole degrees alone stand between truth and sensor.
    errors = twin.provenance["held_out"][0]
    assert errors["temp_rmse_c"]["60"] < 0.5 and errors["mem_temp_rmse_c"]["60"] < 0.5


def test_fit_beats_persistence_on_the_rest_of_the_recorded_trace(cut: Trace) -> None:
    twin = fit_twin([cut], INFO)
    errors = twin.provenance["held_out"][0]
    assert errors["fitted_before_s"] < cut.t[-1] - 60.0
    for h in ("1", "10", "60"):
        assert errors["temp_rmse_c"][h] < 0.5 * errors["persistence_rmse_c"][h]
        assert errors["mem_temp_rmse_c"][h] < 0.5 * errors["mem_persistence_rmse_c"][h]


def test_the_shipped_twin_is_the_fit_of_the_shipped_trace(shipped: TwinParams) -> None:
    [source] = shipped.provenance["traces"]
    assert source["sha256"] == hashlib.sha256(RECORDED.read_bytes()).hexdigest()
    again = fit_twin([load_trace(RECORDED)], INFO)
    for name in (*THERMAL, "idle_power_w", "leakage_per_c", "power_cap_w", "inlet_drift_c"):
        assert getattr(again, name) == pytest.approx(getattr(shipped, name), rel=0.02), name
    assert (shipped.max_clock_mhz, shipped.provenance["measured_on"]) == (1980.0, "2026-11-23")


def test_several_traces_are_fitted_together(tmp_path: Path, shipped: TwinParams) -> None:
    traces = []
    for seed, inlet in ((1, 24.0), (2, 29.0)):
        device = dataclasses.replace(shipped, inlet_c=inlet)
        traces.append(load_trace(write_trace(tmp_path / f"{seed}.csv", simulate(device, 300, seed))))
    twin = fit_twin(traces, INFO)
    assert twin.inlet_c == pytest.approx(26.5, abs=0.6)  # each trace has an inlet of its own
    assert twin.tau_sink_s == pytest.approx(shipped.tau_sink_s, rel=0.15)
    assert [part["file"] for part in twin.provenance["held_out"]] == ["1.csv", "2.csv"]


def test_traces_without_what_the_fit_needs_are_refused(tmp_path: Path, shipped: TwinParams) -> None:
    columns = simulate(shipped, 60, seed=1)
    busy = write_trace(tmp_path / "busy.csv", columns | {"util": np.full(len(columns["t"]), 50.0)})
    with pytest.raises(TraceFormatError, match="idling"):
        fit_twin([load_trace(busy)], INFO)


# ---------------------------------------------------------------- validation


def test_restarts_know_only_the_past(cut: Trace, shipped: TwinParams) -> None:
    parts, p = cut.intervals(), thermal_vector(shipped)
    measured = np.stack([parts.temp_c, parts.mem_temp_c], axis=1)
    changed, power = measured.copy(), parts.power_w.copy()
    changed[100:] += 30.0
    power[100:] = 0.0
    a = filter_states(parts.power_w, measured, 1.0, p, shipped.inlet_drift_c)
    b = filter_states(power, changed, 1.0, p, shipped.inlet_drift_c)
    np.testing.assert_array_equal(a[:100], b[:100])
    assert not np.array_equal(a[100], b[100])


def test_a_perfect_twin_has_no_error(shipped: TwinParams, cut: Trace) -> None:
    parts = cut.intervals()
    quiet = dataclasses.replace(shipped, inlet_drift_c=0.0)
    start = np.array([1.0, 4.0, 3.0, 0.0])
    truth, _ = free_run(parts.power_w, 1.0, start, thermal_vector(quiet))
    made = dataclasses.replace(parts, temp_c=truth[:, 0] + 2.0, mem_temp_c=truth[:, 1] + 2.0)  # a warmer room
    errors = validate_twin(made, quiet, first=100)
    assert max(v for v in errors.temp_max_error_c.values() if v is not None) < 0.1
    assert errors.temp_rmse_c["180"] is None and errors.restarts["180"] == 0
    expected = np.sqrt(np.mean((truth[110:, 0] - truth[100:-10, 0]) ** 2))
    assert errors.persistence_rmse_c["10"] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- files and commands


def test_twin_files_are_strict(tmp_path: Path, shipped: TwinParams) -> None:
    path = tmp_path / "folder" / "twin.yaml"
    save_twin(shipped, path)
    assert load_twin(path) == shipped
    assert list(path.parent.iterdir()) == [path]
    raw = yaml.safe_load(path.read_text())
    for bad, match in [
        (raw | {"r_dye_c_per_w": 1.0}, "unknown r_dye_c_per_w.*exactly"),
        ({k: v for k, v in raw.items() if k != "inlet_c"}, "missing inlet_c"),
        (raw | {"tau_sink_s": -1.0}, "tau_sink_s must be > 0"),
        (raw | {"tau_sink_s": "40"}, "tau_sink_s must be a finite number"),
        (raw | {"idle_power_w": float("nan")}, "idle_power_w must be a finite number"),
        (raw | {"power_cap_w": 100.0}, "power_cap_w must exceed"),
        (raw | {"tau_spreader_s": 500.0}, "tau_spreader_s must not exceed"),
        (raw | {"slowdown_c": 90.0}, "slowdown_c <= hw_slowdown_c"),
        (raw | {"provenance": "somewhere"}, "provenance"),
        ([1, 2], "mapping"),
    ]:
        path.write_text(yaml.safe_dump(bad))
        with pytest.raises(ScenarioError, match=match) as refusal:
            load_twin(path)
        assert str(path) in str(refusal.value)
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_twin(tmp_path / "none.yaml")


def test_twins_load_without_compiling_anything() -> None:
    code = (
        "import sys; from thermoe_env.calibration import load_twin; load_twin(sys.argv[1]); "
        "print([m for m in ('numba', 'torch', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SHIPPED)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, args)])
        calibrate.main()
        return capsys.readouterr().out

    info = RECORDED.parent / "h100_steps_nvml_info.json"
    out = tmp_path / "mine.yaml"
    assert str(out) in run("fit", CUT, "--nvml-info", info, "--out", out)
    assert load_twin(out).gpu == INFO.name
    answer = json.loads(run("validate", CUT, "--twin", out, "--json"))
    assert answer["trace_was_fitted"] is True
    assert set(answer["temp_rmse_c"]) == {"1", "10", "60", "180"}
    assert answer["restarts"]["1"] == len(load_trace(CUT).intervals()) - WARM_UP - 1
    assert "very trace" not in run("validate", CUT, "--twin", "h100")
    with pytest.raises(SystemExit, match="no twin 'a100'"):
        run("validate", CUT, "--twin", "a100")
    with pytest.raises(SystemExit, match="nvml-info"):
        run("fit", CUT)
