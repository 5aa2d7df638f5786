"""One repeat of the routing study: train every variant, then measure all of them side by side.

Costs are measured under load in one pass over the cells of all variants, in random order: what the device
does meanwhile meets all variants alike, and a ratio of two costs is of one pass.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe.data import datasets as data
from moe.data.pools import SamplePool
from moe.device.meter import EnergyMeter, open_meter
from moe.device.torch_device import serving_dtype
from moe.model.config import ModelConfig, Size, Task
from moe.model.transformer import MoEModel, initialise
from moe.model.usage import BYTE_CLASSES, RoutingCounts
from moe.profiling.cost import Cell, Load, Visit, idle_power_w, visit
from moe.profiling.expert_cost import ExpertCost, measure_expert_cost
from moe.service.score.runner import Runner
from moe.training.evaluate import TEXT_LIMIT, evaluate_language, evaluate_vision
from moe.training.fit import fit
from studies.repeats import provenance
from studies.routing_config import Study

CLASS_NAMES: dict[Task, tuple[str, ...]] = {"vision": data.VISION_CLASSES, "language": BYTE_CLASSES}
"""Classes of input that routing is counted by: an image's label, or what the input byte is."""


@dataclass(frozen=True)
class Inputs:
    """Test inputs of a task, clean and shifted, on the device."""

    pool: SamplePool
    """What the measured load asks."""
    quality: dict[str, tuple[Tensor, ...]]
    """Images and labels, or text, by `clean` and `shifted`."""


def run_repeat(study: Study, task: Task, size: Size, device: torch.device, seed: int) -> dict[str, Any]:
    """Train and measure all variants with one seed; returns plain JSON types.

    Raises:
        TrainingDiverged: A loss is not finite.
        GpuUnavailableError: A CUDA device that NVML does not read.
    """
    meter = open_meter(device)
    inputs = load_inputs(study, task, size, device)
    clock = {"start": time.perf_counter()}
    models, records = _train_variants(study, task, size, device, seed, inputs, meter)
    clock["training"] = time.perf_counter()
    _measure_costs(study, task, size, seed, inputs, meter, models, records)
    clock["costs"] = time.perf_counter()
    for name, model in models.items():
        for cell in tqdm(records[name]["cells"], desc=f"quality {name}", unit="cell", mininterval=1.0):
            cell |= score_cell(model, inputs, cell["expert_count"], cell["routing_bias"], study)
    clock["quality"] = time.perf_counter()
    marks = list(clock.values())
    return {
        "settings": study.settings(task, size, device.type),
        **provenance(task, size, device, seed),
        "spent_s": dict(zip(list(clock)[1:], np.diff(marks).tolist(), strict=True)),
        "class_names": list(CLASS_NAMES[task]),
        "variants": records,
    }


def load_inputs(study: Study, task: Task, size: Size, device: torch.device) -> Inputs:
    """Load the test inputs of a task: for language, prose is clean and source code is shifted."""
    pool = SamplePool(task, ("clean", study.shift[task]), device)
    samples = study.sizes[size].test_samples
    n = None if samples is None else samples[task]
    if task == "vision":
        images = {s: (pool.inputs[i][:n], pool.targets[i][:n]) for i, s in enumerate(("clean", "shifted"))}
        return Inputs(pool, images)
    limit = TEXT_LIMIT if n is None else n * study.model_config("uneven", task, size).context_length + 1
    domains = {"clean": data.load_language("prose", "test"), "shifted": data.load_language("code", "test")}
    return Inputs(pool, {s: (text[:limit].to(device),) for s, text in domains.items()})


def _train_variants(
    study: Study,
    task: Task,
    size: Size,
    device: torch.device,
    seed: int,
    inputs: Inputs,
    meter: EnergyMeter | None,
) -> tuple[dict[str, MoEModel], dict[str, dict[str, Any]]]:
    """Train all variants on the same batches; each model then has the measured cost of its experts.

    Cost is measured once per layout of experts, on the first trained model of it, or on an untrained one
    where training itself needs the cost.
    """
    models: dict[str, MoEModel] = {}
    records: dict[str, dict[str, Any]] = {}
    images_or_text = inputs.pool.inputs[0]
    costs: dict[str, ExpertCost] = {}  # by layout
    for name, variant in study.variants.items():
        config, recipe = study.model_config(name, task, size), study.recipe(name, task, size)
        layout = variant.experts
        print(f"{task}, seed {seed}: training {name}", flush=True)
        if variant.recipe and layout not in costs:
            costs[layout] = measure_expert_cost(_untrained(config, device, seed), images_or_text, meter, seed)
        expert_cost = torch.from_numpy(costs[layout].relative()) if variant.recipe else None  # [E]
        start_s = time.perf_counter()
        model, _ = fit(config, recipe, device, seed, expert_cost=expert_cost)
        train_s = time.perf_counter() - start_s
        if layout not in costs:
            costs[layout] = measure_expert_cost(model, images_or_text, meter, seed)
        measured = costs[layout]
        model.expert_cost.copy_(torch.from_numpy(measured.relative()))
        model.zero_grad(set_to_none=True)  # the last step's gradients are as large as the model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        models[name] = model
        records[name] = {
            "config": config.to_dict(),
            "recipe": dataclasses.asdict(recipe),
            "n_params": model.n_params,
            "train_s": train_s,
            "expert_cost": model.expert_cost.tolist(),
            "expert_latency_s": measured.latency_s.tolist(),
            "expert_energy_j": None if measured.energy_j is None else measured.energy_j.tolist(),
        }
    return models, records


def _untrained(config: ModelConfig, device: torch.device, seed: int) -> MoEModel:
    with device:
        model = MoEModel(config)
    initialise(model, torch.Generator(device).manual_seed(seed))
    return model.requires_grad_(False).eval().cast_weights(serving_dtype(device))


def _measure_costs(
    study: Study,
    task: Task,
    size: Size,
    seed: int,
    inputs: Inputs,
    meter: EnergyMeter | None,
    models: dict[str, MoEModel],
    records: dict[str, dict[str, Any]],
) -> None:
    """Add each variant's cells and their costs to its record, from one pass over all variants' cells."""
    own, rng = study.sizes[size], np.random.default_rng(seed)
    runners = {name: Runner(model, inputs.pool, inputs.pool.inputs.device) for name, model in models.items()}
    cells = [
        (name, Cell(own.batch_size[task], k, bias, ttt=False))
        for name in models
        for k in study.expert_counts
        for bias in study.biases(name)
    ]
    for name, cell in cells:  # the first run of a shape compiles and allocates
        load = Load(runners[name], cell)
        load.step()
        load.drain()
    idle_w = None if meter is None else idle_power_w(meter)
    visits: dict[tuple[str, Cell], list[Visit]] = {cell: [] for cell in cells}
    order = [cells[i] for _ in range(own.rounds) for i in rng.permutation(len(cells))]
    for name, cell in tqdm(order, desc="cost", unit="window", mininterval=1.0):
        visits[name, cell].append(visit(runners[name], cell, meter, own.window_s))
    for (name, cell), seen in visits.items():
        tokens = cell.batch_size * models[name].config.tokens_per_sample
        record = {"expert_count": cell.expert_count, "routing_bias": cell.routing_bias}
        records[name].setdefault("cells", []).append(record | _cost_of(seen, tokens, idle_w))
        records[name]["idle_power_w"] = idle_w


def _cost_of(visits: list[Visit], tokens: int, idle_w: float | None) -> dict[str, float]:
    """Cost of a micro-batch of `tokens` and of each of them: medians over the visits."""
    cost = {
        "latency_s": float(np.median([v.latency_s for v in visits])),
        "time_s_per_token": float(np.median([1.0 / v.units_per_s for v in visits])) / tokens,
    }
    if idle_w is not None:
        energy_j = np.array([v.power_w / v.units_per_s for v in visits])  # per micro-batch
        idle_j = np.array([idle_w / v.units_per_s for v in visits])
        cost["energy_j_per_token"] = float(np.median(energy_j - idle_j)) / tokens
        cost["energy_total_j_per_token"] = float(np.median(energy_j)) / tokens
    return cost


def score_cell(
    model: MoEModel, inputs: Inputs, expert_count: int, routing_bias: float, study: Study
) -> dict[str, Any]:
    """Quality of a cell and the routing behind it, by class of input; on shifted inputs where asked for."""
    config = model.config
    result: dict[str, Any] = {"counts": {}}
    kinds = ("clean", "shifted") if expert_count == study.usage_expert_count else ("clean",)
    for kind in kinds:
        n_classes, device = len(CLASS_NAMES[config.task]), inputs.pool.inputs.device
        counts = RoutingCounts(config.n_layers, n_classes, config.n_experts, device)
        prefix = "" if kind == "clean" else "shifted_"
        if config.task == "vision":
            images, labels = inputs.quality[kind]
            accuracy = evaluate_vision(
                model, images, labels, expert_count, routing_bias, batch_size=2048, counts=counts
            )
        else:
            (text,) = inputs.quality[kind]
            accuracy, bits = evaluate_language(
                model, text, expert_count, routing_bias, batch_size=256, counts=counts
            )
            result[f"{prefix}bits_per_byte"] = bits
        result[f"{prefix}accuracy"] = accuracy
        result["counts"][kind] = counts.counts.tolist()  # [L, C, E]
    return result
