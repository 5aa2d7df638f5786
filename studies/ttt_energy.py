"""What a phase of adaptation costs, each phase by itself: over many ticks of the energy counter.

The counter ticks every 100 ms and a phase lasts milliseconds, so a phase is repeated until many ticks are
over, and its energy is that between two ticks by the number of repetitions. How well the phases add up is
told by a run that mixes them, measured in the same way. Idle power is taken off: kernels of small batches are
launched one by one, and how long the device waits for the next is the host's mood. Without a meter the cost
is device time, in seconds.
All is weighed several times over, one after the other, so that the spread holds what drifts meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from moe import ttt
from moe.device.meter import EnergyMeter
from moe.model.transformer import MoEModel
from moe.ttt.groups import batch_statistics_in_force
from studies.ttt_meter import WARM_S
from studies.ttt_play import Batch

WARM_REPETITIONS = 3
"""Before a phase is measured: the first ones compile and allocate."""
TENT = "tent"
"""Name of the method that is weighed by its phases, too."""
WEIGHINGS = 3
"""How often all is weighed, for the spread."""
SNAPSHOT_EVERY = 4
"""Batches of the mixed run between a snapshot that is taken and put back."""


@dataclass
class Costs:
    """Cost per batch, in joules above idle, or in seconds where there is no meter.

    Attributes:
        phases: Of `serve`, `guard`, `snapshot`, `swap`, and of TENT's `forward`, `backward` and `update`.
        steps: Of a whole step of each method, unguarded, behind an answer.
        mixed: Of the mixed run, by the counter, and what its phases add up to; both per batch.
    """

    phases: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    mixed: dict[str, float] = field(default_factory=dict)


class Scale:
    """Weighs a load by repeating it: energy from tick to tick, or time."""

    def __init__(
        self, meter: EnergyMeter | None, device: torch.device, window_s: float, idle_w: float = 0.0
    ) -> None:
        self._meter, self._cuda, self._window_s = meter, device.type == "cuda", window_s
        self._idle_w = idle_w

    def weigh(self, load: Callable[[], object]) -> float:
        """Return the cost of a load, mean over the repetitions of a window."""
        for _ in range(WARM_REPETITIONS):
            load()

        def repeat() -> None:
            load()
            self._wait()

        if self._meter is not None:
            until = time.perf_counter() + WARM_S
            while time.perf_counter() < until:
                repeat()
            joules, seconds = self._meter.per_run(repeat, self._window_s)
            return joules - self._idle_w * seconds
        self._wait()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() < begin + self._window_s:
            repeat()
            count += 1
        return (time.perf_counter() - begin) / count

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def measure_costs(
    model: MoEModel,
    batches: Sequence[Batch],
    methods: Iterable[str],
    make: Callable[[str], ttt.Adapter],
    scale: Scale,
) -> Costs:
    """Weigh each phase and the steps of each method on the batches of a stream, over and over.

    Args:
        model: In the state in which it was trained, and so afterwards.
        batches: Which steps are taken on: what a method selects depends on them.
        methods: Names; TENT must be among them.
        make: Gives an unguarded adapter of the model by its name; the one made last is in charge.
        scale: Weighs the loads.
    """
    costs = Costs()
    ring = itertools.cycle(batches)

    @torch.no_grad()
    def answer(batch: Batch) -> Tensor:
        return model(batch.inputs).logits

    costs.phases["serve"] = scale.weigh(lambda: answer(next(ring)))
    answered = [(batch.inputs, answer(batch)) for batch in batches]
    for name in methods:
        adapter, given = make(name), itertools.cycle(answered)
        costs.steps[name] = scale.weigh(partial(_step, adapter, given))
        adapter.reset()
    tent = make(TENT)
    costs.phases |= _tent_phases(model, batches[0], tent, scale)
    costs.phases["guard"] = _guard_phase(model, answered, tent, scale)
    costs.phases["snapshot"] = scale.weigh(tent.snapshot)
    saved, number = tent.snapshot(), itertools.count()
    costs.phases["swap"] = scale.weigh(lambda: tent.restore(saved))

    def mixed() -> None:
        batch = next(ring)
        tent.adapt(batch.inputs, answer(batch), 1)
        if next(number) % SNAPSHOT_EVERY == 0:
            tent.restore(tent.snapshot())

    copies = (costs.phases["snapshot"] + costs.phases["swap"]) / SNAPSHOT_EVERY
    added_up = costs.phases["serve"] + costs.steps[TENT] + copies
    costs.mixed = {"measured": scale.weigh(mixed), "added_up": added_up}
    tent.reset()
    return costs


def _step(adapter: ttt.Adapter, given: Iterator[tuple[Tensor, Tensor]]) -> None:
    inputs, answers = next(given)
    adapter.adapt(inputs, answers, 1)


def _tent_phases(model: MoEModel, batch: Batch, tent: ttt.Adapter, scale: Scale) -> dict[str, float]:
    """Weigh the forward pass with its graph, the backward pass of one graph, and the optimizer's step."""
    optimizer = tent.state.descent

    def forward() -> Tensor:
        with torch.enable_grad(), batch_statistics_in_force(model):
            return model(batch.inputs).entropy.mean()

    loss = forward()
    found = {
        "forward": scale.weigh(forward),
        "backward": scale.weigh(lambda: loss.backward(retain_graph=True)),
        "update": scale.weigh(optimizer.step),
    }
    tent.reset()
    return found


def _guard_phase(
    model: MoEModel, answered: Sequence[tuple[Tensor, Tensor]], tent: ttt.Adapter, scale: Scale
) -> float:
    """Weigh what a guard does around a step that does nothing."""
    guard, ring = ttt.Guard(model, tent.state), itertools.cycle(answered)

    def judge() -> None:
        guard.step(lambda *_: ttt.Step(selected=1), *next(ring), tent.settings)

    return scale.weigh(judge)
