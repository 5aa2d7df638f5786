"""The seam between a service that answers requests and whoever steers it.

A `Workload` is reset with a seed, run for an interval under a set of `Knobs`, and says what
happened in a `WorkStats`. The live service (`moe.service.score.live`) and the profiled one
(`thermoe_env.twin.score`) are interchangeable behind it. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from moe.ranges import STRICT, Count, Share, Throttle, Whole

REQUEST_CLASSES = ("interactive", "deferrable")
"""Service order: class first, then arrival."""

LATENCY_EDGES_S = np.geomspace(1e-3, 240.0, 241)
"""Edges of the latency histogram: 5% wide bins from 1 ms to 240 s."""


TPOT_EDGES_S = LATENCY_EDGES_S / 10
"""Those of a histogram of times per output token."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Knobs:
    """What a policy sets for one control interval."""

    routing_bias: Share = 0.0
    """Strength of the cost term in the router's choice, 0 to 1."""
    batch_size: Count = 256
    """Requests per micro-batch."""
    expert_count: Count = 4
    """Experts per token (top-k)."""
    ttt_steps: Annotated[Whole, Field(ge=0, le=1000)] = 0
    """Adaptation steps after each micro-batch; of a service of tokens on each lesson (`moe.lm.adapt`)."""
    pace: Throttle = 1.0
    """Cap on the busy fraction of the device: after each batch it idles to keep below it."""
    sm_clock: Throttle = 1.0
    """SM clock as a fraction of the device's maximum."""
    admission: Share = 1.0
    """Share of the places of `batch_size` that deferrable requests may take; of a service of tokens."""

    def under(self, duty: float) -> Knobs:
        """What is in force of them where the device may run for at most this share of the time."""
        return self if self.pace <= duty else replace(self, pace=duty)


class KnobRefusedError(ValueError):
    """The live service cannot apply a knob's value; the message names the remedy."""


KNOBS: dict[str, tuple[str, str]] = {
    "routing_bias": ("1", "strength of the expert-cost term in the router's choice"),
    "batch_size": ("requests", "requests per micro-batch"),
    "expert_count": ("experts", "experts per token"),
    "ttt_steps": ("steps", "adaptation steps after each micro-batch"),
    "pace": ("1", "cap on the device's busy fraction (idle injection, needs no privilege)"),
    "sm_clock": ("1", "SM clock over its maximum (modelled in the twin; needs privilege live)"),
    "admission": ("1", "share of the places that deferrable requests may take (a service of tokens)"),
}
"""Name -> (unit, meaning)."""

KNOB_NAMES = tuple(KNOBS)


PerClass = tuple[float, ...]
"""One number per class of request, in the order of `REQUEST_CLASSES`."""
NONE_OF_ANY_CLASS: PerClass = (0.0,) * len(REQUEST_CLASSES)


@dataclass(frozen=True, kw_only=True)
class WorkStats:
    """What one interval of service did.

    A request is *answered* when its batch has been launched (profiled) or has come back (live);
    until then it is *waiting*. So arrived = answered + expired + change of waiting, always.
    *Good* means correct and within the deadline of its class.
    """

    arrived: PerClass = NONE_OF_ANY_CLASS
    answered: PerClass = NONE_OF_ANY_CLASS
    late: PerClass = NONE_OF_ANY_CLASS
    expired: PerClass = NONE_OF_ANY_CLASS
    waiting: PerClass = NONE_OF_ANY_CLASS
    oldest_s: PerClass = NONE_OF_ANY_CLASS
    """Age of the oldest request that is not launched yet; 0 when there is none."""
    correct: float = 0.0
    """Answers that were right: counted live, expected value in a profiled workload. An answer of many tokens
    is right in the part of them that is."""
    good: float = 0.0
    batches: float = 0.0
    batch_fill: float = 0.0
    """Mean requests per launched batch over `batch_size`; 0 when nothing was launched."""
    busy_s: float = 0.0
    """Device time spent serving and adapting."""
    ttt_busy_s: float = 0.0
    ttt_steps: float = 0.0
    """Adaptation steps taken and kept. With the refused and the left out ones: all that were asked for."""
    ttt_refused: float = 0.0
    """Adaptation steps that the energy budget could not pay."""
    ttt_left_out: float = 0.0
    """Adaptation steps that were not taken or not kept: poisoned, too small or unsuitable batches, and steps
    undone. Live only: a profiled workload has no answers to judge."""
    ttt_rolled_back: float = 0.0
    """Returns of the model to an earlier state. Live only."""
    budget_share: float = 1.0
    """Joules that adaptation may spend at the end over a full bank (`service.budget`); 1 where unlimited."""
    confidence: float = 0.0
    """Mean probability of the answer given, 0 when nothing was answered."""
    entropy: float = 0.0
    """Mean entropy of the answers over its maximum, 0 to 1."""
    load_imbalance: float = 0.0
    """Coefficient of variation of tokens per expert, mean over layers."""
    prefill_tokens: float = 0.0
    """Tokens of prompts that were read. These and the next are of a service of tokens."""
    output_tokens: float = 0.0
    """Tokens of answers that were given, of requests still under way too."""
    right_tokens: float = 0.0
    """Output tokens that were the text's own."""
    reference_tokens: float = 0.0
    """Output tokens that the standard service has right: of `right_tokens` at its knobs."""
    good_tokens: float = 0.0
    """Right tokens of the requests that were answered in time."""
    ttft_s: float = 0.0
    """Time to first token, from arrival: mean over the answered; in the twin over those that were let run."""
    tpot_s: float = 0.0
    """Time per output token after the first, mean over the answers of more than one."""
    cache_share: float = 0.0
    """Part of the cache of keys and values that is in use at the end."""
    sm_clock: float = 1.0
    """SM clock over its maximum under which the interval ran, where the workload is modelled."""
    shift_id: float = 0.0
    """Index of the input shift in force (ground truth; no policy sees it)."""

    latency_histogram: np.ndarray = field(
        default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, np.int64)
    )
    """Answered requests by latency: below the first edge, between edges, above the last."""
    ttft_histogram: np.ndarray | None = None
    """Answered requests of a service of tokens by time to first token, as `latency_histogram`."""
    tpot_histogram: np.ndarray | None = None
    """Those of more than one token by time per output token, between `TPOT_EDGES_S`."""
    tokens_per_expert: np.ndarray | None = None
    """[layers, experts] tokens routed in the interval."""
    slot_energy_j: np.ndarray | None = None
    """[slots, devices] modelled energy above idle; None where a meter measures it."""
    device_clock: np.ndarray | None = None
    """[devices] SM clock of each over its maximum; None likewise."""

    @cached_property
    def row(self) -> np.ndarray:
        """The numbers of a `WORK_DTYPE` record, float64."""
        per_class = (number for name in PER_CLASS_NAMES for number in getattr(self, name))
        return np.array([*per_class, *(getattr(self, name) for name in SCALAR_NAMES)], np.float64)

    @cached_property
    def counted(self) -> dict[str, Any]:
        """What is no array, by name."""
        return {name: getattr(self, name) for name in (*PER_CLASS_NAMES, *SCALAR_NAMES)}


_HINTS = get_type_hints(WorkStats)
PER_CLASS_NAMES: tuple[str, ...] = tuple(name for name, hint in _HINTS.items() if hint == PerClass)
SCALAR_NAMES: tuple[str, ...] = tuple(name for name, hint in _HINTS.items() if hint is float)


WORK_DTYPE = np.dtype(
    [(name, np.float64, (len(REQUEST_CLASSES),)) for name in PER_CLASS_NAMES]
    + [(name, np.float64) for name in SCALAR_NAMES]
)
"""What is counted of an interval, as one record; its float64 view has `STAT_COLUMNS`."""


def _column(name: str, request_class: str) -> str:
    stem, unit = (name[:-2], "_s") if name.endswith("_s") else (name, "")
    return f"{stem}_{request_class}{unit}"


STAT_COLUMNS: tuple[str, ...] = (
    *(_column(name, request_class) for name in PER_CLASS_NAMES for request_class in REQUEST_CLASSES),
    *SCALAR_NAMES,
)
"""Names for each number of a `WORK_DTYPE` record, for tables."""


T = TypeVar("T")


def frozen(kind: type[T], values: dict[str, Any]) -> T:
    """An instance of a frozen dataclass from all its fields, several times faster than its constructor.

    `values` becomes the instance's own dictionary.
    """
    instance = object.__new__(kind)
    object.__setattr__(instance, "__dict__", values)
    return instance


class Workload(Protocol):
    """A service under a queue of requests."""

    def reset(self, seed: int) -> None:
        """Start an empty queue and the request stream that belongs to `seed`."""

    def run(
        self, knobs: Knobs, duration_s: float, open_classes: int = 2, promised_tpot_s: float | None = None
    ) -> WorkStats:
        """Serve for `duration_s` seconds of the service's clock, which stands still between calls.

        Requests of the first `open_classes` of `REQUEST_CLASSES` are begun: of all, of interactive ones alone
        (1), of none (0). What runs goes on; who is not begun waits, or expires.

        A service of tokens is told which time per output token interactive requests are promised whose
        answers end now; None: as ever. Other services promise none.
        """
        ...

    def close(self) -> None:
        """Release what the service holds. May be called twice."""
