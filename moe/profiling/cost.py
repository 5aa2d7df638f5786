"""What work costs here: time and energy of micro-batches and of adaptation steps, under load.

Every cell is measured with its work back to back, so that the device is as warm and as clocked as in service.
Index letters as in `moe.profiles`.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from moe.device.meter import EnergyMeter
from moe.service.score.runner import Runner
from moe.workload import Knobs

WARM_S = 0.1
"""Load before a window opens: power follows a change of load within about this time."""
REST_S = 0.1
"""Idle time before that on a metered device, so that a hot cell does not heat the next one's window."""
LEAST_UNITS = 3
"""Units of work in a window at least, however long they take."""
LEAST_VISITS, MOST_VISITS = 2, 8
"""Visits of a cell: at least two, for a spread. What time is left goes to the least certain cells."""
IDLE_S = 1.0


class Cell(NamedTuple):
    """One kind of work; `ttt` cells are adaptation steps alone."""

    batch_size: int
    expert_count: int
    routing_bias: float
    ttt: bool


class Visit(NamedTuple):
    """One measurement of a cell."""

    latency_s: float
    """Median device time of a unit of work."""
    units_per_s: float
    power_w: float
    """Mean power over the window, idle included; NaN without a meter."""
    start_temperature_c: float
    """Of the die before the load; NaN without a meter."""


@dataclass(frozen=True)
class Costs:
    """Medians of a cell's visits: a disturbance from outside should not count."""

    latency_s: float
    latency_spread: float
    """Standard deviation of the visits' latencies over their median."""
    energy_j: float
    """Per unit of work, above idle; NaN without a meter."""
    energy_spread: float
    visits: int
    start_temperature_c: float
    """Mean over the visits."""

    @property
    def uncertainty(self) -> float:
        """Relative standard error of the less certain of the two."""
        spreads = [self.latency_spread, self.energy_spread]
        return float(np.nanmax(spreads)) / self.visits**0.5


class Load:
    """Work of one kind, back to back: `step` over and over keeps the device's queue `DEPTH` units long."""

    DEPTH = 2

    def __init__(self, runner: Runner, cell: Cell) -> None:
        self._runner, self._cell = runner, cell
        self._knobs = Knobs(
            batch_size=cell.batch_size,
            expert_count=cell.expert_count,
            routing_bias=cell.routing_bias,
            ttt_steps=int(cell.ttt),
        )
        self._first = 0
        self._queue: deque[tuple[Callable[[], bool], Callable[[], float]]] = deque()
        self.latencies_s: list[float] = []
        self.done_at: list[float] = []

    def step(self) -> None:
        """Launch a unit if there is room, and note what is done."""
        if len(self._queue) < self.DEPTH:
            self._queue.append(self._adapt() if self._cell.ttt else self._answer())
        elif not self._queue[0][0]():
            time.sleep(1e-4)
        self._collect()

    def drain(self) -> None:
        """Wait for the queue to empty."""
        while self._queue:
            self._collect()

    def _collect(self) -> None:
        while self._queue and self._queue[0][0]():
            _, latency_s = self._queue.popleft()
            self.latencies_s.append(latency_s())
            self.done_at.append(time.perf_counter())

    def _answer(self) -> tuple[Callable[[], bool], Callable[[], float]]:
        first, self._first = self._first, self._first + self._cell.batch_size
        batch = self._runner.launch([(first, self._first)], 0, self._knobs)
        return batch.done, lambda: batch.result().answer_s

    def _adapt(self) -> tuple[Callable[[], bool], Callable[[], float]]:
        runner, images = self._runner, self._runner.samples.inputs[0, : self._cell.batch_size]
        # Made-up answers, doubtful and spread evenly: the guard works as in service and objects to none.
        n_classes = runner.model.config.n_classes
        answers = torch.eye(n_classes, device=runner.device)[torch.arange(len(images)) % n_classes]  # [B, C]
        start = time.perf_counter()
        runner.adapt(images, answers, self._knobs)
        runner.synchronize()
        latency_s = time.perf_counter() - start
        return lambda: True, lambda: latency_s


def visit(runner: Runner, cell: Cell, meter: EnergyMeter | None, window_s: float) -> Visit:
    """Measure a cell once, over about `window_s` or `LEAST_UNITS` units of work."""
    if meter is not None:
        time.sleep(REST_S)
    start_c = float("nan") if meter is None else meter.gpu.temperature_c()
    load = Load(runner, cell)
    warm_until = time.perf_counter() + min(WARM_S, window_s)
    while time.perf_counter() < warm_until or not load.latencies_s:
        load.step()
    window_s = max(window_s, LEAST_UNITS * load.latencies_s[-1])
    warm_units = len(load.latencies_s)
    if meter is None:
        start_s, energy_j = time.perf_counter(), float("nan")
        while (end_s := time.perf_counter()) < start_s + window_s:
            load.step()
    else:
        start, end = meter.window(load.step, window_s)
        start_s, end_s, energy_j = start.time_s, end.time_s, end.energy_j - start.energy_j
    load.drain()
    runner.reset(0)
    # Ticks fall inside units: count the fractions too.
    units = np.diff(np.interp([start_s, end_s], load.done_at, np.arange(len(load.done_at))))[0]
    elapsed_s = end_s - start_s
    latency_s = float(np.median(load.latencies_s[warm_units:]))
    return Visit(latency_s, float(units / elapsed_s), energy_j / elapsed_s, start_c)


def measure_cells(
    runner: Runner,
    cells: Sequence[Cell],
    meter: EnergyMeter | None,
    window_s: float,
    within_s: float,
    idle_w: float,
    rng: np.random.Generator,
) -> dict[Cell, list[Visit]]:
    """Visit all cells in random order, `LEAST_VISITS` times: drift then is noise, not bias.

    Until `within_s` is over, the cell whose cost is least certain is then visited again, up to `MOST_VISITS`
    times. The least visits are made however long they take.
    """
    until = time.perf_counter() + within_s
    for cell in cells:  # the first run of a shape compiles and allocates
        load = Load(runner, cell)
        load.step()
        load.drain()
    runner.reset(0)
    visits: dict[Cell, list[Visit]] = {cell: [] for cell in cells}
    rounds = [cells[i] for _ in range(LEAST_VISITS) for i in rng.permutation(len(cells))]
    with tqdm(total=len(rounds), desc="cost", unit="window", mininterval=1.0) as bar:
        for cell in rounds:
            visits[cell].append(visit(runner, cell, meter, window_s))
            bar.update()
        while time.perf_counter() < until:
            open_cells = [cell for cell in cells if len(visits[cell]) < MOST_VISITS]
            if not open_cells:
                break
            cell = max(open_cells, key=lambda cell: costs(visits[cell], idle_w).uncertainty)
            visits[cell].append(visit(runner, cell, meter, window_s))
            bar.total = bar.n + 1
            bar.update()
    return visits


def costs(visits: Sequence[Visit], idle_w: float) -> Costs:
    """Cost of a cell, given the idle power to subtract."""
    latency_s = np.array([v.latency_s for v in visits])
    energy_j = np.array([(v.power_w - idle_w) / v.units_per_s for v in visits])
    spreads = [float(values.std(ddof=1) / np.median(values)) for values in (latency_s, energy_j)]
    return Costs(
        float(np.median(latency_s)), spreads[0], float(np.median(energy_j)), spreads[1], len(visits),
        float(np.mean([v.start_temperature_c for v in visits])),
    )  # fmt: skip


def serving_cells(
    batch_sizes: Sequence[int], expert_counts: Sequence[int], cost_biases: Sequence[float]
) -> list[Cell]:
    """Cells of the serving table."""
    return [Cell(n, k, r, False) for n, k, r in itertools.product(batch_sizes, expert_counts, cost_biases)]


def held_out_cells(
    batch_sizes: Sequence[int], expert_counts: Sequence[int], cost_biases: Sequence[float]
) -> list[Cell]:
    """Cells between those of the serving table, for the error of its interpolation.

    One just above the middle of every gap between batch sizes, and at the middle bias of every gap between
    biases one at a middle and one at the largest batch size; expert counts take turns. The middle itself may
    be the size of a graph, and a batch just above one costs most beyond the line.
    """
    counts = itertools.cycle(expert_counts)
    middles = [(a + b) // 2 + 1 for a, b in itertools.pairwise(batch_sizes) if b - a > 2]
    cells = [Cell(n, next(counts), cost_biases[0], False) for n in middles]
    for low, high in itertools.pairwise(cost_biases):
        for n in sorted({batch_sizes[len(batch_sizes) // 2], batch_sizes[-1]}):
            cells.append(Cell(n, next(counts), (low + high) / 2, False))
    return cells


def adaptation_cell(batch_size: int, expert_count: int, adapt_batch: int) -> Cell:
    """Cell of an adaptation step after a micro-batch: it looks at 2 to `adapt_batch` of its images."""
    return Cell(max(2, min(batch_size, adapt_batch)), expert_count, 0.0, True)


def fitting_batch_sizes(
    runner: Runner, batch_sizes: Sequence[int], expert_counts: Sequence[int]
) -> list[int]:
    """Batch sizes that fit the device's memory, graphs and all; also the first run of every shape."""
    fitting = sorted(batch_sizes)
    while fitting and not _fit(runner, fitting, expert_counts):
        torch.cuda.empty_cache()
        fitting.pop()
    return fitting


def _fit(runner: Runner, batch_sizes: Sequence[int], expert_counts: Sequence[int]) -> bool:
    """Capture and run batches of these sizes, ascending; returns whether there was memory for all."""
    try:
        runner.capture(batch_sizes[-1], expert_counts)
        for n, k in itertools.product(reversed(batch_sizes), expert_counts):
            runner.launch([(0, n)], 0, Knobs(batch_size=n, expert_count=k))
            runner.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True


def idle_power_w(meter: EnergyMeter) -> float:
    """Mean power with the model in memory and no work, after a second of rest."""
    time.sleep(1.0)
    start, end = meter.window(lambda: time.sleep(2e-3), IDLE_S)
    return (end.energy_j - start.energy_j) / (end.time_s - start.time_s)
