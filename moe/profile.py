"""Measure a model here: ``python -m moe.profile --task vision --size tiny --device cpu --out PATH``.

The result is a `moe.profiles.Profile`. It is written whole at the end; an interrupted run writes nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from moe import data
from moe.config import Size, Task
from moe.meter import EnergyCounter, open_meter
from moe.profile_cost import (
    Cell,
    Costs,
    adaptation_cell,
    costs,
    fitting_batch_sizes,
    idle_power_w,
    measure_cells,
    serving_cells,
)
from moe.profile_quality import CURVE_STEPS, Quality, measure_quality
from moe.profiles import Profile, ProfileError, save_profile
from moe.runner import ADAPT_BATCH, Runner
from moe.samples import DEFAULT_SHIFTS, SamplePool
from moe.train import device_name
from moe.weights import load_model, weights_path

BATCH_SIZES: dict[tuple[str, str], tuple[int, ...]] = {
    ("vision", "tiny"): (1, 4, 16, 64, 256),
    ("language", "tiny"): (1, 4, 16, 64),
    ("vision", "base"): (32, 128, 512, 1024, 2048, 4096, 8192),
    ("language", "base"): (8, 64, 128, 256, 512, 1024),
}
"""A text chunk is eight times as many tokens as an image."""
SECONDS_PER_CELL = {"cpu": 0.15, "cuda": 0.8}
SCORED_SAMPLES = {"cpu": 2000, "cuda": 10_000}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and how long."""

    task: Task
    size: Size
    device: Literal["cpu", "cuda"]
    out: Path
    """Profile to write, such as configs/profiles/cpu-vision.json."""
    batch_sizes: tuple[int, ...] = ()
    """Ascending; default: by task and size. Those that do not fit into memory are left out."""
    expert_counts: tuple[int, ...] = ()
    """Default: those the model was trained for."""
    routing_biases: tuple[float, ...] = (0.0, 0.5, 1.0)
    shifts: tuple[str, ...] = ()
    """Input shifts, "clean" first; default: by task."""
    seconds_per_cell: float | None = None
    """Time under load per cell, over all repeats; default: 0.15 on a CPU, 0.8 on CUDA."""
    samples: int | None = None
    """Samples per quality score, at most the whole pool; default: 2000 on a CPU, 10000 on CUDA."""
    repeats: int = 2
    """Windows per cell, in random order; their difference is the spread."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be measured."""
        if self.repeats < 1 or (self.seconds_per_cell is not None and self.seconds_per_cell <= 0.0):
            raise ValueError(f"repeats and seconds_per_cell must be positive, got {self}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.batch_sizes and min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        if self.shifts and self.shifts[0] != "clean":
            raise ValueError(f'shifts must start with "clean", got {self.shifts}')


def measure(options: Options) -> Profile:
    """Load the model and measure it.

    Raises:
        ProfileError: not even the smallest batch fits.
        MeterUnavailableError: CUDA is used and NVML gives no energy.
    """
    began = time.monotonic()
    device = torch.device(options.device)
    meter = open_meter(device)
    cold_c = meter.temperature_c() if meter else None
    model = load_model(options.task, options.size, device)
    shifts = options.shifts or DEFAULT_SHIFTS[options.task]
    runner = Runner(model, SamplePool(options.task, shifts, device), device)
    expert_counts = sorted(options.expert_counts or model.config.top_k_choices)
    routing_biases = sorted(options.routing_biases)
    wanted = sorted(options.batch_sizes or BATCH_SIZES[options.task, options.size])
    batch_sizes = fitting_batch_sizes(runner, wanted, expert_counts)
    if not batch_sizes:
        raise ProfileError(
            f"not even {wanted[0]} requests fit into the memory of {device}; use a smaller model"
        )
    cells = serving_cells(batch_sizes, expert_counts, routing_biases)
    if runner.adapts:
        cells += sorted({adaptation_cell(n, k) for n in batch_sizes for k in expert_counts})
    idle_before_w = idle_power_w(meter) if meter else None
    samples = min(options.samples or SCORED_SAMPLES[options.device], len(runner.samples))
    seconds = options.seconds_per_cell or SECONDS_PER_CELL[options.device]
    visits = measure_cells(
        runner, cells, meter, seconds, options.repeats, np.random.default_rng(options.seed)
    )
    hot_c = meter.temperature_c() if meter else None
    idle_after_w = idle_power_w(meter) if meter else None
    quality = measure_quality(runner, expert_counts, routing_biases, samples, options.seed)
    idle_w = None if idle_before_w is None or idle_after_w is None else (idle_before_w + idle_after_w) / 2
    cost = {cell: costs(seen, idle_w or 0.0) for cell, seen in visits.items()}
    provenance = {
        **_machine(device, meter),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        "seconds_per_cell": seconds,
        "repeats": options.repeats,
        "samples": samples,
        "left_out_batch_sizes": [n for n in wanted if n not in batch_sizes],
        "spread": _spread(cost),
        "idle_power_w": {"before": idle_before_w, "after": idle_after_w},
        "temperature_c": {"start": cold_c, "end_of_load": hot_c},
        "adapt_batch": ADAPT_BATCH if runner.adapts else None,
        "adaptation_curve": {"steps": list(CURVE_STEPS), "accuracy": quality.curve.round(4).tolist()},
        "data": data.describe(options.task),
    }
    return _profile(
        options, runner, batch_sizes, expert_counts, routing_biases, cost, idle_w, quality, provenance
    )


def _profile(
    options: Options,
    runner: Runner,
    batch_sizes: list[int],
    expert_counts: list[int],
    routing_biases: list[float],
    cost: dict[Cell, Costs],
    idle_w: float | None,
    quality: Quality,
    provenance: dict[str, Any],
) -> Profile:
    served = [cost[cell] for cell in serving_cells(batch_sizes, expert_counts, routing_biases)]
    shape = (len(batch_sizes), len(expert_counts), len(routing_biases))
    ttt_latency_s = ttt_energy_j = None
    if runner.adapts:
        steps = [cost[adaptation_cell(n, k)] for n in batch_sizes for k in expert_counts]
        ttt_latency_s = np.array([c.latency_s for c in steps]).reshape(shape[:2])
        ttt_energy_j = np.array([c.energy_j for c in steps]).reshape(shape[:2]) if idle_w else None
    weights = weights_path(options.task, options.size)
    return Profile(
        task=options.task,
        size=options.size,
        device=provenance["device_name"],
        provenance=provenance,
        model_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        batch_size=np.array(batch_sizes, np.float64),
        expert_count=np.array(expert_counts, np.float64),
        routing_bias=np.array(routing_biases),
        shifts=runner.samples.shifts,
        latency_s=np.array([c.latency_s for c in served]).reshape(shape),
        energy_j=np.array([c.energy_j for c in served]).reshape(shape) if idle_w else None,
        idle_power_w=idle_w,
        ttt_latency_s=ttt_latency_s,
        ttt_energy_j=ttt_energy_j,
        accuracy=quality.accuracy,
        confidence=quality.confidence,
        entropy=quality.entropy,
        adapt_rate=quality.adapt_rate,
        carry_over=quality.carry_over,
        expert_share=quality.expert_share,
    )


def _machine(device: torch.device, meter: EnergyCounter | None) -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "device_name": device_name(device),
        "driver": meter.driver() if meter else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _spread(cost: dict[Cell, Costs]) -> dict[str, Any]:
    """Relative difference between a cell's repeats: median and maximum over the cells, and its place."""
    worst = max(cost, key=lambda cell: cost[cell].spread)
    return {
        "median": round(float(np.median([c.spread for c in cost.values()])), 4),
        "max": round(cost[worst].spread, 4),
        "max_at": worst._asdict(),
    }


def main(options: Options) -> None:
    """Measure, save and say where."""
    options.out.parent.mkdir(parents=True, exist_ok=True)  # better refused now than after minutes
    profile = measure(options)
    save_profile(profile, options.out)
    spread = profile.provenance["spread"]
    print(
        f"wrote {options.out}: {profile.device}, {profile.latency_s.size} cells in "
        f"{profile.provenance['seconds']} s, spread {spread['median']:.1%} (median), "
        f"{spread['max']:.1%} (max, at {spread['max_at']})"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
