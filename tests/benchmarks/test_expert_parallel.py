"""The benchmark of several devices: its statistics by hand, and a short run of two processes."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.expert_parallel_report import interval, summarise

ROOT = Path(__file__).parents[2]


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found is not None
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(0.975, 4)
    assert (found["mean"], found["repeats"]) == (3.0, 5)
    assert found["low"] == pytest.approx(3.0 - half, rel=1e-6)
    assert found["high"] == pytest.approx(3.0 + half, rel=1e-6)
    assert interval([2.0]) == {"mean": 2.0, "repeats": 1}
    assert interval([1.0, math.nan]) is None


def test_summary_by_hand() -> None:
    """The step takes as long as its slowest device, energies of the devices add up."""
    conditions = [{"signal": [0.0, 1.0], "routing_bias": 0.5}]
    windows = [
        {"repeat": r, "condition": 0, "device": d, "latency_s": latency_s, "power_w": 100.0 * (d + 1),
         "energy_j_per_answer": 0.25 * (d + 1), "temperature_c": 40.0}
        for r, d, latency_s in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.5), (1, 1, 0.2))
    ]  # fmt: skip
    (found,) = summarise(conditions, windows)
    assert found["latency_s"]["mean"] == pytest.approx(0.4)
    assert found["energy_j_per_answer"]["mean"] == 0.75
    assert [device["power_w"]["mean"] for device in found["devices"]] == [100.0, 200.0]


@pytest.mark.slow  # what the processes do together is tested with fewer of them around (test_distributed)
def test_a_short_run_of_two_processes(tmp_path: Path) -> None:
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "benchmarks.expert_parallel", "--device", "cpu", "--out", str(tmp_path), "--images", "64",
        "--batch-size", "16", "--window-s", "0.01", "--repeats", "2", "--biases", "0", "1",
        "--device-signals", "0", "0", "0", "1",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    with (tmp_path / "windows.csv").open() as file:
        windows = list(csv.DictReader(file))
    assert len(windows) == 2 * 4 * 2  # repeats, conditions, devices
    assert {window["power_w"] for window in windows} == {
        ""
    }  # a CPU has no meter: nothing is put in its place
    assert (tmp_path / "figure.png").stat().st_size > 0
    found = {(tuple(c["signal"]), c["routing_bias"]): c for c in summary["conditions"]}
    unbiased = found[(0.0, 0.0), 0.0]
    for condition in found.values():
        assert sum(condition["tokens_share"]) == pytest.approx(1.0)
        assert condition["latency_s"]["repeats"] == 2
        assert condition["energy_j_per_answer"] is None
    for key in (((0.0, 0.0), 1.0), ((0.0, 1.0), 0.0)):  # no heat, or no bias: nothing moves
        assert found[key]["tokens_share"] == unbiased["tokens_share"]
        assert found[key]["quality"] == unbiased["quality"]
    assert found[(0.0, 1.0), 1.0]["tokens_share"][1] < 0.5 * unbiased["tokens_share"][1]
