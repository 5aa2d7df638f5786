"""What each phase of a stream costs: device time on every device, energy where there is a meter.

The energy counter ticks every 100 ms, a phase lasts milliseconds. So the power of each phase is measured
beforehand under loads that last, and the energy of a phase in the stream is its time by that power. The
counter's own total around each stream tells how well that adds up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe.device.base import PERIOD_S
from moe.device.meter import EnergyMeter

PHASES: tuple[str, ...] = ("serve", "adapt_forward", "adapt_update", "guard", "host")
"""Answering a batch; forward passes of adaptation; its loss, backward pass and step; judging, checking and
copying for rollbacks; and what lies between, when the device waits for the host."""
SERVE, FORWARD, UPDATE, GUARD, HOST = PHASES
ADAPTING = (FORWARD, UPDATE, GUARD)
WARM_S = 0.2
"""Load before a window opens: the counter follows power within about this time."""


class PhaseClock:
    """Device time by phase: from each `enter` to the next one.

    CUDA is timed by events in the stream of kernels, which make nobody wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """End the phase before and begin another."""
        self._marks.append((phase, self._now()))

    def wait(self) -> None:
        """Let the host wait until the device is done, in the present phase."""
        if self._cuda:
            torch.cuda.synchronize()

    def stop(self) -> dict[str, float]:
        """End the last phase, wait for the device and return the seconds of all; the clock is then as new."""
        end = self._now()
        if self._cuda:
            end.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, stop) in itertools.pairwise([*self._marks, ("", end)]):
            seconds[phase] += start.elapsed_time(stop) / 1e3 if self._cuda else stop - start
        self._marks.clear()
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class PhasePower:
    """Mean power of each phase, and the measurements it follows from.

    Attributes:
        power_w: By phase.
        seconds: Time of each phase under each load, `PHASES` in order.  # [loads, phases]
        energy_j: Of each load.  # [loads]
    """

    power_w: dict[str, float]
    seconds: list[list[float]]
    energy_j: list[float]


def measure_power(
    meter: EnergyMeter, clock: PhaseClock, loads: list[Callable[[], object]], window_s: float
) -> PhasePower:
    """Measure the power of each phase from loads that mix them in different shares.

    Each load runs from tick to tick for about `window_s`. Its energy is the sum over phases of time by power:
    as many equations as phases.

    Args:
        meter: Of the device.
        clock: That the loads enter their phases on; each ends in `HOST`.
        loads: One per phase of `PHASES`, each mostly of that phase.
        window_s: Time under each load.
    """
    seconds, energy_j = [], []
    for load in loads:
        until = time.perf_counter() + WARM_S
        while time.perf_counter() < until:
            load()
        start = meter.next_tick(load)
        clock.stop()
        clock.enter(HOST)
        end = meter.next_tick(load, start.time_s + (max(1, round(window_s / PERIOD_S)) - 0.5) * PERIOD_S)
        own = clock.stop()
        seconds.append([own[phase] for phase in PHASES])
        energy_j.append(end.energy_j - start.energy_j)
    return PhasePower(solve_power(seconds, energy_j), seconds, energy_j)


def solve_power(seconds: list[list[float]], energy_j: list[float]) -> dict[str, float]:
    """Power of each phase, from the time of the phases under each load and the load's energy.

    Args:
        seconds: By load and phase, `PHASES` in order.  # [loads, phases]
        energy_j: By load.  # [loads]

    Raises:
        ArithmeticError: The loads do not tell the phases apart, or a power comes out negative.
    """
    matrix = np.array(seconds)
    if np.linalg.matrix_rank(matrix) < len(PHASES):
        raise ArithmeticError(f"the loads do not tell the phases {PHASES} apart: {seconds} s")
    power_w = dict(zip(PHASES, np.linalg.lstsq(matrix, np.array(energy_j))[0].tolist(), strict=True))
    if min(power_w.values()) <= 0.0:
        raise ArithmeticError(
            f"power of a phase came out negative ({power_w} W): something else used the device, or the "
            "windows are too short; give the device to the study alone, or a longer window_s"
        )
    return power_w


def energy_around(meter: EnergyMeter, work: Callable[[], object], rest_w: float) -> float:
    """Energy of some work by the counter, in J: from a tick to the first one after it, less the rest between.

    Args:
        meter: Of the device.
        work: What is measured; it must leave the device with nothing to do.
        rest_w: Power while the device waits, until the last tick.
    """
    start = meter.next_tick(lambda: time.sleep(1e-3))
    work()
    done_s = time.perf_counter()
    end = meter.next_tick(lambda: time.sleep(1e-3))
    return end.energy_j - start.energy_j - rest_w * (end.time_s - done_s)
