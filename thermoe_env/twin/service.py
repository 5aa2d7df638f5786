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

import numpy as np
from numba.core import types
from numba.extending import overload

from moe.compiled import copy_row, fill, inlined, jit
from moe.memory import Lent, call, held, numbers
from moe.service.queueing import SLOT_S
from moe.service.traffic import Traffic, fill_stream
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
    fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, promised_s, state, i, work,
    histogram, slot_energy,
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
        promised_s: time per output token promised to interactive requests whose answers end now.
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
        kind = given.kind if isinstance(given, Lent) else given
        return isinstance(kind, types.NamedTuple | types.NamedUniTuple) and kind.instance_class is fixed

    @overload(start, jit_options={"error_model": "numpy"})
    def _start(fixed, seed, state, i):
        return start_one if is_meant(fixed) else None

    @overload(serve, jit_options={"error_model": "numpy"})
    def _serve(
        fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, promised_s, state, i, work,
        histogram, slot_energy,
    ):  # fmt: skip
        return serve_one if is_meant(fixed) else None


class Serving(NamedTuple):
    """A service and its servers [n], and all that they read and write."""

    service: Any
    """`Service.fixed`."""
    servers: Any
    """What `Service.new_state` made."""
    traffic: Traffic
    arrivals: np.ndarray
    """int32 [n, 2, slots + 1], as in `moe.service.traffic.RequestStream`."""
    shift: np.ndarray
    """int64 [n, seconds]: input shift in force."""
    levels: np.ndarray
    """Records of `thermoe_env.problem.knobs.INDEX_DTYPE` [n]."""
    knobs: np.ndarray
    """Records of `VALUE_DTYPE` [n]: those in force."""
    clocks: np.ndarray
    """float64 [n, D]: clock fractions, before an interval those that throttling leaves."""
    work: np.ndarray
    """Records of `moe.workload.WORK_DTYPE` [n]."""
    histogram: np.ndarray
    """int64 [n, bins]."""
    slot_energy: np.ndarray
    """float64 [n, slots, D]: J above idle."""


@cache
def serving_rows(kind: Any) -> tuple[Any, Any]:
    """What begins an episode in one server of a `Serving` of some type, and what serves an interval.

    Args:
        kind: of a `Held` of it.

    Returns:
        (`start_row` of (address, seed, number of the server), `serve_row` of (address, number of the server,
        first slot, open classes, promised time per token), which runs at the knob's clock at most)
    """

    @jit
    def start_row(address, seed, i):
        here = held(address, kind)
        fill_stream(here.traffic, seed, here.arrivals[i], here.shift[i])
        start(here.service, seed, here.servers, i)

    @jit
    def serve_row(address, i, first_slot, open_classes, promised_s):
        here = held(address, kind)
        work, knobs, clocks, histogram = here.work[i], here.knobs[i], here.clocks[i], here.histogram[i]
        fill(numbers(work), 0.0)
        fill(histogram, 0)
        for d in range(clocks.shape[0]):
            clocks[d] = min(clocks[d], knobs.sm_clock)
        serve(
            here.service, knobs, here.levels[i], here.arrivals[i], first_slot,
            here.shift[i, int(first_slot * SLOT_S)], clocks, open_classes, promised_s, here.servers, i, work,
            histogram, here.slot_energy[i],
        )  # fmt: skip

    return start_row, serve_row


class Asked(NamedTuple):
    """Knobs that are asked for."""

    levels: np.ndarray
    """One record of `INDEX_DTYPE`, an array."""
    values: np.ndarray
    """One of `VALUE_DTYPE`."""


@cache
def serve_alone(kind: Any, asked_kind: Any) -> Any:
    """`serve_row` of `serving_rows` at knobs that are asked for, for a `Serving` of one server.

    Args:
        kind: of a `Held` of it.
        asked_kind: of a `Held` of an `Asked`.

    Returns:
        The function of (address of `serve_row`, address of the one, of the other, first slot, open classes,
        promised time per token).
    """

    @jit
    def serve_one(serve_row, address, asked_address, first_slot, open_classes, promised_s):
        here, asked = held(address, kind), held(asked_address, asked_kind)
        copy_row(numbers(here.levels[0]), numbers(asked.levels[0]))
        copy_row(numbers(here.knobs[0]), numbers(asked.values[0]))
        call(serve_row, (address, 0, first_slot, open_classes, promised_s), types.none)

    return serve_one
