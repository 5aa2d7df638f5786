"""What the live service adds to the bare model: ``python benchmarks/service_overhead.py --device cpu``.

Both answer batches of the same size on the same device: the model alone in a loop, back to back, and the
whole service (queue, gathering, scoring, accounts) under more load than it can take. On CUDA the service
answers by CUDA graphs and the model alone does not, so that a share above 1 is what they save
(`benchmarks.captured_speed`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from moe.data.pools import SamplePool
from moe.device.torch_device import device_name
from moe.errors import one_line_errors
from moe.model.config import Size, Task
from moe.service.score.live import LiveWorkload
from moe.service.score.runner import Runner
from moe.service.traffic import TrafficConfig
from moe.training.weights import load_model
from moe.workload import Knobs

OVERLOAD = TrafficConfig(kind="poisson", low_load=2.0, high_load=2.0)
BARE_BATCHES = 8
"""Batches that take turns: the time of one depends on where its tokens are routed."""
BARE_DEPTH = 2
"""Batches in the device's queue while the model runs alone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    task: Task = "vision"
    size: Size = "tiny"
    device: Literal["cpu", "cuda"] = "cpu"
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256)
    expert_count: int = 4
    seconds: float = 3.0
    """Time per measurement; bare and live take turns, `rounds` times."""
    rounds: int = 3


@dataclass(frozen=True)
class Terms:
    """Terms of service under which nothing is late or given up."""

    deadline_s: tuple[float, float] = (1e6, 1e6)
    max_wait_s: tuple[float, float] = (1e3, 1e3)
    expire_after_s: tuple[float, float] = (1e6, 1e6)


def bare_rps(runner: Runner, batch_size: int, expert_count: int, seconds: float) -> float:
    """Requests per second of the model alone, on resident batches of the service's own samples."""
    index = torch.arange(BARE_BATCHES * batch_size, device=runner.device) % len(runner.samples)
    batches = runner.samples.take(0, runner.order[index])[0].split(batch_size)
    done, queue = 0, []
    start = time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() < start + seconds:
            runner.answer(batches[done % BARE_BATCHES], expert_count, 0.0)
            done += 1
            if runner.device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
                queue.append(event)
                if len(queue) > BARE_DEPTH:
                    queue.pop(0).synchronize()
    runner.synchronize()
    return done * batch_size / (time.perf_counter() - start)


def live_rps(live: LiveWorkload, batch_size: int, expert_count: int, seconds: float) -> float:
    """Requests per second of the live service, in intervals of a second, after one to fill the queue."""
    live.reset(0)
    knobs = Knobs(batch_size=batch_size, expert_count=expert_count)
    live.run(knobs, 1.0)
    start = time.perf_counter()
    stats = [live.run(knobs, 1.0) for _ in range(max(1, round(seconds)))]
    elapsed_s = time.perf_counter() - start
    return sum(sum(s.answered) for s in stats) / elapsed_s


def main(options: Options) -> None:
    """Compare, print a table and one line of JSON."""
    model = load_model(options.task, options.size, options.device)
    samples = SamplePool(options.task, ("clean",), options.device)
    rows = []
    for n in tqdm(options.batch_sizes, desc="batch sizes", mininterval=1.0):
        k = options.expert_count
        runner = Runner(model, samples, options.device)
        bare_rps(runner, n, k, 0.5)
        capacity = bare_rps(runner, n, k, 0.5)
        episode_s = 2 + round(options.seconds)
        live = LiveWorkload(runner, OVERLOAD, capacity, episode_s, Terms())
        live.warm_up([n], [k], 0)
        bare, served = 0.0, 0.0
        for _ in range(options.rounds):  # taking turns: a drift of the machine touches both
            bare += bare_rps(runner, n, k, options.seconds) / options.rounds
            served += live_rps(live, n, k, options.seconds) / options.rounds
        live.close()
        rows.append(
            {"batch_size": n, "bare_rps": round(bare), "live_rps": round(served), "share": served / bare}
        )
    table = Table(
        "batch size", "bare requests/s", "live requests/s", "live / bare", title=device_name(runner.device)
    )
    for row in rows:
        table.add_row(
            str(row["batch_size"]), str(row["bare_rps"]), str(row["live_rps"]), f"{row['share']:.1%}"
        )  # fmt: skip
    Console().print(table)
    print(
        json.dumps(
            {"task": options.task, "size": options.size, "expert_count": options.expert_count, "rows": rows}
        )
    )


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
