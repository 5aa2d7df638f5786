"""Recording a telemetry trace beside whatever loads the GPU, from a process of its own.

NVML's energy counter takes milliseconds to read, so the process that serves must not sample it at 20 Hz. The
recorder is a plain subprocess: it imports no CUDA and nothing of the program that starts it, writes row by
row, and ends when its standard input closes, which the end of its parent does as well, however it ends.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from moe.device.base import AVERAGE_S, Tick, check_energy
from moe.device.nvml import Gpu
from moe.errors import one_line_errors
from thermoe_env.calibration.driver_info import driver_info_path
from thermoe_env.calibration.traces import COLUMNS
from thermoe_env.errors import ThermoeError

SAMPLES_PER_S = 20.0
_READY = "recording\n"
_STOP_WITHIN_S = 5.0


class RecorderError(ThermoeError):
    """The recording process failed; the message repeats what it said, and rows written so far are kept."""


class Recorder:
    """Context manager that records a trace while its body runs.

    The trace's time is `time.perf_counter()` less `start_s`, in this process and in the recorder's alike, so
    `now_s` names moments of the trace, such as the limits of its segments.
    """

    def __init__(self, path: str | Path, uuid: str, samples_per_s: float = SAMPLES_PER_S) -> None:
        """Prepare a recording; it begins with the `with` block.

        Args:
            path: the trace, named `X_telemetry.csv`; X_nvml_info.json goes beside it.
            uuid: of the GPU.
            samples_per_s: rows per second; a fit needs 10 or more.
        """
        self.path = Path(path)
        self._arguments = (str(self.path.resolve()), uuid, repr(float(samples_per_s)))
        self._process: subprocess.Popen[str] | None = None
        self.start_s = math.nan
        """Reading of `time.perf_counter()` that is 0 in the trace."""

    @property
    def now_s(self) -> float:
        """Time of the trace, in s."""
        return time.perf_counter() - self.start_s

    def __enter__(self) -> Recorder:
        """Start the process and wait for its first row.

        Raises:
            RecorderError: it cannot start: no GPU, say, or a sensor is lacking.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.start_s = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "thermoe_env.calibration.recorder", *self._arguments, repr(self.start_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != _READY:
            self._end()
        return self

    def check(self) -> None:
        """Raise `RecorderError` if the process has failed."""
        if self._process is not None and self._process.poll() is not None:
            self._end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the recording.

        Raises:
            RecorderError: the process had failed; as a note on the error of the body, if that failed too.
        """
        try:
            self._end()
        except RecorderError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _end(self) -> None:
        """Close the process's input, wait for its end, and raise if it failed. May be called twice."""
        if self._process is None:
            return
        with self._process as process:
            self._process = None
            assert process.stdin is not None and process.stderr is not None
            process.stdin.close()
            try:
                process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
            said = process.stderr.read().strip()
        if process.returncode != 0:
            raise RecorderError(
                f"recording {self.path} ended with status {process.returncode}: {said or 'no reason given'}"
            )


def write_driver_info(gpu: Gpu, trace: Path) -> None:
    """Write what the driver says of the card beside a trace."""
    now = datetime.datetime.now(datetime.UTC)
    about = {
        "name": gpu.name,
        "driver": gpu.driver,
        "card": hashlib.sha256(gpu.uuid.encode()).hexdigest()[:12],  # tells cards apart, names none
        "measured_on": now.date().isoformat(),
        "started": now.isoformat(timespec="seconds"),
        "missing": list(gpu.missing),
        **gpu.limits(),
    }
    driver_info_path(trace).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_trace(
    gpu: Gpu, path: Path, start_s: float, samples_per_s: float, stopped: Callable[[float], bool]
) -> None:
    """Write a trace until told to stop.

    Args:
        gpu: whose sensors.
        path: the trace; each row is on disk when the next is read.
        start_s: reading of `time.perf_counter()` that is 0 in the trace.
        samples_per_s: rows per second; one that is delayed past the next one's time replaces it.
        stopped: waits for the given seconds; True ends the recording.

    Raises:
        GpuLostError: the device stopped answering.
        ReadingError: a sensor gave what cannot be, or energy that does not go with power.
    """
    compared = gpu.energy()
    with path.open("w", newline="", buffering=1, encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        while True:
            row = gpu.trace_row()
            read_s = time.perf_counter()
            now_s = read_s - start_s
            cells = ["" if math.isnan(row[name]) else row[name] for name in COLUMNS[1:]]
            writer.writerow([round(now_s, 4), *cells])
            tick = Tick(row["energy_mj"] / 1e3, read_s)
            elapsed_s = tick.time_s - compared.time_s
            if elapsed_s >= AVERAGE_S:
                used_j = tick.energy_j - compared.energy_j
                check_energy(gpu, used_j, elapsed_s, row["power_w"])
                compared = tick
            due_s = (round(now_s * samples_per_s) + 1) / samples_per_s
            if stopped(due_s - now_s):
                return


def _main(path: str, uuid: str, samples_per_s: str, start_s: str) -> None:
    """The recording process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end closes our input
    gpu = Gpu(uuid)
    try:
        write_driver_info(gpu, Path(path))
        ready = False

        def stopped(seconds: float) -> bool:
            nonlocal ready
            if not ready:  # the first row is on disk: what the parent does from here on lies in the trace
                print(_READY, end="", flush=True)
                ready = True
            return bool(select.select([sys.stdin], [], [], seconds)[0])

        write_trace(gpu, Path(path), float(start_s), float(samples_per_s), stopped)
    finally:
        gpu.close()


if __name__ == "__main__":
    with one_line_errors():
        _main(*sys.argv[1:])
