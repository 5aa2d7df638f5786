"""Weighted SwiGLU of expert rows and Muon's updates, one pass over memory each (CUDA only).

`lm` and `muon` hold the same in torch operators.

Shapes: T tokens, R rows (one per token and choice) and one spare row, F hidden units, K choices.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.model.dispatch import Dispatch


@triton.jit
def _forward(gate_up, weights, pair_of_row, end, hidden, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        f = tl.arange(0, BLOCK)
        inside = f < F
        weight = tl.load(weights + tl.load(pair_of_row + row))
        gate = tl.load(gate_up + row * 2 * F + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + row * F + f, gate * tl.sigmoid(gate) * up * weight, mask=inside)


@triton.jit
def _backward(
    grad, gate_up, weights, pair_of_row, end, grad_gate_up, grad_weights, F: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        f = tl.arange(0, BLOCK)
        inside = f < F
        pair = tl.load(pair_of_row + row)
        weight = tl.load(weights + pair)
        g = tl.load(grad + row * F + f, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + row * 2 * F + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        tl.store(grad_weights + pair, tl.sum(g * gate * sigmoid * up, axis=0))
        g = g * weight
        tl.store(grad_gate_up + row * 2 * F + f, g * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
        tl.store(grad_gate_up + row * 2 * F + F + f, g * gate * sigmoid, mask=inside)


def weighted_swiglu(gate_up: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Return silu(gate) * up * weight, [R + 1, F]; rows that no expert owns are uninitialised."""
    width = gate_up.shape[1] // 2
    hidden = gate_up.new_empty(len(gate_up), width)
    _forward[(dispatch.spare_row,)](
        gate_up, weights.contiguous(), dispatch.pair_of_row, dispatch.expert_ends[-1], hidden,
        F=width, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return hidden


def weighted_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, dispatch: Dispatch
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate_up, [R + 1, 2F], and of the weights, [T, K]."""
    width = gate_up.shape[1] // 2
    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    _backward[(dispatch.spare_row,)](
        grad.contiguous(), gate_up, weights.contiguous(), dispatch.pair_of_row, dispatch.expert_ends[-1],
        grad_gate_up, grad_weights, F=width, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return grad_gate_up, grad_weights


@triton.jit
def _momentum_step(grad, buffer, ahead, momentum, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside)
    m = tl.load(buffer + at, mask=inside)
    m = m + (g - m) * (1 - momentum)
    tl.store(buffer + at, m, mask=inside)
    tl.store(ahead + at, g + (m - g) * momentum, mask=inside)


@triton.jit
def _scaled_add(parameter, x, keep, rate, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    p = tl.load(parameter + at, mask=inside)
    tl.store(parameter + at, p * keep + tl.load(x + at, mask=inside).to(tl.float32) * rate, mask=inside)


def momentum_step(grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
    """Move a momentum buffer towards a gradient and return Nesterov's look ahead, bfloat16."""
    ahead = torch.empty_like(buffer, dtype=torch.bfloat16)
    n = grad.numel()
    _momentum_step[(triton.cdiv(n, 4096),)](
        grad.contiguous(), buffer, ahead, momentum, n, BLOCK=4096, num_warps=8
    )
    return ahead


def scaled_add(parameter: Tensor, x: Tensor, keep: float, rate: float) -> None:
    """Parameter = keep * parameter + rate * x, in place."""
    n = parameter.numel()
    _scaled_add[(triton.cdiv(n, 4096),)](parameter, x, keep, rate, n, BLOCK=4096, num_warps=8)
