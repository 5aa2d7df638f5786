"""The rows of a step, as the host sends them and as the device reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class StepInput:
    """What a step reads of the host, as views of one tensor, int32.

    Attributes:
        n_rows: Rows that count, 0-dim.
        top_k: Experts per token, 0-dim.
        readable: Experts that a layer may read, 0-dim, at least `top_k`.
        slot: Of each row's sequence.  # [T]
        position: Of each row in its sequence.  # [T]
        document: Of each row's text.  # [T]
    """

    n_rows: Tensor
    top_k: Tensor
    readable: Tensor
    slot: Tensor
    position: Tensor
    document: Tensor

    @classmethod
    def of(cls, control: Tensor) -> StepInput:
        """Cut a tensor, [3 + 3 T]."""
        slot, position, document = control[3:].chunk(3)
        return cls(control[0], control[1], control[2], slot, position, document)


@dataclass(frozen=True)
class Rows:
    """The token rows of a step; those of one slot are neighbours, in order of position.

    Attributes:
        slot: Slot of each row's sequence, int32.  # [T]
        position: Of each row, int32.  # [T]
        document: Whose text it is, int32.  # [T]
    """

    slot: np.ndarray
    position: np.ndarray
    document: np.ndarray
