"""Modelled energy for a live workload on a machine without a meter.

The work is real and so is its time; what a data-centre card would have drawn while as busy with work of
the same kind comes from that card's profile. Results are simulated energies of measured work.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe.service.queueing import SLOT_S
from moe.workload import Knobs, Workload, WorkStats
from thermoe_env.problem.problem import Problem


class Shadow:
    """A `Workload` on one device that adds modelled slot energies to the one it wraps."""

    def __init__(self, workload: Workload, problem: Problem) -> None:
        self._workload, self._problem = workload, problem

    def reset(self, seed: int) -> None:
        """Reset the wrapped workload."""
        self._workload.reset(seed)

    def run(
        self, knobs: Knobs, duration_s: float, open_classes: int = 2, promised_tpot_s: float | None = None
    ) -> WorkStats:
        """Run the wrapped workload and model the energy of its busy time, spread evenly."""
        stats = self._workload.run(knobs, duration_s, open_classes, promised_tpot_s)
        profile = self._problem.power_profile
        batch = max(1.0, stats.batch_fill * knobs.batch_size) * self._problem.batch_scale
        power = profile.active_power_w(batch, knobs.expert_count, knobs.routing_bias)
        slots = round(duration_s / SLOT_S)
        energy = np.full((slots, 1), power * min(stats.busy_s, duration_s) / slots)
        return replace(stats, slot_energy_j=energy, device_clock=np.full(1, stats.sm_clock))

    def close(self) -> None:
        """Close the wrapped workload."""
        self._workload.close()
