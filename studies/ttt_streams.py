"""The streams of the study, on samples that no step of adaptation has seen before they are scored."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from moe.config import Task
from moe.samples import SamplePool, text_of_shift
from moe.streams import STREAM_KINDS, ShiftStream, StreamConfig, StreamError, draw_shifts
from moe.streams import play as play_stream
from studies.ttt_play import Batch


class DisjointText(SamplePool):
    """Test text cut into pieces that share no byte: what was learned from one is no help with another's."""

    def __init__(self, length: int, device: torch.device) -> None:
        """Cut all domains; as many pieces of each as the shortest gives."""
        self.task, self.shifts = "language", STREAM_KINDS["language"]
        texts = [text_of_shift(shift) for shift in self.shifts]
        n = min((len(text) - 1) // length for text in texts)
        self.inputs = torch.stack([text[: n * length].view(n, length) for text in texts]).to(device)
        following = [text[length : n * length + 1 : length].long() for text in texts]
        self.targets = torch.stack(following).to(device)  # [S, N]


def load_pool(task: Task, context_length: int, device: torch.device) -> SamplePool:
    """Clean test images, or pieces of test text of a context's length."""
    return (
        DisjointText(context_length, device) if task == "language" else SamplePool(task, ("clean",), device)
    )


def make_stream(config: StreamConfig, pool: SamplePool, seed: int) -> list[Batch]:
    """Draw a stream and make its batches.

    Raises:
        StreamError: The pool is too small for the stream.
    """
    stream = draw_shifts(config, pool.targets[0], seed)
    if config.task == "language":
        stream = once_each(stream, len(pool))
    return [Batch(*batch) for batch in play_stream(stream, pool)]


def once_each(stream: ShiftStream, pool_size: int) -> ShiftStream:
    """Return a stream with the same shifts in which no sample comes twice under a shift, in any step.

    A model that learns remembers text: what it read in one step would score better in a later one.

    Raises:
        StreamError: The pool is too small.
    """
    index = np.empty_like(stream.index)
    for shift in range(len(stream.shifts)):
        places = stream.shift_id == shift  # [M, B]
        if places.sum() > pool_size:
            raise StreamError(
                f"a stream of {len(stream)} batches needs {places.sum()} different samples of "
                f"{stream.shifts[shift]!r}, the pool holds {pool_size}: ask for fewer or smaller batches"
            )
        order = np.random.default_rng([stream.seed, 3, shift]).permutation(pool_size)
        index[places] = order[: places.sum()]
    return dataclasses.replace(stream, index=index)
