"""What the requests ask: a pool of samples on the device, under every input shift.

One vision request is one image. One language request is one text chunk whose next byte is asked for.
Shapes: S shifts, N samples of the pool, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.data import datasets as data
from moe.data.corruptions import corrupt

CHUNK_BYTES = 128
"""Length of a text chunk; a model with a shorter context reads the end of it."""
TEXT_CHUNKS = 8192
"""Chunks per domain. They overlap where the text is short, but each asks for another byte."""
CORRUPTION_SEED = 0

DEFAULT_SHIFTS: dict[str, tuple[str, ...]] = {
    "vision": ("clean", "gaussian_noise@5", "contrast@5", "brightness@5", "blur@5", "pixelate@5"),
    "language": ("clean", "code"),
}
"""Shifts measured by default: clean, then the corruption and its severity, or the text's domain."""
TEXT_OF_SHIFT: dict[str, data.Domain] = {"clean": "prose", "code": "code"}
"""Domain of the text of each language shift."""


class SamplePool:
    """Samples under every shift, ready on the device.

    Attributes:
        task: ``"vision"`` or ``"language"``.
        shifts: Names of the shifts.
        inputs: uint8, [S, N, 28, 28] images or [S, N, `CHUNK_BYTES`] text.
        targets: Right answers, int64.  # [S, N]
    """

    def __init__(
        self, task: str, shifts: Sequence[str], device: torch.device | str, split: data.Split = "test"
    ) -> None:
        """Load a split and shift it.

        Args:
            task: ``"vision"`` or ``"language"``.
            shifts: Names: ``"clean"``; for vision ``KIND@SEVERITY`` (`moe.data.corruptions`), such as
                ``"blur@5"``; for language ``"code"``.
            device: Where the pool lives.
            split: What the samples are of; settings are chosen on ``"validation"``, see `datasets.Split`.

        Raises:
            ValueError: A task, shift or split is unknown.
        """
        if task not in DEFAULT_SHIFTS:
            raise ValueError(f"task must be one of {tuple(DEFAULT_SHIFTS)}, got {task!r}")
        self.task, self.shifts = task, tuple(shifts)
        make = _vision_shift if task == "vision" else _language_shift
        parts = [make(shift, torch.device(device), split) for shift in self.shifts]
        self.inputs = torch.stack([inputs for inputs, _ in parts])  # [S, N, ...]
        self.targets = torch.stack([targets for _, targets in parts])  # [S, N]

    def __len__(self) -> int:
        """Number of samples N under each shift."""
        return self.targets.shape[1]

    def take(self, shift: int | Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Gather a batch: inputs [B, ...] and right answers [B].

        Args:
            shift: Number of the shift; as a 0-dim tensor only the device reads it, unchecked.
            index: Numbers of the samples, int64 on the device.  # [B]
        """
        place = shift * len(self) + index  # [B]
        return self.inputs.flatten(0, 1).index_select(0, place), self.targets.flatten().index_select(0, place)


class TextPool(SamplePool):
    """Text in its order, for streams: each chunk follows the one before it, and its target begins the next.

    N is the number of whole chunks of the shortest text among the shifts.
    """

    def __init__(
        self,
        shifts: Sequence[str],
        device: torch.device | str,
        split: data.Split = "test",
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Cut the texts of a split.

        Args:
            shifts: Names of language shifts.
            device: Where the pool lives.
            split: What the texts are of, see `moe.data.datasets.Split`.
            chunk_bytes: Length of a chunk; at most the context of the model that is to read all of it.

        Raises:
            ValueError: A shift or split is unknown, or a text is shorter than a chunk.
        """
        self.task, self.shifts = "language", tuple(shifts)
        texts = [text_of_shift(shift, split) for shift in self.shifts]
        shortest = min(len(text) for text in texts)
        if not 1 <= chunk_bytes < shortest:
            raise ValueError(
                f"chunk_bytes must be within 1..{shortest - 1}, the shortest text, got {chunk_bytes}"
            )
        end = (shortest - 1) // chunk_bytes * chunk_bytes
        self.inputs = torch.stack([text[:end].view(-1, chunk_bytes) for text in texts]).to(device)
        self.targets = torch.stack([text[chunk_bytes : end + 1 : chunk_bytes] for text in texts])
        self.targets = self.targets.long().to(device)


def _vision_shift(shift: str, device: torch.device, split: data.Split) -> tuple[Tensor, Tensor]:
    images, labels = (tensor.to(device) for tensor in data.load_vision(split))  # [N, 28, 28], [N]
    if shift == "clean":
        return images, labels
    kind, _, severity = shift.rpartition("@")
    if not severity.isdecimal():
        raise ValueError(f'a vision shift is "clean" or KIND@SEVERITY such as "blur@5", got {shift!r}')
    # Each shift from its own generator: a shift's images do not depend on which others are in the pool.
    generator = torch.Generator().manual_seed(CORRUPTION_SEED)
    return corrupt(images, kind, int(severity), generator), labels


def _language_shift(shift: str, device: torch.device, split: data.Split) -> tuple[Tensor, Tensor]:
    chunks, following = cut(text_of_shift(shift, split), CHUNK_BYTES)
    return chunks.to(device), following.long().to(device)


def text_of_shift(shift: str, split: data.Split = "test") -> Tensor:
    """The text of a language shift as bytes, uint8 [n].

    Raises:
        ValueError: the shift or split is unknown.
    """
    if shift not in TEXT_OF_SHIFT:
        raise ValueError(f"a language shift is one of {tuple(TEXT_OF_SHIFT)}, got {shift!r}")
    return data.load_language(TEXT_OF_SHIFT[shift], split)


def cut(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut `TEXT_CHUNKS` chunks, [N, length], and what follows each, [N], evenly out of a text, [n].

    Raises:
        ValueError: the text is too short for so many different ones.
    """
    windows = text.unfold(0, length + 1, 1)  # [n - length, length + 1]
    if len(windows) < TEXT_CHUNKS:
        raise ValueError(f"a text of length {len(text)} is too short for {TEXT_CHUNKS} different requests")
    chosen = torch.arange(TEXT_CHUNKS) * len(windows) // TEXT_CHUNKS  # evenly spaced, all different
    chunks = windows[chosen]
    return chunks[:, :-1], chunks[:, -1]
