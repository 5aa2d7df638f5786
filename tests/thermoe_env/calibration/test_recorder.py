"""The recorder as it runs, in a process of its own, on a fake library in place of `pynvml`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from thermoe_env.calibration import command as calibrate
from thermoe_env.calibration.driver_info import driver_info_path, load_driver_info
from thermoe_env.calibration.recorder import Recorder, RecorderError
from thermoe_env.calibration.traces import load_trace

ROOT = Path(__file__).parents[3]
PYNVML = '''
"""500 W by the process's own clock; lost after LOST_AFTER calls."""
import os, sys, time
from tests.moe.device.fake_nvml import FakeNvml

class Drawing(FakeNvml):
    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._answer("energy", round(self.power_w * 1e3 * time.perf_counter()))

fake = Drawing("recorded")
fake.fail_after = int(os.environ.get("LOST_AFTER", 10**9))
_nvmlGetFunctionPointer = None

def __getattr__(name):
    return getattr(fake, name)
'''


@pytest.fixture(autouse=True)
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "pynvml.py").write_text(PYNVML)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_trace_shares_the_clock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine_telemetry.csv"
    with Recorder(path, "recorded") as recorder:
        entered_s = recorder.now_s
        time.sleep(1.2)
        left_s = recorder.now_s
    trace, info = load_trace(path), load_driver_info(driver_info_path(path))
    assert entered_s - 0.2 < trace.t[0] < entered_s + 0.5 and left_s - 0.2 < trace.t[-1] < left_s + 0.3
    assert 0.7 * 20 * 1.2 < len(trace.t) < 1.3 * 20 * 1.2
    assert (trace.mem_temp_c[0], trace.reasons[0], info.name) == (44, 4, "Fake H100")
    # The counter runs on CLOCK_MONOTONIC from its own zero: the trace's zero is where the parent says.
    zero_s = trace.energy_mj / 500e3 - trace.t
    np.testing.assert_allclose(zero_s, recorder.start_s, atol=0.1)
    assert float(np.median(np.abs(zero_s - recorder.start_s))) < 2e-3


def test_the_command_records_what_a_fit_can_read(tmp_path: Path) -> None:
    path = tmp_path / "mine_telemetry.csv"
    calibrate.record(path, seconds=4.0, load=False)  # on a busy machine the recorder starts late
    assert load_trace(path).intervals(0.2).power_w == pytest.approx(500.0, rel=0.05)


def test_a_card_without_memory_temperature_and_counter_is_recorded_and_says_so(tmp_path: Path) -> None:
    lies = tmp_path / "library" / "pynvml.py"
    lies.write_text(
        lies.read_text()
        + "\nfake.fields[82] = {'nvmlReturn': 3}"
        + "\nfake.lies |= {'energy': fake.NVMLError(3), 'MEM_MAX': fake.NVMLError(3)}"
    )
    path = tmp_path / "mine_telemetry.csv"
    calibrate.record(path, seconds=4.0, load=False)
    trace, info = load_trace(path), load_driver_info(driver_info_path(path))
    assert np.isnan(trace.mem_temp_c).all() and set(info.missing) == {"mem_temp_c", "energy_j"}
    assert info.mem_limit_c == info.shutdown_c == 95.0  # what is not known slows nobody down
    assert trace.intervals(0.2).power_w == pytest.approx(500.0, rel=0.05)


def test_a_counter_that_stands_still_ends_the_recording(tmp_path: Path) -> None:
    lies = tmp_path / "library" / "pynvml.py"
    lies.write_text(lies.read_text() + "\nfake.lies['energy'] = 5_000_000")
    with pytest.raises(RecorderError, match=r"ReadingError.*the board reports 500 W"):
        calibrate.record(tmp_path / "mine_telemetry.csv", seconds=4.0, load=False)


def test_a_card_that_is_lost_is_told_to_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOST_AFTER", "70")
    path = tmp_path / "mine_telemetry.csv"
    with pytest.raises(RecorderError, match=r"GpuLostError.*GPU is lost"), Recorder(path, "recorded"):
        time.sleep(1.0)
    assert len(load_trace(path).t) > 3  # what was written stays
    with pytest.raises(RecorderError, match="lost"), Recorder(path, "recorded") as recorder:
        while True:
            recorder.check()
            time.sleep(0.05)
    with pytest.raises(KeyError) as own, Recorder(path, "recorded"):  # the body's own error is not hidden
        time.sleep(1.0)
        raise KeyError
    assert "GPU is lost" in own.value.__notes__[0]


def test_no_card_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOST_AFTER", "0")
    with (
        pytest.raises(RecorderError, match="GpuUnavailableError"),
        Recorder(tmp_path / "a_telemetry.csv", "recorded"),
    ):
        raise AssertionError("the body must not run")


def test_the_recorder_ends_with_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "orphan_telemetry.csv"
    code = (
        "import sys, time; from thermoe_env.calibration.recorder import Recorder\n"
        "with Recorder(sys.argv[1], 'recorded') as r: print(r._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the recorder outlived its parent")
