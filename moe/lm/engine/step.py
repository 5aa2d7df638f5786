"""Work of the device that the host does not wait for, and what a step found."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


class Work:
    """Work under way on a CUDA device, or done on a CPU."""

    def __init__(self, started: Any, ended: Any) -> None:
        """Take in marks of its begin and end: CUDA events, or clock readings."""
        self._started, self._ended = started, ended

    def done(self) -> bool:
        """Whether the device is behind it."""
        return isinstance(self._ended, float) or self._ended.query()

    def wait(self) -> None:
        """Wait until it is done."""
        if not isinstance(self._ended, float):
            self._ended.synchronize()

    def seconds_since(self, mark: Any) -> float:
        """Time of the device from a mark (see `Engine.mark`) to the end of this step, which is done."""
        return self._ended - mark if isinstance(mark, float) else mark.elapsed_time(self._ended) / 1e3

    @property
    def duration_s(self) -> float:
        """Time of the device that it took, once it is done."""
        return self.seconds_since(self._started)


class Step(Work):
    """A step.

    Attributes:
        logits: Of the token behind each row, on the device; the next launch may overwrite them.  # [T, V]
        stream: Normed stream that they are made of; likewise.  # [T, D]
    """

    def __init__(self, answers: Tensor, logits: Tensor, stream: Tensor, started: Any, ended: Any) -> None:
        """Take in a step.

        Args:
            answers: See `answers`; on CUDA on its way to the host.  # [4, T]
            logits: See the attribute.
            stream: See the attribute.
            started: See `Work`.
            ended: See `Work`.
        """
        super().__init__(started, ended)
        self.logits, self.stream, self._answers = logits, stream, answers
        self._found: np.ndarray | None = None

    def answers(self) -> np.ndarray:
        """Wait for what `ops.score` found behind each row: token, confidence, entropy, loss.  # [4, T]."""
        if self._found is None:
            self.wait()
            self._found = self._answers.numpy().copy()
        return self._found
