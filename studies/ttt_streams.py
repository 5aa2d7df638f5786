"""The streams of the study, on samples that no step of adaptation has seen before they are scored."""

from __future__ import annotations

import torch

from moe.data.pools import SamplePool, TextPool
from moe.data.streams import STREAM_KINDS, StreamConfig, draw_shifts
from moe.data.streams import play as play_stream
from moe.model.config import Size, Task, model_config
from studies.ttt_play import Batch


def load_pool(task: Task, size: Size, device: torch.device) -> SamplePool:
    """Clean test images, or test text in pieces that the model of a size reads whole."""
    if task == "language":
        return TextPool(STREAM_KINDS[task], device, chunk_bytes=model_config(task, size).context_length)
    return SamplePool(task, ("clean",), device)


def make_stream(config: StreamConfig, pool: SamplePool, seed: int) -> list[Batch]:
    """Draw a stream and make its batches.

    Raises:
        StreamError: The pool is too small for the stream.
    """
    return [Batch(*batch) for batch in play_stream(draw_shifts(config, pool.targets[0], seed), pool)]
