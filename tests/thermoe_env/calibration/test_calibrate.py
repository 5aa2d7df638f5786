"""Calibration: traces and what is refused, fits of known devices and of recorded cards, the commands."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.thermoe_env.recorded import INFO, RECORDED, ROOT, SHIPPED, simulate, write_trace
from thermoe_env.calibration import command as calibrate
from thermoe_env.calibration.driver_info import driver_info_path, load_driver_info
from thermoe_env.calibration.excitation import TOKENS, TOP_K, schedule
from thermoe_env.calibration.fit import fit_twin
from thermoe_env.calibration.traces import (
    COLUMNS,
    Segment,
    Trace,
    load_segments,
    load_trace,
    segments_path,
)
from thermoe_env.calibration.validation import WARM_UP, validate_twin
from thermoe_env.device.free_run import STATE, free_run, thermal_vector
from thermoe_env.device.parameters import TwinParams, load_twin, save_twin
from thermoe_env.errors import ScenarioError, TraceFormatError

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
        cells = {"t": f"{0.1 * i:.1f}", "energy_mj": str(1000 + 12000 * i), "util": "0", "reasons": "0"}
        cells |= dict.fromkeys(("temp_c", "mem_temp_c"), "40") | dict.fromkeys(("sm_mhz", "mem_mhz"), "1980")
        cells |= dict.fromkeys(("power_w", "power_inst_w"), "120")
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
        (
            "timestamp, index, temperature.gpu, power.draw [W]\n",
            "nvidia-smi",
            "record with",
        ),
        ("time,gpu,DCGM_FI_DEV_GPU_TEMP\n", "DCGM", "at 10 Hz or more"),
        (_rows(energy_mj={9: "0"}), "row 11", "energy_mj"),
        (_rows(energy_mj={i: "13000" for i in range(1, 40)}), "row 24", "frozen"),
        (
            _rows(energy_mj={i: str(10**8 + 12000 * i) for i in range(20, 40)}),
            "row 22",
            "energy_mj: the counter jumped",
        ),
        (
            _rows(
                t={i: f"{0.5 * i:.1f}" for i in range(40)}, energy_mj={i: str(1 + 60 * i) for i in range(40)}
            ),
            "energy_mj",
            "is it in mJ",
        ),
        (_rows(temp_c={5: "0"}), "row 7", "temp_c is 0"),
        (_rows(temp_c={5: "255"}), "row 7", "temp_c is 255"),
        (_rows(mem_temp_c={5: "0"}), "row 7", "mem_temp_c is 0"),
        (_rows(mem_temp_c={39: "4294967295"}), "row 41", "mem_temp_c is 4.29"),
        (_rows(sm_mhz={5: "0"}), "row 7", "sm_mhz is 0"),
        (_rows(power_w={5: "0"}), "row 7", "power_w is 0"),
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


def test_a_byte_order_mark_and_spaces_in_the_header_are_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "marked_telemetry.csv"
    path.write_text("\ufeff" + _rows().replace(",", ", ").replace("\n", "\r\n"), encoding="utf-8")
    assert load_trace(path).temp_c.tolist() == [40.0] * 40


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
    head = "phase,t0,t1,k,tokens,duty,steps,mean_lat_ms\n"
    for rows, match in [
        ("step,0,5,1,64,1,9,1\nidle,4,8,0,0,1,0,0\n", "row 3: t0"),
        ("step,5,5,1,64,1,9,1\n", "row 2: t1"),
        ("step,0,5,1,64,2,9,1\n", "row 2: work needs"),
        ("step,0,5,0,64,1,9,1\n", "row 2: work needs"),
    ]:
        path.write_text(head + rows)
        with pytest.raises(TraceFormatError, match=match):
            load_segments(path)


# ---------------------------------------------------------------- fit


def test_fit_recovers_a_known_device(tmp_path: Path, shipped: TwinParams) -> None:
    true = dataclasses.replace(
        shipped,
        r_die_c_per_w=0.018,
        r_spreader_c_per_w=0.012,
        tau_spreader_s=5.0,
        r_sink_c_per_w=0.024,
        tau_sink_s=45.0,
        r_fan_c_per_w=-0.008,
        tau_fan_s=150.0,
        r_stack_c_per_w=0.012,
        r_mem_c_per_w=0.02,
        tau_mem_s=2.0,
        mem_offset_c=3.0,
        inlet_c=27.0,
        leakage_per_c=0.005,
    )
    paths = [write_trace(tmp_path / f"{seed}.csv", simulate(true, 500, seed)) for seed in (3, 4)]
    twin = fit_twin([load_trace(path) for path in paths], INFO)
    for name in ("r_die_c_per_w", "r_spreader_c_per_w", "r_sink_c_per_w", "tau_sink_s", "r_mem_c_per_w"):
        assert getattr(twin, name) == pytest.approx(getattr(true, name), rel=0.2), name
    for name in ("tau_spreader_s", "tau_mem_s", "r_stack_c_per_w"):
        assert getattr(twin, name) == pytest.approx(getattr(true, name), rel=0.35), name

    def at_power(device: TwinParams, seconds: int) -> float:
        return free_run(np.full(seconds, 500.0), 1.0, np.zeros(len(STATE)), thermal_vector(device))[0][-1, 0]

    for seconds in (1, 10, 60, 300):  # single constants trade off, what they do together is determined
        assert at_power(twin, seconds) == pytest.approx(at_power(true, seconds), abs=1.0)
    at_reference = true.idle_power_w * (
        1 + true.leakage_per_c * (twin.idle_reference_c - true.idle_reference_c)
    )
    assert twin.idle_power_w == pytest.approx(at_reference, rel=0.01)
    assert twin.leakage_per_c == pytest.approx(true.leakage_per_c, rel=0.1)
    assert twin.low_clock_power_w == pytest.approx(true.low_clock_power_w, abs=0.5)
    # Whole degrees alone stand between truth and sensor, for fits that have not seen what they are judged on.
    for errors in twin.provenance["held_out"]:
        assert errors["temp_rmse_c"]["60"] < 0.5 and errors["mem_temp_rmse_c"]["60"] < 0.5


def test_fit_beats_persistence_on_the_rest_of_the_recorded_trace(cut: Trace) -> None:
    [errors] = fit_twin([cut], INFO).provenance["held_out"]
    for h in ("10", "60"):
        assert errors["temp_rmse_c"][h] < 0.6 * errors["persistence_rmse_c"][h]
        assert errors["mem_temp_rmse_c"][h] < 0.7 * errors["mem_persistence_rmse_c"][h]


def test_the_shipped_twin_is_the_fit_of_the_shipped_traces(shipped: TwinParams) -> None:
    traces = [load_trace(RECORDED.parent / source["file"]) for source in shipped.provenance["traces"]]
    assert [t.sha256 for t in traces] == [source["sha256"] for source in shipped.provenance["traces"]]
    beside = [segments_path(t.path) for t in traces]
    loads = [load_segments(path) if path.is_file() else None for path in beside]
    again = fit_twin(traces, load_driver_info(driver_info_path(traces[0].path)), loads, judge=False)
    for name in ("idle_power_w", "leakage_per_c", "power_cap_w", "r_die_c_per_w", "r_sink_c_per_w"):
        assert getattr(again, name) == pytest.approx(getattr(shipped, name), rel=0.03), name
    assert again.loads.keys() == shipped.loads.keys()


def test_the_shipped_twin_meets_its_claim_on_traces_that_it_was_not_fitted_to(shipped: TwinParams) -> None:
    """Each shipped trace, by a fit to the others, as the file says: far below persistence."""
    held = shipped.provenance["held_out"]
    assert len(held) == len(shipped.provenance["traces"]) >= 2
    for errors in held:
        for h in ("1", "10", "60", "180"):
            assert errors["temp_rmse_c"][h] < 0.45 * errors["persistence_rmse_c"][h]


def test_the_shipped_twin_forecasts_a_card_that_it_never_saw(shipped: TwinParams) -> None:
    trace = load_trace(ROOT / "benchmarks/traces/h100_service_b_telemetry.csv")
    assert trace.sha256 not in {source["sha256"] for source in shipped.provenance["traces"]}
    errors = validate_twin(trace.intervals(), shipped)
    for h, aim_c in (("1", 0.45), ("10", 0.75), ("60", 1.3), ("180", 1.6)):
        rmse_c, stays_c = errors.temp_rmse_c[h], errors.persistence_rmse_c[h]
        assert rmse_c is not None and stays_c is not None
        assert rmse_c < aim_c and rmse_c < stays_c


@pytest.mark.parametrize("nothing", ["", "0", "0.0", "[N/A]"])
def test_a_column_that_says_nothing_is_a_sensor_that_is_not_there(tmp_path: Path, nothing: str) -> None:
    path = tmp_path / "bare_telemetry.csv"
    path.write_text(_rows(mem_temp_c=dict.fromkeys(range(40), nothing)))
    assert np.isnan(load_trace(path).mem_temp_c).all()
    path.write_text(_rows(temp_c=dict.fromkeys(range(40), nothing)))
    with pytest.raises(TraceFormatError, match="temp_c"):
        load_trace(path)


def test_a_die_is_fitted_without_the_temperature_of_its_memory(
    cut: Trace, shipped: TwinParams, tmp_path: Path
) -> None:
    whole = fit_twin([cut], INFO, judge=False)
    bare = dataclasses.replace(cut, mem_temp_c=np.full_like(cut.mem_temp_c, np.nan))
    alone = fit_twin([bare], INFO, judge=False)
    assert alone.provenance["missing"] == ["mem_temp_c"] and whole.provenance["missing"] == []
    assert {"r_stack_c_per_w", "r_mem_c_per_w", "tau_mem_s", "mem_offset_c"} <= set(
        alone.provenance["left_to_the_prior"]
    )
    assert alone.r_die_c_per_w == pytest.approx(whole.r_die_c_per_w, rel=0.1)
    assert alone.r_sink_c_per_w == pytest.approx(whole.r_sink_c_per_w, rel=0.15)
    errors, plain = validate_twin(bare.intervals(), shipped), validate_twin(cut.intervals(), shipped)
    assert set(errors.mem_temp_rmse_c.values()) == {None}
    assert errors.temp_rmse_c["1"] == pytest.approx(plain.temp_rmse_c["1"], abs=0.1)


def test_a_card_without_a_memory_sensor_needs_no_memory_limit(tmp_path: Path) -> None:
    raw = json.loads((RECORDED.parent / "h100_steps_nvml_info.json").read_text())
    del raw["thr_MEM_MAX"]
    path = tmp_path / "info.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(TraceFormatError, match="thr_MEM_MAX must be a number"):
        load_driver_info(path)
    path.write_text(json.dumps(raw | {"missing": ["mem_temp_c"]}))
    assert load_driver_info(path).mem_limit_c == load_driver_info(path).shutdown_c
    path.write_text(json.dumps(raw | {"missing": "mem_temp_c"}))
    with pytest.raises(TraceFormatError, match="list of names"):
        load_driver_info(path)


def test_a_trace_too_short_to_judge_is_refused(shipped: TwinParams, cut: Trace) -> None:
    with pytest.raises(TraceFormatError, match="59 s are too short"):
        validate_twin(cut.intervals().until(59), shipped)


def test_traces_without_what_the_fit_needs_are_refused(tmp_path: Path, shipped: TwinParams) -> None:
    columns = simulate(shipped, 120, seed=1)
    rows = len(columns["t"])

    def fit_of(**changes: np.ndarray) -> None:
        fit_twin([load_trace(write_trace(tmp_path / "bad.csv", {**columns, **changes}))], INFO, judge=False)

    with pytest.raises(TraceFormatError, match="idling"):
        fit_of(util=np.full(rows, 50.0))
    with pytest.raises(TraceFormatError, match="low clock"):
        fit_of(sm_mhz=np.full(rows, 1980.0))
    with pytest.raises(TraceFormatError, match="another card"):
        fit_of(temp_c=np.full(rows, 40.0))
    steady = {"energy_mj": 12e3 * np.floor(columns["t"] * 10.0) / 1.0, "temp_c": np.full(rows, 40.0)}
    steady |= dict.fromkeys(("power_w", "power_inst_w"), np.full(rows, 120.0))
    with pytest.raises(TraceFormatError, match=r"do not determine .*tau_sink_s: record steps"):
        fit_of(**steady, mem_temp_c=np.full(rows, 41.0))
    with pytest.raises(TraceFormatError, match="too short"):
        short = {name: values[:1000] for name, values in columns.items()}
        fit_twin([load_trace(write_trace(tmp_path / "short.csv", short))], INFO, judge=False)


def test_power_of_a_known_load_is_predicted_from_its_record(tmp_path: Path, shipped: TwinParams) -> None:
    """Steps that cost 5 J above idle each: 150, 300 and 500 W are 30, 60 and 100 of them a second."""
    columns = simulate(shipped, 300, seed=5)
    work = np.array([0.0, 150.0, 300.0, 500.0])
    above = columns["power_w"] - shipped.idle_power_w
    segments = []
    for begin in range(20, 300, 20):
        middle = above[round((begin + 10.0) * 20)]
        level = int(np.argmin(np.abs(work - middle)))
        rate = work[level] / 5.0
        segments.append(
            Segment(
                phase="made", t0=begin, t1=begin + 20.0, k=1.0, tokens=64.0 if level else 0.0,
                duty=rate / 100.0 if level else 1.0, steps=rate * 20.0, mean_latency_s=0.01,
            )
        )  # fmt: skip
    path = write_trace(tmp_path / "load_telemetry.csv", columns)
    twin = fit_twin([load_trace(path)], INFO, [segments], judge=False)
    [[k, tokens, energy_j, latency_s, _]] = twin.loads["unnamed"]
    assert (k, tokens) == (1.0, 64.0) and latency_s == pytest.approx(0.01)
    assert energy_j == pytest.approx(5.0, rel=0.02)
    errors = validate_twin(load_trace(path).intervals(), twin, segments).power
    assert errors is not None and errors.power_mape < 0.02
    assert abs(errors.energy_error) < 0.01 and abs(errors.throughput_error) < 1e-6
    strange = [dataclasses.replace(segments[1], load="another")]
    with pytest.raises(TraceFormatError, match=r"knows the loads \['unnamed'\], not 'another'"):
        validate_twin(load_trace(path).intervals(), twin, strange)
    with pytest.raises(TraceFormatError, match="at k=3"):
        validate_twin(
            load_trace(path).intervals(), twin, [dataclasses.replace(segments[0], k=3.0, tokens=64.0)]
        )


@given(seconds=st.floats(240.0, 2000.0), seed=st.integers(0, 2**31))
def test_an_excitation_fills_its_time_and_shows_every_load(seconds: float, seed: int) -> None:
    levels = list(schedule(seconds, seed))
    assert sum(level.seconds for level in levels) == pytest.approx(seconds)
    assert {(level.top_k, level.tokens) for level in levels if level.phase == "grid"} == {
        (k, n) for k in TOP_K for n in TOKENS
    }
    assert levels == list(schedule(seconds, seed))
    full = [i for i, level in enumerate(levels) if level.phase == "hold" and level.duty == 1.0]
    assert levels[full[0] + 1].tokens == 0, "leakage shows while the die cools after full load"


# ---------------------------------------------------------------- files and commands


def test_twin_files_are_strict(tmp_path: Path, shipped: TwinParams) -> None:
    path = tmp_path / "folder" / "twin.yaml"
    save_twin(shipped, path)
    assert load_twin(path) == shipped
    assert list(path.parent.iterdir()) == [path]
    raw = yaml.safe_load(path.read_text())
    for bad, match in [
        (raw | {"r_dye_c_per_w": 1.0}, "r_dye_c_per_w: is not known; known keys.*r_die_c_per_w"),
        ({k: v for k, v in raw.items() if k != "inlet_c"}, "inlet_c: is missing"),
        (raw | {"tau_sink_s": -1.0}, "tau_sink_s: .*greater than or equal to 0.001, got -1.0"),
        (raw | {"tau_sink_s": "warm"}, "tau_sink_s: .*valid number.*'warm'"),
        (raw | {"idle_power_w": float("nan")}, "idle_power_w: .*finite number, got nan"),
        (raw | {"power_cap_w": 100.0}, "idle_power_w < power_cap_w"),
        (raw | {"tau_spreader_s": 500.0}, "tau_spreader_s <= tau_sink_s <= tau_fan_s"),
        (raw | {"r_fan_c_per_w": 0.01}, "r_fan_c_per_w: .*less than or equal to 0, got 0.01"),
        (raw | {"r_fan_c_per_w": -1.0}, "r_fan_c_per_w must leave a rise of r_die_c_per_w"),
        (raw | {"r_sink_c_per_w": 1.0}, r"power_cap_w \* \(r_die_c_per_w .* at most 500 degC, got 719"),
        (raw | {"idle_power_w": 600.0, "leakage_per_c": 0.05}, "leakage_per_c .*heats itself without end"),
        (raw | {"leakage_per_c": 0.06}, "leakage_per_c must leave idle power at inlet_c - 6"),
        (raw | {"low_clock_mhz": 3000.0}, "low_clock_mhz must lie below"),
        (raw | {"loads": {"mine": [[1.0, 2.0]]}}, r"loads\.mine\.0: .*at least 5 items"),
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
        "import sys; from thermoe_env.device.parameters import load_twin; load_twin(sys.argv[1]); "
        "print([m for m in ('numba', 'torch', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SHIPPED)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_commands(
    tmp_path: Path, cut_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, args)])
        calibrate.main()
        return capsys.readouterr().out

    info = RECORDED.parent / "h100_steps_nvml_info.json"
    out = tmp_path / "mine.yaml"
    assert str(out) in run("fit", cut_path, "--nvml-info", info, "--out", out)
    assert load_twin(out).gpu == INFO.name
    answer = json.loads(run("validate", cut_path, "--twin", out, "--json"))
    assert answer["trace_was_fitted"] is True
    assert set(answer["temp_rmse_c"]) == {"1", "10", "60", "180"}
    assert answer["restarts"]["1"] == len(load_trace(cut_path).intervals()) - WARM_UP - 1
    assert "very trace" not in run("validate", cut_path, "--twin", "h100")
    with pytest.raises(SystemExit, match="no twin 'a100'"):
        run("validate", cut_path, "--twin", "a100")
    with pytest.raises(SystemExit, match="nvml-info"):
        run("fit", cut_path)
