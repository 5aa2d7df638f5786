"""The memory-bound steps between the experts' matrix products, each as one pass over memory (CUDA only).

Composed from torch operators these steps take longer than the matrix products themselves. Row counts are
read on the device, so uninitialised rows behind an expert prefix cost nothing and are never read. ``kernels``
holds the same functions for the CPU.

Shapes: T tokens, D model, F hidden units, K experts per token, R rows.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program


@triton.jit
def _copy_rows(x, source, copied, end, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + tl.load(source + row) * D + columns, mask=columns < D, other=0.0)
        tl.store(copied + row * D + columns, values, mask=columns < D)


@triton.jit
def _mix_rows(
    parts, ends, row_of_pair, weights, mixed,
    D: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(row_of_pair + token * K + choice)
        weight = tl.load(weights + token * K + choice)
        for part in tl.static_range(PARTS):
            used = inside & (row < tl.load(ends[part]))
            value = tl.load(parts[part] + row * D + columns, mask=used, other=0.0)
            total += weight * value.to(tl.float32)
    tl.store(mixed + token * D + columns, total, mask=inside)


@triton.jit
def _swiglu(gate_up, hidden, end, F: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // F, index % F
    used = row < tl.load(end)
    gate = tl.load(gate_up + row * 2 * F + column, mask=used, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=used, other=0.0).to(tl.float32)
    tl.store(hidden + index, gate * tl.sigmoid(gate) * up, mask=used)


@triton.jit
def _swiglu_backward(grad_hidden, gate_up, grad_gate_up, end, F: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // F, index % F
    used = row < tl.load(end)
    grad = tl.load(grad_hidden + index, mask=used, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * F + column, mask=used, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=used, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_gate_up + row * 2 * F + column, grad_gate, mask=used)
    tl.store(grad_gate_up + row * 2 * F + F + column, grad * gate * sigmoid, mask=used)


def copy_rows(x: Tensor, source: Tensor, end: Tensor) -> Tensor:
    """See ``kernels.copy_rows``."""
    width = x.shape[1]
    copied = x.new_empty(len(source), width)  # [R, D]
    _copy_rows[(len(source), triton.cdiv(width, BLOCK))](
        x.contiguous(), source, copied, end, D=width, BLOCK=BLOCK
    )
    return copied


def mix_rows(parts: Sequence[Tensor], ends: Sequence[Tensor], row_of_pair: Tensor, weights: Tensor) -> Tensor:
    """See ``kernels.mix_rows``."""
    n_tokens, top_k = row_of_pair.shape
    width = parts[0].shape[1]
    mixed = parts[0].new_empty(n_tokens, width)  # [T, D]
    grid = (n_tokens, triton.cdiv(width, BLOCK))
    _mix_rows[grid](
        tuple(rows.contiguous() for rows in parts), tuple(ends), row_of_pair, weights.contiguous(), mixed,
        D=width, K=top_k, PARTS=len(parts), BLOCK=BLOCK,
    )  # fmt: skip
    return mixed


def swiglu(gate_up: Tensor, end: Tensor) -> Tensor:
    """See ``kernels.swiglu``."""
    n_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    hidden = gate_up.new_empty(n_rows, width)  # [R, F]
    _swiglu[(triton.cdiv(hidden.numel(), BLOCK),)](gate_up, hidden, end, F=width, BLOCK=BLOCK)
    return hidden


def swiglu_backward(grad_hidden: Tensor, gate_up: Tensor, end: Tensor) -> Tensor:
    """See ``kernels.swiglu_backward``."""
    grad_gate_up = torch.empty_like(gate_up)
    grid = (triton.cdiv(grad_hidden.numel(), BLOCK),)
    _swiglu_backward[grid](
        grad_hidden.contiguous(), gate_up, grad_gate_up, end, F=grad_hidden.shape[1], BLOCK=BLOCK
    )
    return grad_gate_up
