"""The seam of compiled services: what the batched core asks of one, whatever it serves.

A service is a `NamedTuple` of arrays that says what does not change, another that holds what it carries from
interval to interval, and two functions over both, `start` and `serve`. Compiled code chooses the functions by
the type of the first, so the core is compiled once per kind of service and calls them directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from numba.core import types
from numba.extending import overload

from moe.compiled import fill, held, inlined, jit
from moe.service.queueing import SLOT_S
from moe.workload import LATENCY_EDGES_S

HISTOGRAM_BINS = len(LATENCY_EDGES_S) + 1


@dataclass(frozen=True)
class Service:
    """A service of a problem, ready for compiled code."""

    fixed: NamedTuple
    """What does not change: arrays and numbers. Its type is one that `implement` was told of."""
    knobs: tuple[str, ...]
    """Those that it reads."""
    new_state: Callable[[int], Any]
    """State of so many servers: a `NamedTuple` of arrays [n, ...], which `start` fills."""
    histograms: int = 1
    """Of latencies, one behind the other: of whole answers; a service of tokens also has times to first token
    and per output token (`TPOT_EDGES_S`)."""


def start(fixed, seed, state, i):
    """Begin an episode in server `i`: an idle device, an empty queue.

    Args:
        fixed: `Service.fixed`.
        seed: uint64, of the episode: what the service draws beside the arrivals follows from it.
        state: what `Service.new_state` made; row `i` is filled.
        i: number of the server.
    """
    raise NotImplementedError("compiled code calls what `implement` was given")


@inlined
def slowest(clocks):
    """The least of clock fractions [D]: that of devices that work in step."""
    least = clocks[0]
    for d in range(1, clocks.shape[0]):
        least = min(least, clocks[d])
    return least


def serve(
    fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, state, i, work, histogram,
    slot_energy,
):  # fmt: skip
    """Serve one interval of the request stream in server `i`.

    Args:
        fixed: `Service.fixed`.
        knobs: record of `thermoe_env.problem.knobs.VALUE_DTYPE`, the knobs in force.
        index: record of `INDEX_DTYPE`, their levels; of `pace` what is in force may be less.
        arrivals: int32 [2, slots + 1], the whole stream.
        first_slot: slot in which the interval begins.
        shift: index of the input shift in force.
        clocks: float [D], clock fractions at which the devices run: the knob's or what throttling leaves.
        open_classes: how many classes of requests may be begun, see `moe.workload.Workload.run`.
        state: row `i` is updated.
        i: number of the server.
        work: record of `moe.workload.WORK_DTYPE`, zeroed by the caller; filled.
        histogram: int64 [bins of all histograms], added to; without bins no latencies are recorded.
        slot_energy: float [slots per interval, D]; filled with J above idle of each device.
    """
    raise NotImplementedError("compiled code calls what `implement` was given")


def implement(fixed: type, start_one: Any, serve_one: Any) -> None:
    """Let compiled code call `start_one` and `serve_one` where it is handed a `fixed` of this type.

    Args:
        fixed: the `NamedTuple` class of `Service.fixed`.
        start_one: a plain function that can be compiled.
        serve_one: likewise.
    """

    def is_meant(given: Any) -> bool:
        return isinstance(given, types.NamedTuple | types.NamedUniTuple) and given.instance_class is fixed

    @overload(start, jit_options={"error_model": "numpy"})
    def _start(fixed, seed, state, i):
        return start_one if is_meant(fixed) else None

    @overload(serve, jit_options={"error_model": "numpy"})
    def _serve(
        fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, state, i, work, histogram,
        slot_energy,
    ):  # fmt: skip
        return serve_one if is_meant(fixed) else None


@cache
def single_server(kind: Any) -> tuple[Any, Any]:
    """`start` and `serve` of one server alone, in memory that stays where it is.

    Args:
        kind: of a `Held` of (`Service.fixed`, its state, arrivals, shifts in force [seconds], work, its
            memory).

    Returns:
        (`start` of (address, seed), `serve` of (address, knobs, index, first slot, clocks [D], open classes,
        histogram, slot energy)); records come as arrays of one, which cross into compiled code cheaper.
    """

    @jit
    def start_single(address, seed):
        fixed, state, _, _, _, _ = held(address, kind)
        start(fixed, seed, state, 0)

    @jit
    def serve_single(address, knobs, index, first_slot, clocks, open_classes, histogram, slot_energy):
        fixed, state, arrivals, shift_id, work, work_row = held(address, kind)
        fill(work_row, 0.0)
        serve(
            fixed, knobs[0], index[0], arrivals, first_slot, shift_id[int(first_slot * SLOT_S)], clocks,
            open_classes, state, 0, work[0], histogram, slot_energy,
        )  # fmt: skip

    return start_single, serve_single
