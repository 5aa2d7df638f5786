"""Measure a model here: ``python -m moe.profiling --task vision --size tiny --device cpu --out PATH``.

With ``--model FOLDER`` in place of ``--size`` it is a Hugging Face checkpoint (`moe.hf.runner`).

The experts' costs come first, as the router's bias goes by them, then the quality; both warm the device up.
Then every cell of the cost tables is visited twice, in random order, and what is left of the time goes to the
cells whose cost is least certain. The result is a `moe.profiles.Profile`. It is written whole at the end; an
interrupted run writes nothing.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moe.data import datasets as data
from moe.data.pools import DEFAULT_SHIFTS, SamplePool
from moe.device.meter import EnergyMeter, open_meter
from moe.device.torch_device import device_name
from moe.files import refuse_unwritable
from moe.hf.runner import SIZE as HF_SIZE
from moe.hf.runner import HfRunner, checkpoint_identity, load_runner
from moe.model.config import TTT_METHODS, Group, Method, Size, Task
from moe.model.transformer import MoEModel
from moe.profiles import HELD_OUT, Profile, ProfileError, level_index, save_profile
from moe.profiling.cost import (
    LEAST_VISITS,
    Cell,
    Costs,
    adaptation_cell,
    costs,
    fitting_batch_sizes,
    held_out_cells,
    idle_power_w,
    measure_cells,
    serving_cells,
)
from moe.profiling.expert_cost import ExpertCost, measure_alike_experts, measure_expert_cost
from moe.profiling.quality import (
    ADAPTED_STEPS,
    LONG_STEPS,
    SCORE_BATCH,
    adaptation_error,
    measure_quality,
)
from moe.service.score.runner import Runner
from moe.training.weights import identity, load_model
from moe.ttt import METHODS, Adapter, step_share

BATCH_SIZES: dict[tuple[str, str], tuple[int, ...]] = {
    ("vision", "tiny"): (1, 4, 16, 64, 256),
    ("language", "tiny"): (1, 4, 16, 64),
    ("vision", "base"): (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    ("language", "base"): (8, 16, 32, 64, 128, 256, 512, 1024),
}
"""A text chunk is eight times as many tokens as an image. Those of base models are sizes of graphs
(`moe.service.score.graphs`) or above them, so that nothing fills them up."""
SHIFTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("vision", "tiny"): ("clean", "gaussian_noise@5", "contrast@5", "brightness@5"),
    ("vision", "base"): ("clean", "gaussian_noise@5", "contrast@5", "brightness@5", "gaussian_noise@3"),
    ("language", "tiny"): DEFAULT_SHIFTS["language"],
    ("language", "base"): DEFAULT_SHIFTS["language"],
}
"""Scenarios name a shift by its place. Scores grow with the cube of their number."""
WINDOW_S = {"cpu": 0.1, "cuda": 0.4}
"""On CUDA four ticks of the energy counter."""
WITHIN_S = {"cpu": 300.0, "cuda": 180.0}
SCORED_SAMPLES = {"cpu": 1000, "cuda": 4000}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and how long."""

    task: Task
    size: Size | None = None
    """One of the product's own models; a checkpoint has `model` instead."""
    model: Path | None = None
    """Folder of a Hugging Face checkpoint, for task language."""
    device: Literal["cpu", "cuda"]
    out: Path
    """Profile to write, such as configs/profiles/cpu-vision.json."""
    batch_sizes: tuple[int, ...] = ()
    """Default: by task and size. Those that do not fit into memory are left out."""
    expert_counts: tuple[int, ...] = ()
    """Default: those the model was trained for. The model's own must be among them."""
    routing_biases: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Biases at which quality and expert shares are measured. A checkpoint's experts are alike, so a bias to
    cheap ones changes nothing and only 0 is measured."""
    cost_biases: tuple[float, ...] = (0.0, 1.0)
    """Biases at which costs are measured, from and to the ends of `routing_biases`."""
    shifts: tuple[str, ...] = ()
    """Input shifts, "clean" first; default: by task and size."""
    window_s: float | None = None
    """Time under load per visit of a cell; default: 0.1 on a CPU, 0.4 on CUDA."""
    within_s: float | None = None
    """Time for everything once the model is loaded; default: 300 on a CPU, 180 on CUDA. Quality and two
    visits of every cell are measured however long they take."""
    method: Method = "tent"
    """How the vision model adapts. A language model is measured without adaptation."""
    group: Group = "norms"
    """What adapts."""
    samples: int | None = None
    """Samples per quality score, at most the whole pool; default: 1000 on a CPU, 4000 on CUDA."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be measured."""
        if (self.size is None) == (self.model is None):
            raise ValueError(f"give either size or model, got size={self.size} and model={self.model}")
        if self.model is not None and self.task != "language":
            raise ValueError(f"a checkpoint answers language, not {self.task!r}; give --task language")
        for name in ("window_s", "within_s", "samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.batch_sizes and min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        if self.method not in TTT_METHODS["vision"]:
            raise ValueError(f"method must be one of {TTT_METHODS['vision']}, got {self.method!r}")
        if self.shifts and self.shifts[0] != "clean":
            raise ValueError(f'shifts must start with "clean", got {self.shifts}')
        for biases in (self.routing_biases, self.cost_biases):
            if min(biases) != 0.0 or not max(biases) == max(self.routing_biases) <= 1.0:
                raise ValueError(
                    "routing_biases and cost_biases must both start at 0 and end at the same value up to 1, "
                    f"got {self.routing_biases} and {self.cost_biases}"
                )


def measure(options: Options) -> Profile:
    """Load the model and measure it.

    Raises:
        ProfileError: not even the smallest batch fits, or the model's own expert count is not asked for.
        GpuUnavailableError: CUDA is used and NVML does not read the card.
    """
    device = torch.device(options.device)
    meter = open_meter(device)
    # A checkpoint is measured as the own model meant for this device.
    size = options.size or ("base" if device.type == "cuda" else "tiny")
    shifts = options.shifts or SHIFTS[options.task, size]
    if options.model is None:
        model = load_model(options.task, size, device)
        runner = Runner(
            model, SamplePool(options.task, shifts, device), device, adapter=_adapter(model, options)
        )
    else:
        runner = load_runner(options.model, shifts, device)
    began = time.monotonic()
    cold_c = meter.gpu.temperature_c() if meter else None
    expert = _expert_cost(runner, meter, options.seed)
    expert_counts = sorted(set(options.expert_counts or runner.top_k_choices))
    own_k = level_index("expert_count", runner.top_k, np.array(expert_counts))
    routing_biases, cost_biases = sorted(set(options.routing_biases)), sorted(set(options.cost_biases))
    if options.model is not None:
        routing_biases = cost_biases = [0.0]
    wanted = sorted(set(options.batch_sizes or BATCH_SIZES[options.task, size]))
    batch_sizes = fitting_batch_sizes(runner, wanted, expert_counts)
    if not batch_sizes:
        raise ProfileError(
            f"not even {wanted[0]} requests fit into the memory of {device}; use a smaller model"
        )
    samples = min(options.samples or SCORED_SAMPLES[options.device], len(runner.samples))
    quality = measure_quality(
        runner, expert_counts, routing_biases, samples, options.seed, min(SCORE_BATCH, batch_sizes[-1])
    )
    quality_s = time.monotonic() - began
    cells = serving_cells(batch_sizes, expert_counts, cost_biases)
    extra = held_out_cells(batch_sizes, expert_counts, cost_biases)
    step_of = [adaptation_cell(n, k, runner.adapt_batch) for n in batch_sizes for k in expert_counts]
    steps = sorted(set(step_of)) if runner.adapts else []
    idle_before_w = idle_power_w(meter) if meter else None
    visits = measure_cells(
        runner,
        cells + steps + extra,
        meter,
        options.window_s or WINDOW_S[options.device],
        (options.within_s or WITHIN_S[options.device]) - (time.monotonic() - began),
        idle_before_w or 0.0,
        np.random.default_rng(options.seed),
    )
    hot_c = meter.gpu.temperature_c() if meter else None
    idle_after_w = idle_power_w(meter) if meter else None
    idle_w = None if idle_before_w is None or idle_after_w is None else (idle_before_w + idle_after_w) / 2
    cost = {cell: costs(seen, idle_w or 0.0) for cell, seen in visits.items()}
    metered = idle_w is not None

    def table(names: Sequence[Cell], field: str, last: int | None = len(cost_biases)) -> np.ndarray:
        values = np.array([getattr(cost[cell], field) for cell in names])
        shape = (len(batch_sizes), len(expert_counts))
        return values.reshape(shape if last is None else (*shape, last))

    adapts = runner.adapts
    rate = step_share(METHODS[options.method][0]()) if adapts else None
    profile = Profile(
        task=options.task,
        size=options.size or HF_SIZE,
        device=device_name(device),
        provenance={},
        model=checkpoint_identity(options.model) if options.model else identity(options.task, size),
        shifts=runner.samples.shifts,
        batch_size=np.array(batch_sizes, np.float64),
        expert_count=np.array(expert_counts, np.float64),
        routing_bias=np.array(routing_biases),
        cost_bias=np.array(cost_biases),
        latency_s=table(cells, "latency_s"),
        latency_spread=table(cells, "latency_spread"),
        energy_j=table(cells, "energy_j") if metered else None,
        energy_spread=table(cells, "energy_spread") if metered else None,
        visits=table(cells, "visits"),
        start_temperature_c=table(cells, "start_temperature_c") if metered else None,
        idle_power_w=idle_w,
        ttt_latency_s=table(step_of, "latency_s", None) if adapts else None,
        ttt_latency_spread=table(step_of, "latency_spread", None) if adapts else None,
        ttt_energy_j=table(step_of, "energy_j", None) if adapts and metered else None,
        ttt_energy_spread=table(step_of, "energy_spread", None) if adapts and metered else None,
        held_out=[],
        samples=samples,
        accuracy=quality.pure[..., 0],
        confidence=quality.pure[..., 1],
        entropy=quality.pure[..., 2],
        mixture=quality.mixed,
        adapt_rate=rate,
        adaptation_error=adaptation_error(quality, routing_biases, own_k, rate),
        expert_share=quality.expert_share,
        expert_cost=expert.relative(),
        expert_latency_s=expert.latency_s,
        expert_energy_j=expert.energy_j,
    )
    return replace(
        profile,
        held_out=[interpolation_error(profile, cell, cost[cell]) for cell in extra],
        provenance={
            **_machine(device, meter),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seed": options.seed,
            "seconds": {"total": round(time.monotonic() - began, 1), "quality": round(quality_s, 1)},
            "window_s": options.window_s or WINDOW_S[options.device],
            "captured": runner.captured,
            "left_out_batch_sizes": [n for n in wanted if n not in batch_sizes],
            "spread": _spread(cost),
            "idle_power_w": {"before": idle_before_w, "after": idle_after_w},
            "temperature_c": {"start": cold_c, "end_of_load": hot_c},
            "adaptation": {
                "method": options.method,
                "group": options.group,
                **_long_run(quality.long, runner.adapt_batch),
            }
            if adapts
            else None,
            "data": data.describe(options.task),
            **({"checkpoint": str(options.model)} if options.model else {}),
        },
    )


def _adapter(model: MoEModel, options: Options) -> Adapter | None:
    """What is measured of adaptation: that of models with batch norms, whose states are known."""
    if model.config.norm != "batch":
        return None
    return Adapter(model, METHODS[options.method][0](), options.group)


def _expert_cost(runner: Runner, meter: EnergyMeter | None, seed: int) -> ExpertCost:
    """Measure what experts cost, and let the router's bias go by it."""
    if isinstance(runner, HfRunner):
        return measure_alike_experts(runner, meter, seed)
    expert = measure_expert_cost(runner.model, runner.samples.inputs[0], meter, seed)
    runner.model.expert_cost.copy_(torch.from_numpy(expert.relative()))
    return expert


def interpolation_error(profile: Profile, cell: Cell, cost: Costs) -> dict[str, float | None]:
    """Entry of `Profile.held_out`: interpolated over measured cost, less 1, for a cell outside the tables."""
    place = (cell.batch_size, cell.expert_count, cell.routing_bias)
    metered = profile.energy_j is not None
    values = (
        *place,
        cost.latency_s,
        cost.energy_j if metered else None,
        profile.latency_at(*place) / cost.latency_s - 1.0,
        profile.energy_at(*place) / cost.energy_j - 1.0 if metered else None,
    )
    return dict(zip(HELD_OUT, values, strict=True))


def _machine(device: torch.device, meter: EnergyMeter | None) -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "driver": meter.gpu.driver if meter else None,
        "missing": list(meter.gpu.missing) if meter else [],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _spread(cost: dict[Cell, Costs]) -> dict[str, Any]:
    """Median and largest spread over the cells, with their place, of latency and of energy."""
    result: dict[str, Any] = {}
    for name in ("latency_spread", "energy_spread"):
        spreads = {cell: getattr(c, name) for cell, c in cost.items() if np.isfinite(getattr(c, name))}
        if spreads:
            worst = max(spreads, key=lambda cell: spreads[cell])
            result[name] = {
                "median": round(float(np.median(list(spreads.values()))), 4),
                "max": round(spreads[worst], 4),
                "max_at": worst._asdict(),
            }
    result["visits"] = {"least": LEAST_VISITS, "total": sum(c.visits for c in cost.values())}
    return result


def _long_run(long: np.ndarray | None, adapt_batch: int) -> dict[str, Any]:
    """What the gradients do in the long run: quality under the shift adapted to, after `LONG_STEPS`."""
    assert long is not None
    return {
        "batch": adapt_batch,
        "steps": ADAPTED_STEPS,
        "long_steps": LONG_STEPS,
        "accuracy_after_long": long[:, 0].round(4).tolist(),
        "confidence_after_long": long[:, 1].round(4).tolist(),
    }


def summary(profile: Profile) -> str:
    """A few lines on how far the profile can be trusted."""
    seconds, spread = profile.provenance["seconds"], profile.provenance["spread"]
    lines = [
        f"{profile.device}, {profile.task}-{profile.size}: {profile.latency_s.size} cells, "
        f"{spread['visits']['total']} visits, {seconds['total']} s in all, {seconds['quality']} s of quality"
    ]
    for name in ("latency", "energy"):
        if f"{name}_spread" in spread:
            s = spread[f"{name}_spread"]
            lines.append(f"{name} spread: {s['median']:.1%} (median), {s['max']:.1%} (max, at {s['max_at']})")
        errors = {
            i: abs(e) for i, cell in enumerate(profile.held_out) if (e := cell[f"{name}_error"]) is not None
        }
        if errors:
            worst = profile.held_out[max(errors, key=lambda i: errors[i])]
            where = {key: worst[key] for key in HELD_OUT[:3]}
            lines.append(
                f"{name} interpolation: {np.median(list(errors.values())):.1%} (median), "
                f"{max(errors.values()):.1%} (max, at {where}) over {len(errors)} cells"
            )
    lines.append(f"left out for memory: {profile.provenance['left_out_batch_sizes'] or 'none'}")
    half = np.ptp(profile.accuracy_interval(), axis=-1).max() / 2
    lines.append(f"accuracy: 95% interval of at most +-{half:.2%}, {profile.samples} samples per score")
    if profile.mixture is not None:
        own = range(len(profile.shifts))
        before = profile.accuracy[:, 0, profile.own_k, 0]
        after = profile.accuracy[own, np.arange(1, len(own) + 1), profile.own_k, 0]
        long = profile.provenance["adaptation"]["accuracy_after_long"]
        for shift, *row in zip(profile.shifts, before, after, long, strict=True):
            lines.append("  {}: {:.3f} unadapted, {:.3f} adapted, {:.3f} in the long run".format(shift, *row))
        lines.append(f"adaptation model: {profile.adaptation_error}")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measure, save and say where."""
    refuse_unwritable(options.out)
    profile = measure(options)
    save_profile(profile, options.out)
    print(f"{summary(profile)}\nwrote {options.out}")
