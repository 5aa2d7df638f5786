"""The steps between the experts' matrix products: Triton on CUDA, torch operators on a CPU.

Shapes: T tokens, D model, F hidden units, K experts per token, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def copy_rows(x: Tensor, source: Tensor, end: Tensor) -> Tensor:
    """Return the rows ``source`` of ``x``, up to ``end``; those behind are uninitialised.

    Args:
        x: Values.  # [T, D]
        source: Row of ``x`` for each row of the result.  # [R]
        end: 0-dim row count.
    """
    if x.is_cuda:
        from moe.model import triton_kernels

        return triton_kernels.copy_rows(x, source, end)
    return x.index_select(0, source)


def mix_rows(parts: Sequence[Tensor], ends: Sequence[Tensor], row_of_pair: Tensor, weights: Tensor) -> Tensor:
    """Sum each token's rows of all parts by weight, in a fixed order, reading none from a part's end on.

    Args:
        parts: Values; the last row of each belongs to no pair.  # [R + 1, D]
        ends: 0-dim row count of each part.
        row_of_pair: Row of each (token, choice).  # [T, K]
        weights: Float32.  # [T, K]

    Returns:
        Sums in the type of the parts.  # [T, D]
    """
    if weights.is_cuda:
        from moe.model import triton_kernels

        return triton_kernels.mix_rows(parts, ends, row_of_pair, weights)
    spare_row = len(parts[0]) - 1
    sums = [
        F.embedding_bag(
            torch.where(row_of_pair < end, row_of_pair, spare_row),
            rows,
            per_sample_weights=weights.to(rows.dtype),
            mode="sum",
            padding_idx=spare_row,
        )
        for rows, end in zip(parts, ends, strict=True)
    ]
    return sum(sums[1:], sums[0])


def swiglu(gate_up: Tensor, end: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of the rows before ``end``; the others are uninitialised.

    Args:
        gate_up: Gates, then ups.  # [R, 2F]
        end: 0-dim row count.
    """
    if gate_up.is_cuda:
        from moe.model import triton_kernels

        return triton_kernels.swiglu(gate_up, end)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up  # [R, F]


def swiglu_backward(grad_hidden: Tensor, gate_up: Tensor, end: Tensor) -> Tensor:
    """Return the gradient of ``gate_up`` in the rows before ``end``; the others are uninitialised.

    Args:
        grad_hidden: Gradient of ``swiglu``'s result.  # [R, F]
        gate_up: Its argument.  # [R, 2F]
        end: 0-dim row count.
    """
    if gate_up.is_cuda:
        from moe.model import triton_kernels

        return triton_kernels.swiglu_backward(grad_hidden, gate_up, end)
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
    return torch.cat([grad_gate, grad_hidden * F.silu(gate)], dim=-1)  # [R, 2F]
