"""The energy meter of a CUDA device: windows from tick to tick of the card's energy counter.

The counter advances about every 100 ms and a read takes milliseconds, so energy is known exactly only at
ticks. A measurement therefore runs from tick to tick while the load goes on. A card without a counter
ticks at every reading (`moe.device.integral`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moe.device.base import AVERAGE_S, PERIOD_S, Tick, check_energy
from moe.device.nvml import Gpu
from moe.device.torch_device import uuid_of
from moe.errors import ReadingError

TIMEOUT_S = 2.0


class EnergyMeter:
    """Energy of one card between ticks of its counter."""

    def __init__(self, gpu: Gpu) -> None:
        """Measure with the sensors of `gpu`."""
        self.gpu = gpu
        self._last = self._compared = gpu.energy()

    def next_tick(self, between: Callable[[], object], not_before_s: float = 0.0) -> Tick:
        """Wait for the counter to tick.

        Args:
            between: called over and over meanwhile; it keeps the device loaded, or sleeps.
            not_before_s: `time.perf_counter()` before which the counter is not read: reads cost milliseconds.

        Raises:
            GpuLostError: the device stopped answering.
            ReadingError: the counter stands still, or says what the board cannot have used.
        """
        while time.perf_counter() < not_before_s:
            between()
        first = tick = self.gpu.energy()
        while tick.energy_j == first.energy_j:
            if tick.time_s - first.time_s > TIMEOUT_S:
                raise ReadingError(
                    f"{self.gpu.name}: energy_j stood still for {TIMEOUT_S:g} s; reload the driver"
                )
            between()
            tick = self.gpu.energy()
        self._check(tick)
        return tick

    def window(self, between: Callable[[], object], seconds: float) -> tuple[Tick, Tick]:
        """Measure from tick to tick over about `seconds`, a whole number of the counter's periods.

        Args:
            between: as in `next_tick`.
            seconds: length of the window.
        """
        start = self.next_tick(between)
        periods = max(1, round(seconds / PERIOD_S))
        return start, self.next_tick(between, start.time_s + (periods - 0.5) * PERIOD_S)

    def per_run(self, run: Callable[[], object], seconds: float) -> tuple[float, float]:
        """Measure something that is run over and over for about `seconds`: joules and seconds of one run.

        Args:
            run: it waits for the device, or runs would lie ahead of the ticks.
            seconds: as in `window`.
        """
        ended_s: list[float] = []

        def timed() -> None:
            run()
            ended_s.append(time.perf_counter())

        start, end = self.window(timed, seconds)
        runs = sum(start.time_s < time_s <= end.time_s for time_s in ended_s)
        return (end.energy_j - start.energy_j) / runs, (end.time_s - start.time_s) / runs

    def _check(self, tick: Tick) -> None:
        """Compare with the tick before, and at most once a second with the board's own average."""
        last, self._last = self._last, tick
        check_energy(self.gpu, tick.energy_j - last.energy_j, tick.time_s - last.time_s)
        elapsed_s = tick.time_s - self._compared.time_s
        if elapsed_s >= AVERAGE_S:
            check_energy(self.gpu, tick.energy_j - self._compared.energy_j, elapsed_s, self.gpu.power_w())
            self._compared = tick


def open_meter(device: torch.device) -> EnergyMeter | None:
    """Open the device's meter; None on a CPU, which has none.

    Raises:
        GpuUnavailableError: the device is a CUDA device that NVML does not read.
        ReadingError: its first reading cannot be.
    """
    return EnergyMeter(Gpu(uuid_of(device))) if device.type == "cuda" else None
