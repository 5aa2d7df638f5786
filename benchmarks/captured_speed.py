"""What CUDA graphs are worth to single answers: `python -m benchmarks.captured_speed --size base`.

The live service's runner, twice over the same model and samples: once with its graphs captured, once without,
so that every batch is launched kernel by kernel. Both take turns within each round. Of each batch size and
number of experts per token: how long a launch holds the host; how long the device works on a batch among
others, back to back; and how long a batch alone takes from launch to answer when the host slept before it.
On a CPU there are no graphs, and both are the same but for noise.
"""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from moe.data.pools import SamplePool
from moe.device.torch_device import device_name
from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from moe.model.config import Size, Task
from moe.service.score.runner import Batch, Runner
from moe.training.weights import load_model
from moe.workload import Knobs

FORMS = ("launched", "captured")
TIMES = {
    "call_ms": "host per launch",
    "device_ms": "device, back to back",
    "alone_ms": "alone, after a sleep",
}
DEPTH = 2
"""Batches in the device's queue, back to back; as in the live service."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure on this machine."""

    task: Task = "vision"
    size: Size = "base"
    device: Literal["cpu", "cuda"] = "cuda"
    batch_sizes: tuple[int, ...] = (1, 64, 65, 128, 256, 257, 512, 1024, 1025, 1536, 2048, 2560, 4096)
    """Those just above a size of a graph fill up most."""
    expert_counts: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 5
    batches: int = 20
    """Per form and round, back to back; a fifth of them alone."""
    sleep_s: float = 0.02
    """Before a batch alone."""
    out: Path | None = None
    """JSON to write."""


def main(options: Options) -> None:
    """Compare, print a table, write the JSON."""
    if options.out is not None:
        refuse_unwritable(options.out)
    model = load_model(options.task, options.size, options.device)
    samples = SamplePool(options.task, ("clean",), options.device)
    runners = {form: Runner(model, samples, options.device) for form in FORMS}
    start = time.perf_counter()
    runners["captured"].capture(max(options.batch_sizes), options.expert_counts)
    capture_s = time.perf_counter() - start
    memory_bytes = runners["captured"].graph_memory_bytes
    forms = [(n, k) for k in options.expert_counts for n in options.batch_sizes]
    rows = [compare(runners, n, k, options) for n, k in tqdm(forms, desc="batches", mininterval=1.0)]
    device = device_name(runners["captured"].device)
    columns = [f"{what}, {form}" for what in TIMES.values() for form in FORMS]
    table = Table("batch size", "experts", *columns, title=f"{device}: ms, median (95% of batches below)")
    for row in rows:
        times = [row[f"{form}_{name}"] for name in TIMES for form in FORMS]
        cells = [f"{median:.2f} ({most:.2f})" for median, most in times]
        table.add_row(str(row["batch_size"]), str(row["expert_count"]), *cells)
    Console().print(table)
    print(f"captured in {capture_s:.1f} s; the graphs hold {memory_bytes / 1e9:.2f} GB")
    record = {
        "machine": device, "torch": torch.__version__, "task": options.task, "size": options.size,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "capture_s": capture_s,
        "graph_memory_bytes": memory_bytes, "rows": rows,
    }  # fmt: skip
    print(json.dumps(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def compare(
    runners: dict[str, Runner], batch_size: int, expert_count: int, options: Options
) -> dict[str, Any]:
    """Median and 95th percentile of each time of each form, in milliseconds."""
    knobs = Knobs(batch_size=batch_size, expert_count=expert_count)
    seconds: dict[str, list[float]] = {f"{form}_{name}": [] for form in FORMS for name in TIMES}
    for runner in runners.values():
        back_to_back(runner, knobs, 3)  # the first run of a shape compiles and allocates
    for round_ in range(options.rounds):
        for form in FORMS if round_ % 2 else FORMS[::-1]:
            calls, device = back_to_back(runners[form], knobs, options.batches)
            seconds[f"{form}_call_ms"] += calls
            seconds[f"{form}_device_ms"] += device
            alone = [
                one_alone(runners[form], knobs, options.sleep_s) for _ in range(-(-options.batches // 5))
            ]
            seconds[f"{form}_alone_ms"] += alone
    row: dict[str, Any] = {"batch_size": batch_size, "expert_count": expert_count}
    return row | {name: (1e3 * np.quantile(values, [0.5, 0.95])).tolist() for name, values in seconds.items()}


def back_to_back(runner: Runner, knobs: Knobs, batches: int) -> tuple[list[float], list[float]]:
    """Seconds that each launch held the host, and that the device worked on each batch but the first."""
    calls, device, queue = [], [], []
    for i in range(batches):
        start = time.perf_counter()
        queue.append(runner.launch([(i * knobs.batch_size, (i + 1) * knobs.batch_size)], 0, knobs))
        calls.append(time.perf_counter() - start)
        if len(queue) == DEPTH:
            device.append(_answer_s(queue.pop(0)))
    runner.synchronize()
    device += [_answer_s(batch) for batch in queue]
    return calls, device[1:]


def one_alone(runner: Runner, knobs: Knobs, sleep_s: float) -> float:
    """Seconds from launch to answer after a sleep."""
    time.sleep(sleep_s)
    start = time.perf_counter()
    runner.launch([(0, knobs.batch_size)], 0, knobs)
    runner.synchronize()
    return time.perf_counter() - start


def _answer_s(batch: Batch) -> float:
    while not batch.done():
        pass
    return batch.result().answer_s


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
