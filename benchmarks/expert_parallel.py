"""What heat-aware routing moves between devices: one model, its experts on the GPUs of this machine.

    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel --out DIR

Each process owns a GPU, its part of the images and its experts. For every thermal signal of the devices and
every routing bias it measures tokens per device, power and energy per device (NVML's counter, from tick to
tick, idle power included), the latency of a step and the accuracy. Conditions are measured in random order,
several times; intervals are 95% (Student's t over the repeats). Without GPUs it runs the tiny model, without
energies.

The signals are set, not read from the devices: what is measured is what routing makes of them. An expert's
energy is taken to be in proportion to its width. Beside the tokens measured stands their forecast from the
profile that one device measured (`moe.profiling.heat`).
"""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from benchmarks.expert_parallel_report import add_forecast, draw, summarise
from moe.data import datasets as data
from moe.device.base import Tick
from moe.device.meter import EnergyMeter, open_meter
from moe.device.torch_device import device_name, one_thread_on_cpu
from moe.errors import ReadingError, one_line_errors
from moe.files import read_json
from moe.model.config import Size
from moe.model.distributed import distribute, tokens_per_device
from moe.model.transformer import ModelOutput, MoEModel
from moe.placement import Placement
from moe.profiles import load_profile
from moe.training.weights import load_model
from thermoe_env.configs import config_path

SETTLE_S = 0.15
"""Work before a window opens: power follows a change of load within about this time."""
LOOK_S = 0.01
"""Time between looks at the energy counter."""
IDLE_S = 0.5
SPARE_S = 3.0
"""Kept of `within_s` for the figure."""
MEASURED = ("latency_s", "power_w", "energy_j_per_answer", "temperature_c")
PROFILE_OF = {"cuda": "h100-vision", "cpu": "cpu-vision"}
"""Profile of the model that runs on a kind of device, from which token shares are forecast."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and for how long."""

    out: Path
    """Folder for windows.csv, summary.json and figure.png."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    placement: Path | None = None
    """JSON of a `moe.placement.Placement`; none given: even by width."""
    device_signals: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.0, 1.0), (0.5, 1.0))
    """Thermal signals of the first and the last device; those between lie on a line."""
    biases: tuple[float, ...] = (0.0, 0.5, 1.0)
    top_k: int = 4
    repeats: int = 5
    batch_size: int | None = None
    """Images of a step on each device; none given: 2048 on a GPU, 64 on a CPU."""
    window_s: float = 0.7
    """Length of a window."""
    images: int = 10_000
    """Test images, at most, for the accuracy."""
    within_s: float = 110.0
    """Time for everything, training included: then there are fewer repeats."""
    seed: int = 0


class Condition(NamedTuple):
    """One setting of the router."""

    signal: tuple[float, ...]  # [D]
    routing_bias: float


@dataclass(frozen=True)
class Service:
    """What a rank measures with."""

    model: MoEModel
    placement: Placement
    options: Options
    images: Tensor  # [N, 28, 28] of this rank
    labels: Tensor  # [N]
    device: torch.device
    meter: EnergyMeter | None

    @torch.no_grad()
    def answer(self, images: Tensor, condition: Condition) -> ModelOutput:
        """Answer this rank's images while the other ranks answer theirs."""
        widths = self.model.config.expert_widths
        cost = self.placement.thermal_cost(widths, condition.signal, self.device)
        return self.model(images, self.options.top_k, condition.routing_bias, cost)

    def step(self, condition: Condition) -> float:
        """Answer one batch and return its time in seconds."""
        begin = time.perf_counter()
        self.answer(self.images[: self.batch_size], condition)
        self.synchronise()
        return time.perf_counter() - begin

    @property
    def batch_size(self) -> int:
        """Images of a step on each device."""
        wanted = self.options.batch_size or (2048 if self.device.type == "cuda" else 64)
        return min(wanted, len(self.images))

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main(options: Options) -> None:
    """Measure on every rank; rank 0 writes."""
    began = time.monotonic()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(
            "start one process per device: torchrun --nproc-per-node 2 -m benchmarks.expert_parallel ..."
        )
    rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(options.device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink multicast needs rights that not every machine gives
    if n_ranks == int(os.environ["LOCAL_WORLD_SIZE"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Both backends: ranks also meet on the host, where waiting neither heats a device nor keeps it busy.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=5))
    try:
        service = _service(options, device, rank, n_ranks)
        _measure(service, rank, began)
        if rank == 0:
            draw(
                read_json(options.out / "summary.json", "run it again"),
                options.out / "figure.png",
            )
            print(f"results: {options.out}")
        dist.barrier()  # a rank that leaves while another still draws may be torn down amid its threads
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int, n_local: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        one_thread_on_cpu(torch.device("cpu"))
        return torch.device("cpu")
    if torch.cuda.device_count() < n_local:
        sys.exit(
            f"{n_local} processes need as many GPUs, this machine has {torch.cuda.device_count()}; start "
            "fewer with --nproc-per-node, or pass --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _service(options: Options, device: torch.device, rank: int, n_ranks: int) -> Service:
    size: Size = "base" if device.type == "cuda" else "tiny"
    if rank == 0:
        model = load_model("vision", size, device)  # trains a base model on first use
    _meet()
    if rank != 0:
        model = load_model("vision", size, device)
    if options.placement is None:
        placement = Placement.even(model.config.expert_widths, n_ranks)
    else:
        placement = Placement.from_dict(read_json(options.placement, "name the JSON file of a placement"))
    distribute(model, placement)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    images, labels = data.load_vision("test")
    end = min(len(images), options.images) // n_ranks * n_ranks  # equally many for each rank
    mine = slice(rank, end, n_ranks)
    own_images, own_labels = images[mine].to(device), labels[mine].to(device)
    return Service(model, placement, options, own_images, own_labels, device, open_meter(device))


def _conditions(options: Options, n_devices: int) -> list[Condition]:
    place = np.linspace(0.0, 1.0, n_devices)
    return [
        Condition(tuple(float(s) for s in np.interp(place, [0.0, 1.0], signal)), bias)
        for signal, bias in itertools.product(options.device_signals, options.biases)
    ]


def _measure(service: Service, rank: int, began: float) -> None:
    """Measure every condition; rank 0 writes the files after every repeat."""
    options, n_ranks = service.options, service.placement.n_devices
    conditions = _conditions(options, n_ranks)
    _say(rank, began, f"{len(conditions)} conditions on {n_ranks} x {device_name(service.device)}")
    idle_w = _idle_w(service)
    for condition in conditions:  # the first steps load and compile kernels
        service.step(condition)
    rows: list[dict[str, Any]] = []
    steps_s = []
    for condition in conditions:
        quality, share = _quality(service, condition)
        rows.append({**condition._asdict(), "quality": quality, "tokens_share": share})
        steps_s.append(float(_of_ranks([min(service.step(condition) for _ in range(3))]).max()))
    _say(rank, began, f"steps of {1e3 * min(steps_s):.1f} to {1e3 * max(steps_s):.1f} ms; measuring")
    windows: list[dict[str, Any]] = []
    order, longest_s = np.random.default_rng(options.seed), 0.0
    for repeat in range(options.repeats):
        repeat_began = time.monotonic()
        for c in order.permutation(len(conditions)).tolist():
            values = _window(service, conditions[c], steps_s[c]).tolist()  # [D, 4]
            windows += [
                {"repeat": repeat, "condition": c, "device": d, **dict(zip(MEASURED, row, strict=True))}
                for d, row in enumerate(values)
            ]
        if rank == 0:
            _write(service, idle_w, rows, windows)
        _say(rank, began, f"repeat {repeat + 1} of {options.repeats} done")
        longest_s = max(longest_s, time.monotonic() - repeat_began)
        left_s = options.within_s - SPARE_S - (time.monotonic() - began)
        if _of_ranks([left_s - longest_s]).min() < 0.0 and repeat + 1 < options.repeats:
            _say(rank, began, f"no time for more repeats within {options.within_s:g} s")
            break


def _idle_w(service: Service) -> list[float] | None:
    """Power of each device with the model in memory and nothing to do."""
    if service.meter is None:
        return None
    start, end = service.meter.window(lambda: time.sleep(LOOK_S), IDLE_S)
    return _of_ranks([(end.energy_j - start.energy_j) / (end.time_s - start.time_s)])[:, 0].tolist()


def _quality(service: Service, condition: Condition) -> tuple[float, list[float]]:
    """Accuracy over the test images of all ranks, and the share of their expert tokens on each device."""
    right = torch.zeros((), dtype=torch.int64, device=service.device)
    tokens = torch.zeros(service.placement.n_devices, dtype=torch.int64, device=service.device)
    batches = zip(
        service.images.split(service.batch_size), service.labels.split(service.batch_size), strict=True
    )
    for images, labels in batches:
        output = service.answer(images, condition)
        right += (output.predictions == labels).sum()
        tokens += tokens_per_device(output, service.placement).sum(dim=0)
    counts = _of_ranks([right.item(), *tokens.tolist()]).sum(axis=0)
    n_images = len(service.images) * service.placement.n_devices
    return float(counts[0] / n_images), (counts[1:] / counts[1:].sum()).tolist()


def _window(service: Service, condition: Condition, step_s: float) -> np.ndarray:
    """Measure a window on all ranks at once, as many steps on each.

    Returns:
        Median time of a step, power, energy per answer (of all devices' answers) and temperature of each
        device; NaN without a meter.  # [D, 4]
    """
    steps = max(3, round(service.options.window_s / step_s))
    for _ in range(max(1, round(SETTLE_S / step_s))):
        service.step(condition)
    if service.meter is None:
        latency_s = float(np.median([service.step(condition) for _ in range(steps)]))
        return _of_ranks([latency_s, np.nan, np.nan, np.nan])
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watch = pool.submit(_ticks, service.meter, done)
        try:
            times_s = [service.step(condition) for _ in range(steps)]
        finally:
            done.set()
        ticks = watch.result()
    if len(ticks) < 2:
        raise ReadingError(
            f"the energy counter ticked {len(ticks)} times in {sum(times_s):.2f} s; raise --window-s"
        )
    power_w = (ticks[-1].energy_j - ticks[0].energy_j) / (ticks[-1].time_s - ticks[0].time_s)
    answers_per_s = service.batch_size * service.placement.n_devices / float(np.mean(times_s))
    temperature_c = service.meter.gpu.temperature_c()
    return _of_ranks([float(np.median(times_s)), power_w, power_w / answers_per_s, temperature_c])


def _ticks(meter: EnergyMeter, done: threading.Event) -> list[Tick]:
    """Ticks of the counter until `done`."""
    ticks: list[Tick] = []
    while True:
        tick = meter.next_tick(lambda: done.wait(LOOK_S))
        if done.is_set():
            return ticks
        ticks.append(tick)


def _of_ranks(values: list[float]) -> np.ndarray:
    """Exchange some numbers on the host, [N, len(values)]."""
    mine = torch.tensor(values, dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return torch.stack(every).numpy()


def _meet() -> None:
    _of_ranks([0.0])


def _say(rank: int, began: float, what: str) -> None:
    if rank == 0:
        print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)


def _write(
    service: Service, idle_w: list[float] | None, rows: list[dict[str, Any]], windows: list[dict[str, Any]]
) -> None:
    """Write windows.csv and summary.json; a row per window and device, a cell is empty where no meter is."""
    options, n_devices = service.options, service.placement.n_devices
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "windows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Condition._fields, *windows[0]])
        writer.writeheader()
        for window in windows:
            condition = {name: rows[window["condition"]][name] for name in Condition._fields}
            condition["signal"] = " ".join(map(str, condition["signal"]))
            writer.writerow(condition | {k: "" if v != v else v for k, v in window.items()})  # NaN
    profile = load_profile(config_path("profiles", PROFILE_OF[service.device.type], ".json"))
    document = {
        "machine": f"{n_devices} x {device_name(service.device)}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "options": asdict(options),
        "model": service.model.config.to_dict(),
        "placement": service.placement.to_dict(),
        "batch_size_per_device": service.batch_size,
        "quality_images": len(service.images) * n_devices,
        "idle_power_w": idle_w,
        "conditions": add_forecast(
            summarise(rows, windows), profile, service.placement, service.model.config, options.top_k
        ),
    }
    text = json.dumps(document, indent=2, default=str, allow_nan=False)
    (options.out / "summary.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
    sys.stdout.flush()
    os._exit(0)  # an orderly end of the interpreter may abort amid the threads of the group that is gone
