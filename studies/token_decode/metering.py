"""Time, power and energy of one operation under load, from tick to tick of the card's energy counter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch

from moe.device.meter import EnergyMeter

CHUNK_S, DEPTH = 0.004, 5
"""Operations go out in chunks of about this long, so many chunks ahead of the device."""
WINDOWS, WINDOW_S, WARM_S = 3, 0.3, 0.1
TIMED_S = 0.03
"""Length of a measurement of time alone."""
SAMPLE_S = 0.5
"""Between samples of a run under sustained load."""
TRACE = ("t_s", "temp_c", "power_w", "sm_mhz", "reasons")
"""Columns of its trace; reasons as NVML's bits."""


class Load:
    """Keeps the device busy with one operation, counts it, and never runs far ahead.

    Attributes:
        done: Operations sent.
    """

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        """Warm up `run`, which launches one operation, and see how long it takes."""
        self.run, self.cuda = run, device.type == "cuda"
        self.done = 0
        self._waiting: deque[torch.cuda.Event] = deque()
        run()
        self.sync()
        start = time.perf_counter()
        run()
        run()
        self.sync()
        self.chunk = max(1, round(2 * CHUNK_S / (time.perf_counter() - start)))

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self) -> None:
        """Send a chunk; wait where the device is far behind."""
        for _ in range(self.chunk):
            self.run()
        self.done += self.chunk
        if self.cuda:
            event = torch.cuda.Event()
            event.record()
            self._waiting.append(event)
            if len(self._waiting) > DEPTH:
                self._waiting.popleft().synchronize()

    def seconds_each(self, seconds: float) -> float:
        """Time of one operation, back to back over about `seconds`; by the device's clock on CUDA."""
        self.sync()
        n = max(3, round(seconds / CHUNK_S) * self.chunk)
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(n):
                self.run()
            return (time.perf_counter() - start) / n
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(n):
            self.run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / n


def measure(load: Load, meter: EnergyMeter | None, tokens: int) -> dict[str, float]:
    """Measure one operation.

    Args:
        load: of the operation.
        meter: of the card; None measures time alone.
        tokens: that one operation handles.

    Returns:
        `step_ms` (median of three) and its spread; with a meter `metered_ms`, `power_w`, `mj_per_token`
        (means of three windows), the spread of the last, and `temp_c` at the end.
    """
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        load()
    ms = [load.seconds_each(TIMED_S) * 1e3 for _ in range(3)]
    row = {"step_ms": round(median(ms), 4), "step_ms_spread": round(max(ms) - min(ms), 4)}
    if meter is None:
        return row
    power_w, metered_ms = [], []
    first = meter.next_tick(load)
    for _ in range(WINDOWS):  # windows share their ticks
        sent = load.done
        # Chunks in flight at either tick are alike, so their number cancels.
        last = meter.next_tick(load, first.time_s + WINDOW_S - 0.05)
        elapsed_s = last.time_s - first.time_s
        power_w.append((last.energy_j - first.energy_j) / elapsed_s)
        metered_ms.append(elapsed_s / (load.done - sent) * 1e3)
        first = last
    load.sync()
    mj = [power * ms / tokens for power, ms in zip(power_w, metered_ms, strict=True)]
    return row | {
        "metered_ms": round(mean(metered_ms), 4),
        "power_w": round(mean(power_w), 1),
        "mj_per_token": round(mean(mj), 4),
        "mj_spread": round(max(mj) - min(mj), 4),
        "temp_c": meter.gpu.temperature_c(),
    }


def sustained(load: Load, meter: EnergyMeter, seconds: float, tokens: int) -> dict[str, Any]:
    """Run for long and watch the card.

    Args:
        load: of the operation.
        meter: of the card.
        seconds: length.
        tokens: that one operation handles.

    Returns:
        `tokens_per_s`, `power_w` of the second half, the peak temperature, and the trace: rows of `TRACE`.
    """
    trace: list[list[float]] = []
    sent, start = load.done, time.perf_counter()
    while (t_s := time.perf_counter() - start) < seconds:
        if t_s >= len(trace) * SAMPLE_S:
            row = meter.gpu.trace_row()
            trace.append([round(t_s, 2), *(round(row[name], 1) for name in TRACE[1:])])
        load()
    load.sync()
    elapsed_s = time.perf_counter() - start
    return {
        "seconds": round(elapsed_s, 1),
        "tokens_per_s": round((load.done - sent) * tokens / elapsed_s),
        "power_w": round(mean(row[2] for row in trace[len(trace) // 2 :]), 1),
        "peak_temp_c": max(row[1] for row in trace),
        "trace": trace,
    }


def idle(meter: EnergyMeter) -> dict[str, float]:
    """Power over a second without load, and the temperature after it."""
    first, last = meter.window(lambda: time.sleep(0.01), 1.0)
    power_w = (last.energy_j - first.energy_j) / (last.time_s - first.time_s)
    return {"idle_w": round(power_w, 1), "idle_temp_c": meter.gpu.temperature_c()}
