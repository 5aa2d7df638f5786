"""Streams of shifted inputs for test-time training: which samples come when, and under which shift.

A stream is a pure function of its config, the pool's labels and a seed. It is a sequence of steps, each of
which allows some shifts.

Images: a step is one pass over the pool, in which a sample comes at most once. The next step may show it
again under its own shift, as the protocol of ImageNet-C does (Hendrycks and Dietterich, ICLR 2019).

Text: each row of the batches is a lane that reads on in its text from batch to batch, as dynamic evaluation
needs it (Krause et al., ICML 2018). A lane that returns to a domain reads on where it left it, and no two
read the same: no text comes twice in a stream.
Shapes: M batches of a stream, B samples of a batch, N samples of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moe.data.corruptions import KINDS, corrupt
from moe.data.pools import TEXT_OF_SHIFT, SamplePool, TextPool
from moe.model.config import TASKS, Task

Schedule = Literal["per_shift", "gradual", "recurring", "mixed", "label_correlated"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
GRADUAL_SEVERITIES = (1, 2, 3, 4, 5, 4, 3, 2, 1)
STREAM_KINDS: dict[Task, tuple[str, ...]] = {"vision": ("clean", *KINDS), "language": tuple(TEXT_OF_SHIFT)}
"""What may come in a stream: clean inputs, corruptions of images, domains of text (clean is prose)."""
MIXED = "mixed"
"""Shift name of a batch that holds several."""


class StreamError(ValueError):
    """A stream is described or drawn against its rules."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """A stream of shifts.

    Raises:
        StreamError: A rule between the fields is broken.
    """

    task: Task
    kinds: tuple[str, ...]
    """Kinds of shift in their order, of `STREAM_KINDS`; ``("clean", "code")`` is prose, then code."""
    batches: int
    """Length M of the stream, shared evenly by the steps of the schedule."""
    batch_size: int = 64
    schedule: Schedule = "per_shift"
    """`per_shift`: each kind in turn. `gradual`: each kind at `GRADUAL_SEVERITIES`. `recurring`: the kinds
    in turn, `cycles` times. `mixed`: every batch holds all kinds, of text each lane one. `label_correlated`:
    each kind in turn, like labels close together. Text takes `per_shift`, `recurring` and `mixed`."""
    severity: int = 5
    """Severity of the corruptions, 1 to 5, but for `gradual`."""
    cycles: int = 2
    """`recurring`: how often the kinds come."""
    concentration: float = 0.1
    """`label_correlated`: of the Dirichlet distribution of each label over the batches of a step; near 0 a
    label comes all at once, large values spread it evenly."""

    def __post_init__(self) -> None:
        """Refuse a stream that could not be drawn."""
        if self.task not in TASKS:
            raise StreamError(f"task must be one of {TASKS}, got {self.task!r}")
        known = STREAM_KINDS[self.task]
        if not self.kinds or set(self.kinds) - set(known) or len(set(self.kinds)) < len(self.kinds):
            raise StreamError(f"kinds must name some of {known}, each once, got {self.kinds}")
        if self.schedule not in SCHEDULES:
            raise StreamError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.task == "language" and self.schedule in ("gradual", "label_correlated"):
            raise StreamError(
                f"schedule {self.schedule!r} is for images: text has no severities and no classes; "
                "use 'per_shift', 'recurring' or 'mixed'"
            )
        if self.severity not in range(1, 6):
            raise StreamError(f"severity must be an integer from 1 to 5, got {self.severity!r}")
        if self.batch_size < 1 or self.cycles < 1:
            raise StreamError(
                f"batch_size and cycles must be at least 1, got {self.batch_size}, {self.cycles}"
            )
        if self.task == "language" and self.schedule == "mixed" and self.batch_size < len(self.kinds):
            raise StreamError(
                f"each of {len(self.kinds)} kinds of mixed text needs a lane: batch_size must be at least as "
                f"many, got {self.batch_size}"
            )
        if not 0.0 < self.concentration < np.inf:
            raise StreamError(f"concentration must be positive and finite, got {self.concentration}")
        if self.batches < len(self.steps):
            raise StreamError(
                f"a stream of {self.batches} batches is shorter than its schedule: {self.schedule!r} of "
                f"{len(self.kinds)} kinds has {len(self.steps)} steps of at least one batch"
            )

    @property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        """Names of the shifts that each step allows, as `moe.data.pools.SamplePool` names them."""
        shifts = tuple(self._shift(kind, self.severity) for kind in self.kinds)
        if self.schedule == "gradual":
            return tuple((self._shift(kind, s),) for kind in self.kinds for s in GRADUAL_SEVERITIES)
        if self.schedule == "mixed":
            return (shifts,) * len(shifts)  # as long as the others: each sample under each shift on average
        return tuple((shift,) for shift in shifts) * (self.cycles if self.schedule == "recurring" else 1)

    def _shift(self, kind: str, severity: int) -> str:
        return kind if self.task == "language" or kind == "clean" else f"{kind}@{severity}"

    @property
    def step_of_batch(self) -> np.ndarray:
        """Step that each batch belongs to, int64 [M]; their lengths differ by one batch at most."""
        return np.arange(self.batches) * len(self.steps) // self.batches


@dataclass(frozen=True)
class ShiftStream:
    """A drawn stream.

    Attributes:
        config: What it was drawn from.
        seed: The seed of the draw, from which the noise of the corruptions follows as well.
        shifts: Names of all shifts in it.
        shift_id: Shift of each sample, an index into ``shifts``, int64.  # [M, B]
        index: The samples, indices into the pool, int64.  # [M, B]
    """

    config: StreamConfig
    seed: int
    shifts: tuple[str, ...]
    shift_id: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        """Number of batches M."""
        return len(self.index)

    def shift_name(self, batch: int) -> str:
        """Name of a batch's shift, `MIXED` where it holds several."""
        first = self.shift_id[batch, 0]
        return self.shifts[first] if (self.shift_id[batch] == first).all() else MIXED


def draw_shifts(config: StreamConfig, labels: np.ndarray | Tensor, seed: int) -> ShiftStream:
    """Draw a stream.

    Schedules of as many steps draw the same images for a step from a seed; `label_correlated` only changes
    their order within it, so that the labels of a step are those of an independent stream. Of text a seed
    draws where the lanes begin.

    Args:
        config: What to draw.
        labels: Class of each sample of the pool; only `label_correlated` looks at more than their number.
            # [N]
        seed: Everything random follows from it, in [0, 2**63).

    Raises:
        StreamError: The pool holds too few samples, or the seed is out of range.
    """
    if not 0 <= seed < 2**63:
        raise StreamError(f"seed must lie in [0, 2**63), got {seed}")
    labels = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    draw = _draw_text if config.task == "language" else _draw_images
    shifts = tuple(dict.fromkeys(shift for step in config.steps for shift in step))
    shift_id, index = draw(config, shifts, labels, seed)
    return ShiftStream(config, seed, shifts, shift_id, index)


def _draw_text(
    config: StreamConfig, shifts: tuple[str, ...], labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shift and the chunk of each row of each batch, [M, B] each."""
    generator = np.random.default_rng(seed)
    if config.schedule == "mixed":
        of_lane = generator.permutation(np.arange(config.batch_size) % len(shifts))
        shift_id = np.tile(of_lane, (config.batches, 1))
    else:
        of_step = np.array([shifts.index(shift) for (shift,) in config.steps])
        shift_id = np.repeat(of_step[config.step_of_batch][:, None], config.batch_size, axis=1)
    index = np.empty_like(shift_id)
    for number, shift in enumerate(shifts):
        reads = shift_id == number  # [M, B]
        lanes = generator.permutation(np.flatnonzero(reads.any(axis=0)))
        length = np.count_nonzero(reads[:, lanes[0]])
        spare = len(labels) - len(lanes) * length
        if spare < 0:
            raise StreamError(
                f"{len(lanes)} lanes of {length} chunks of {shift!r} need {len(lanes) * length} chunks, "
                f"the pool holds {len(labels)}: ask for fewer batches than {config.batches}, smaller ones, "
                "or a pool of shorter chunks"
            )
        starts = np.arange(len(lanes)) * length + np.sort(generator.integers(spare + 1, size=len(lanes)))
        for lane, start in zip(lanes, starts, strict=True):
            index[reads[:, lane], lane] = start + np.arange(length)
    return shift_id, index


def _draw_images(
    config: StreamConfig, shifts: tuple[str, ...], labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shift and the image of each row of each batch, [M, B] each."""
    lengths = np.bincount(config.step_of_batch)  # batches of each step
    size = config.batch_size
    if lengths.max() * size > len(labels):
        raise StreamError(
            f"a step of {lengths.max()} batches of {size} needs {lengths.max() * size} different samples, "
            f"the pool holds {len(labels)}: ask for fewer batches than {config.batches}, or smaller ones"
        )
    samples, order, mixing = (np.random.default_rng([seed, purpose]) for purpose in range(3))
    index, shift_id = [], []
    for allowed, length in zip(config.steps, lengths, strict=True):
        chosen = samples.permutation(len(labels))[: length * size]
        if config.schedule == "label_correlated":
            chosen = chosen[_correlated(labels[chosen], length, config.concentration, order)]
        index.append(chosen.reshape(length, size))
        ids = np.array([shifts.index(shift) for shift in allowed])
        place = np.arange(length * size).reshape(length, size)
        shift_id.append(ids[mixing.permuted(place, axis=1) % len(ids)])  # as many of each as can be
    return np.concatenate(shift_id), np.concatenate(index)


def _correlated(
    labels: np.ndarray, slots: int, concentration: float, generator: np.random.Generator
) -> np.ndarray:
    """Return an order of samples, [n], in which like labels [n] are close (Gong et al., NOTE, NeurIPS 2022).

    Each label spreads its samples over the slots by shares from a Dirichlet distribution. The slots follow
    each other, in each the labels one after another in random order.
    """
    slot = np.empty(len(labels), np.int64)
    rank = np.empty(len(labels))  # of the sample's label in its slot
    classes = np.unique(labels)
    place = generator.random((slots, len(classes)))
    for number, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        share = generator.dirichlet(np.full(slots, concentration))
        ends = np.round(np.cumsum(share)[:-1] * len(members)).astype(np.int64)
        slot[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
        rank[members] = place[slot[members], number]
    return np.lexsort((rank, slot))


def play(stream: ShiftStream, pool: SamplePool) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield the batches of a stream, on the pool's device.

    Corrupted images are made batch by batch out of the clean ones, so that only those are held. Their noise
    follows from the stream's seed, whatever the device.

    Args:
        stream: What to play.
        pool: Where the samples are: clean images, or a `moe.data.pools.TextPool` of every domain of the
            stream; as large as the pool of the stream's labels.

    Yields:
        Inputs, uint8 [B, ...]; right answers, int64 [B]; and the name of the batch's shift, or `MIXED`. A
        row of text is itself the answers to all of its bytes but the last, whose answer is the right answer.

    Raises:
        StreamError: The pool is of another task, lacks a shift, holds text out of order, or is smaller than
            the stream's.
    """
    needed = {"clean" if "@" in shift else shift for shift in stream.shifts}
    if pool.task != stream.config.task or needed - set(pool.shifts):
        raise StreamError(
            f"a {stream.config.task} stream plays on a pool of {sorted(needed)}, got a {pool.task} pool of "
            f"{pool.shifts}"
        )
    if pool.task == "language" and not isinstance(pool, TextPool):
        raise StreamError(
            "a language stream reads on in its text: play it on a moe.data.pools.TextPool, got the scattered "
            f"chunks of a {type(pool).__name__}"
        )
    if stream.index.max() >= len(pool):
        raise StreamError(
            f"the stream was drawn for a pool of more than {stream.index.max()} samples, got {len(pool)}"
        )
    return _play(stream, pool)


def _play(stream: ShiftStream, pool: SamplePool) -> Iterator[tuple[Tensor, Tensor, str]]:
    noise = torch.Generator().manual_seed(stream.seed)
    for batch, (shift_id, index) in enumerate(zip(stream.shift_id, stream.index, strict=True)):
        order, parts = [], []
        for shift in np.unique(shift_id):
            rows = np.flatnonzero(shift_id == shift)
            order.append(rows)
            parts.append(_shifted(pool, stream.shifts[shift], index[rows], noise))
        back = torch.from_numpy(np.argsort(np.concatenate(order))).to(pool.targets.device)  # [B]
        inputs, targets = (torch.cat(part).index_select(0, back) for part in zip(*parts, strict=True))
        yield inputs, targets, stream.shift_name(batch)


def _shifted(
    pool: SamplePool, shift: str, index: np.ndarray, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return samples of the pool under a shift: inputs [b, ...] and right answers [b]."""
    chosen = torch.from_numpy(index).to(pool.targets.device)
    kind, _, severity = shift.partition("@")
    if not severity:
        return pool.take(pool.shifts.index(shift), chosen)
    inputs, targets = pool.take(pool.shifts.index("clean"), chosen)
    return corrupt(inputs, kind, int(severity), noise), targets
