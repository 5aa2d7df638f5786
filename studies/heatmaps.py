"""Use of the experts while the thermal signal rises, from the live service: `python -m studies.heatmaps`.

The service answers a steady stream of requests. A prescribed margin to a temperature limit, large and then
falling to 0, gives the environment's thermal signal, and the signal is the routing bias.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

from agents.evaluation.figures import save_figure
from agents.files import new_run_folder, write_file
from moe.data.pools import SamplePool
from moe.device.meter import open_meter
from moe.device.torch_device import device_name, pick_device
from moe.errors import one_line_errors
from moe.model.config import Size, Task
from moe.profiling.cost import Cell, Load
from moe.profiling.expert_cost import measure_expert_cost
from moe.service.score.live import LiveWorkload
from moe.service.score.runner import Runner
from moe.service.traffic import TrafficConfig
from moe.training.weights import load_model
from moe.workload import Knobs
from thermoe_env.mdp.signals import thermal_signal

FAR_C = 10.0
"""Margin to the limit before the rise, at which the signal is just 0."""
LOAD = 0.7
"""Load of the service over its capacity without bias."""
CAPACITY_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Play the live service under a rising thermal signal and draw who is used when."""

    task: Task = "vision"
    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    batch_size: int = 256
    expert_count: int = 4
    calm_s: float = 10.0
    """Time before the rise and after it."""
    rise_s: float = 10.0
    interval_s: float = 1.0
    seed: int = 0
    out: Path | None = None
    """Folder of the results; runs/heatmaps-TIME where none is given."""


@dataclass(frozen=True)
class _Terms:
    """Terms of service under which nothing is late or given up."""

    deadline_s: tuple[float, float] = (60.0, 60.0)
    max_wait_s: tuple[float, float] = (0.1, 0.1)
    expire_after_s: tuple[float, float] = (120.0, 120.0)


def margins_c(calm_s: float, rise_s: float, interval_s: float) -> np.ndarray:
    """Margin to the temperature limit in each interval, [T]: far, falling evenly to 0, 0."""
    calm, rise = round(calm_s / interval_s), round(rise_s / interval_s)
    return np.concatenate([np.full(calm, FAR_C), np.linspace(FAR_C, 0.0, rise), np.zeros(calm)])


def main(arguments: Arguments) -> Path:
    """Play, draw, write; returns the run folder."""
    device = pick_device(arguments.device)
    folder = new_run_folder("heatmaps", arguments.out)
    model = load_model(arguments.task, arguments.size, device)
    samples = SamplePool(arguments.task, ("clean",), device)
    cost = measure_expert_cost(model, samples.inputs[0], open_meter(device), arguments.seed).relative()
    model.expert_cost.copy_(torch.from_numpy(cost))
    margin_c = margins_c(arguments.calm_s, arguments.rise_s, arguments.interval_s)
    signal = np.array([thermal_signal(margin) for margin in margin_c])  # [T]
    runner = Runner(model, samples, device)
    capacity_rps = capacity(runner, arguments.batch_size, arguments.expert_count)
    traffic = TrafficConfig(kind="poisson", low_load=LOAD, high_load=LOAD)
    seconds = len(signal) * arguments.interval_s
    service = LiveWorkload(runner, traffic, capacity_rps, seconds + 1.0, _Terms())
    service.warm_up([arguments.batch_size], [arguments.expert_count], ttt=0)
    tokens = play(service, signal, arguments)  # [T, L, E]
    origin = {
        "machine": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "task": arguments.task,
        "size": arguments.size,
        "seed": arguments.seed,
        "interval_s": arguments.interval_s,
        "expert_count": arguments.expert_count,
        "expert_widths": list(model.config.expert_widths),
        "expert_cost": cost.tolist(),
        "capacity_rps": capacity_rps,
    }
    record = origin | {"thermal_signal": signal.tolist(), "tokens_per_expert": tokens.tolist()}
    write_file(folder / "usage.json", json.dumps(record) + "\n")
    save_figure(lambda: heatmaps(signal, tokens, origin), folder / "experts_live.png")
    print(f"wrote to {folder}: usage.json, experts_live.png")
    return folder


def capacity(runner: Runner, batch_size: int, expert_count: int) -> float:
    """Requests per second of full batches back to back."""
    load = Load(runner, Cell(batch_size, expert_count, 0.0, ttt=False))
    while len(load.latencies_s) < CAPACITY_BATCHES:
        load.step()
    load.drain()
    return batch_size / float(np.median(load.latencies_s))


def play(service: LiveWorkload, signal: np.ndarray, arguments: Arguments) -> np.ndarray:
    """Serve an interval per value of the signal; tokens per interval, layer and expert, [T, L, E]."""
    config = service.runner.model.config
    tokens = np.zeros((len(signal), config.n_layers, config.n_experts), np.int64)
    service.reset(arguments.seed)
    try:
        for row, strength in zip(tokens, tqdm(signal, desc="live", unit="interval"), strict=True):
            knobs = Knobs(
                routing_bias=float(strength),
                batch_size=arguments.batch_size,
                expert_count=arguments.expert_count,
            )
            counted = service.run(knobs, arguments.interval_s).tokens_per_expert
            if counted is not None:  # an interval may end before its first batch does
                row += counted
    finally:
        service.close()
    return tokens


def heatmaps(signal: np.ndarray, tokens: np.ndarray, origin: dict[str, Any]) -> Figure:
    """Signal, use of each layer's experts over time, and the use before and after the rise.

    Args:
        signal: thermal signal of each interval.  # [T]
        tokens: tokens per interval, layer and expert.  # [T, L, E]
        origin: as in usage.json.
    """
    n_layers, n_experts = tokens.shape[1:]
    time_s = np.arange(len(signal) + 1) * origin["interval_s"]
    even = np.maximum(tokens.mean(axis=-1, keepdims=True), 1e-12)
    over_time = tokens / even  # [T, L, E], 1 = even load
    before, after = (tokens[signal == level].sum(axis=0) for level in (0.0, 1.0))  # [L, E]
    height = 0.9 + 0.12 * n_experts
    figure = Figure(figsize=(10.0, 1.8 + height * n_layers), layout="constrained")
    grid = figure.subplots(n_layers + 1, 2, width_ratios=(2, 1), height_ratios=[0.8, *[height] * n_layers])
    grid[0, 0].step(time_s[:-1], signal, where="post", color="#D55E00")
    grid[0, 0].set(title="thermal signal = routing bias", xlim=(0.0, time_s[-1]), ylim=(-0.05, 1.05))
    grid[0, 1].set_axis_off()
    labels = [f"{e}: {width}" for e, width in enumerate(origin["expert_widths"])]
    for layer, (left, right) in enumerate(grid[1:]):
        image = left.pcolormesh(
            time_s, np.arange(n_experts + 1) - 0.5, over_time[:, layer].T, cmap="cividis", vmin=0.0, vmax=2.5
        )
        left.set(title=f"layer {layer}", ylabel="expert: width")
        rows = np.arange(n_experts)
        for offset, load, colour in ((-0.2, before, "#555555"), (0.2, after, "#D55E00")):
            share = load[layer] / max(load[layer].mean(), 1e-12)
            right.barh(rows + offset, share, height=0.4, color=colour)
        right.axvline(1.0, color="black", lw=0.8, ls="--")
        for axes in (left, right):
            axes.set_yticks(rows, labels, fontsize=6)
            axes.set_ylim(n_experts - 0.5, -0.5)
            axes.grid(False)
    grid[-1, 0].set_xlabel("time (s)")
    grid[-1, 1].set_xlabel("tokens, 1 = even load")
    figure.colorbar(image, ax=grid[1:, 0], label="tokens, 1 = even load", aspect=40, extend="max")
    grid[0, 1].legend(
        handles=[Patch(color="#555555", label="signal 0"), Patch(color="#D55E00", label="signal 1")],
        loc="center",
    )
    what = f"{origin['task']} {origin['size']}, {origin['expert_count']} experts per token"
    figure.suptitle(
        f"Live service under a prescribed rise of the thermal signal, {what}, {origin['machine']}"
    )
    return figure


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, description=__doc__))
