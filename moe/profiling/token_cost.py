"""Time and energy of a step, cell by cell, at the service's own cadence.

Rows stay where they are and are launched over and over, a few steps ahead of the device, as the service does.
While the energy counter is read the device runs dry, so a card's steps are timed by their own events.
Decode rows lie at a context each; prompt rows are the chunk that ends there. Before the first cell the text
of every slot is read: rows attend to it and choose the experts that they would choose in service.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean, pstdev
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from moe.device.meter import EnergyMeter
from moe.lm.config import AHEAD, readable_experts
from moe.lm.engine.blocks import blocks_for
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows
from moe.lm.engine.step import Step
from moe.profiling.token_quality import read_prompts
from moe.token_profile import CostCell

WINDOW_S, WARM_S = 0.3, 0.05
"""Length of a visit of a cell, and of the load before the first."""
BURST_S = 0.008
"""Steps are launched for so long between readings of the energy counter."""
VISITS = 2
"""Of each cell, one behind the other."""
CPU_STEPS = 3
"""Least steps of a visit on a CPU."""
COPY_BYTES = 4 * 2**30
GOLDEN = 0.6180339887498949
"""Steps of this share of the documents cover all domains evenly, however many are taken."""
BIASES, MORE_BIASES = (0.0, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)
"""Routing biases whose numbers of readable experts are measured; the second in a thorough run."""


class Place(NamedTuple):
    """Where a cell is measured; see `CostCell`."""

    decode_rows: int
    prefill_rows: int
    context: int
    top_k: int
    readable: int
    held_out: bool = False


def places(engine: Engine, *, thorough: bool) -> list[Place]:
    """The cells of a device, those of a fit and some to judge it; `thorough` takes a finer grid.

    What the engine has no room for is left out.
    """
    c = engine.model.config
    cuda = engine.documents.is_cuda
    running = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if cuda else (1, 4, 16, 48)
    # Of prompts' rows, and how many of them a prompt has: one prompt, or several.
    chunks = ((64, 64), (256, 256), (512, 512), (512, 256), (1024, 256)) if cuda else ((16, 16), (64, 64))
    contexts = (768, 300) if cuda else (512, 128)
    biases = MORE_BIASES if thorough else BIASES
    top_ks = tuple(k for k in (8, 4, 2, 1) if k <= c.top_k)
    last = engine.documents.shape[1] - 2
    fitted: list[Place] = []
    for n, context in itertools.product(running, contexts if thorough else contexts[-1:]):
        fitted += [
            Place(n, 0, min(context, last), k, readable_experts(bias, c.n_experts, k))
            for k, bias in itertools.product(top_ks, biases if n > 1 else (0.0,))
        ]
    for n in running[1::2]:  # how the context counts
        fitted.append(Place(n, 0, min(contexts[0], last), c.top_k, c.n_experts))
    for (chunk, prompt), k in itertools.product(chunks, top_ks):
        fitted += [
            Place(n, min(chunk, engine.max_rows - n), min(prompt, last), k, c.n_experts)
            for n in ((0, 32, 128) if cuda else (0, running[-3]))
        ]
    held_out = [
        Place(n, chunk, min(context, last), k, max(k, round(share * c.n_experts)), held_out=True)
        for n, chunk, context, k, share in (
            ((3, 0, 400, 8, 1.0), (24, 0, 400, 4, 0.6), (48, 0, 300, 8, 0.4), (96, 0, 500, 2, 1.0),
             (192, 0, 300, 8, 0.3), (384, 0, 500, 4, 0.8), (48, 128, 300, 8, 1.0), (200, 384, 400, 4, 1.0))
            if cuda
            else ((8, 0, 200, 4, 1.0), (24, 0, 300, 2, 0.5), (8, 32, 100, 4, 1.0))
        )
        if k <= c.top_k
    ]  # fmt: skip
    return [place for place in dict.fromkeys([*fitted, *held_out]) if _has_room(engine, place)]


def _has_room(engine: Engine, place: Place) -> bool:
    sequences = _sequences(place)
    blocks = sequences * blocks_for(engine.documents.shape[1] - 1)
    return (
        place.decode_rows + place.prefill_rows <= engine.max_rows
        and sequences <= engine.blocks.slots
        and blocks <= engine.blocks.n_blocks
    )


def measure_places(
    engine: Engine, wanted: Sequence[Place], meter: EnergyMeter | None, idle_w: float | None, seed: int,
    kept: dict[Place, CostCell], save: Callable[[], None], *, window_s: float = WINDOW_S,
) -> None:  # fmt: skip
    """Measure what is not measured yet, in random order.

    Args:
        engine: captured; it is emptied.
        wanted: cells.
        meter: of the card; None measures time alone.
        idle_w: power that is taken off, in watts; None without a meter.
        seed: of the order.
        kept: cells by place; what is there already is not measured again.
        save: called after each cell.
        window_s: length of a visit.
    """
    missing = [place for place in wanted if place not in kept]
    if missing:
        read_texts(engine, max(map(_sequences, missing)), max(place.context for place in missing))
    order = np.random.default_rng(seed).permutation(len(missing))
    for number in tqdm(order, desc="cost", unit="cell", delay=2.0):
        place = missing[number]
        kept[place] = measure_place(engine, place, meter, idle_w, window_s)
        save()


def measure_place(
    engine: Engine, place: Place, meter: EnergyMeter | None, idle_w: float | None, window_s: float = WINDOW_S
) -> CostCell:
    """Measure one cell, `VISITS` times in a row.

    Args:
        engine: captured and empty, its texts read (`read_texts`); it is empty again afterwards.
        place: of the cell; the engine has room for it.
        meter: of the card; None measures time alone.
        idle_w: power that is taken off, in watts; None without a meter.
        window_s: length of a visit.

    Raises:
        GpuLostError: the device stopped answering.
        ReadingError: its counter says what cannot be.
    """
    rows, load = rows_of(engine, place), _Load(engine)

    def launch() -> None:
        """Launch for a while: between readings of the counter, which cost about what is launched ahead."""
        load.launch_for(BURST_S, rows, place)

    try:
        _for_s(launch, WARM_S)
        engine.usage()
        before = load.launched
        visits = [_visit(load, launch, meter, idle_w or 0.0, window_s) for _ in range(VISITS)]
        _, reads = engine.usage()
    finally:
        engine.reset()
    step_s = [visit[0] for visit in visits]
    energy_j = [joules for _, joules in visits if joules is not None]
    return CostCell(
        **place._asdict(),
        experts_read=float(reads.sum()) / (load.launched - before) / len(reads),
        step_s=mean(step_s), step_spread=pstdev(step_s) / mean(step_s),
        energy_j=mean(energy_j) if energy_j else None,
        energy_spread=pstdev(energy_j) / abs(mean(energy_j)) if energy_j else None,
    )  # fmt: skip


class _Load:
    """Steps that are launched one behind the other.

    Attributes:
        launched: How many.
        ended: Those whose time is known.
        busy_s: Time of the device that these took.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._flying: deque[Step] = deque()
        self.launched = self.ended = 0
        self.busy_s = 0.0

    def launch_for(self, seconds: float, rows: Rows, place: Place) -> None:
        """Launch one step, and more until so much time is over."""
        end = time.perf_counter() + seconds
        while True:
            self._flying.append(self._engine.launch(rows, place.top_k, place.readable))
            self.launched += 1
            if len(self._flying) > AHEAD:  # the engine has waited for it
                self.busy_s += self._flying.popleft().duration_s
                self.ended += 1
            if time.perf_counter() >= end:
                return


def read_texts(engine: Engine, sequences: int, positions: int) -> None:
    """Read the first positions of so many sequences' texts into the cache, and empty the engine.

    After a reset slots and blocks are given in the same order, so each cell finds its keys and values there.
    """
    engine.reset()
    slots = _reserve(engine, sequences)
    lengths = np.full(sequences, positions)
    read_prompts(engine, slots, _documents(engine, slots), lengths, engine.model.config.top_k)
    engine.reset()


def rows_of(engine: Engine, place: Place) -> Rows:
    """Rows of a cell in an empty engine, whose slots they reserve."""
    slots = _reserve(engine, _sequences(place))
    slot, position = [slots[: place.decode_rows]], [np.full(place.decode_rows, place.context, np.int32)]
    left = place.prefill_rows
    for number in slots[place.decode_rows :]:
        taken = min(left, place.context)
        slot.append(np.full(taken, number, np.int32))
        position.append(np.arange(place.context - taken, place.context, dtype=np.int32))
        left -= taken
    of_rows = np.concatenate(slot)
    return Rows(of_rows, np.concatenate(position), _documents(engine, of_rows))


def _documents(engine: Engine, slots: np.ndarray) -> np.ndarray:
    """Document of each slot, int32: all domains, which lie one behind the other, as quality has them."""
    return (slots * GOLDEN % 1.0 * len(engine.documents)).astype(np.int32)


def _sequences(place: Place) -> int:
    """Sequences that decode, and those of whose prompts the chunk is."""
    return place.decode_rows + math.ceil(place.prefill_rows / place.context)


def _reserve(engine: Engine, sequences: int) -> np.ndarray:
    """Slots for whole documents, int32.  # [sequences]."""
    longest = engine.documents.shape[1] - 1
    return np.array([engine.reserve(longest) for _ in range(sequences)], np.int32)


def copy_bytes_per_s(device: torch.device) -> float | None:
    """Bytes read and written per second by a large copy on a card; None on a CPU."""
    if device.type != "cuda":
        return None
    x = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    x.random_(generator=torch.Generator(device).manual_seed(0))
    y = torch.empty_like(x)
    y.copy_(x)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(20):
        y.copy_(x)
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * COPY_BYTES / (start.elapsed_time(end) / 1e3)


def _visit(
    load: _Load, launch: Callable[[], None], meter: EnergyMeter | None, idle_w: float, window_s: float
) -> tuple[float, float | None]:
    """Seconds and joules of a step."""
    if meter is None:
        first, begin = load.launched, time.perf_counter()
        while time.perf_counter() - begin < window_s or load.launched - first < CPU_STEPS:
            launch()
        return (time.perf_counter() - begin) / (load.launched - first), None
    start = meter.next_tick(launch)
    first, ended, busy_s = load.launched, load.ended, load.busy_s
    # As many steps are under way at either tick, so their number cancels.
    end = meter.next_tick(launch, start.time_s + window_s - 0.05)
    joules = end.energy_j - start.energy_j - idle_w * (end.time_s - start.time_s)
    return (load.busy_s - busy_s) / (load.ended - ended), joules / (load.launched - first)


def _for_s(run: Callable[[], None], seconds: float) -> None:
    end = time.perf_counter() + seconds
    run()
    while time.perf_counter() < end:
        run()
