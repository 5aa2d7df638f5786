"""The kernels of a step's experts (Triton, CUDA only).

Knobs are tensors that the kernels read, so that a captured graph serves every top_k and every number of
readable experts. No sorting: an expert's tokens are entered in a list by atomics, and a program of the expert
products finds its expert by a running sum over the counts. Experts without tokens get no program, so their
weights are never read. `ops` holds the same functions in torch operators and says what they compute.

Shapes: T rows, D model, E experts, F hidden units, K slots per token.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.lm.engine.rows import StepInput

EPS = tl.constexpr(1e-6)


@triton.jit
def _demand(logits, n_rows, k, demand, E: tl.constexpr, K: tl.constexpr):
    """Add one token's gates inside its own top k, as shares of all its gates."""
    row = tl.program_id(0)
    if row < tl.load(n_rows):
        e = tl.arange(0, E)
        logit = tl.load(logits + row * E + e)
        gate = tl.sigmoid(logit)
        n = tl.load(k)
        rest = logit
        inside = e < 0
        for slot in tl.static_range(K):
            best = tl.argmax(rest, axis=0)
            inside = inside | ((e == best) & (slot < n))
            rest = tl.where(e == best, float("-inf"), rest)
        tl.atomic_add(demand + e, gate / tl.sum(gate, axis=0), mask=inside)


@triton.jit
def _select(
    logits,
    demand,
    penalty,
    held,
    n_rows,
    k,
    readable,
    counts,
    lists,
    weights,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """Choose one token's experts among those that the step may read, and enter it in their lists."""
    row = tl.program_id(0)
    slots = tl.arange(0, K)
    if row >= tl.load(n_rows):
        tl.store(weights + row * K + slots, tl.zeros((K,), tl.float32))
        return
    e = tl.arange(0, E)
    logit = tl.load(logits + row * E + e)
    rest = logit
    trained = 0.0  # sum of the gates that the training would have chosen
    for _ in tl.static_range(K):
        best = tl.argmax(rest, axis=0)
        trained += tl.sigmoid(tl.max(rest, axis=0))
        rest = tl.where(e == best, float("-inf"), rest)
    rest = logit
    limit = tl.load(readable)
    if limit < E:
        mine = tl.load(demand + e) - tl.load(penalty + e)
        # Ranked by demand, the lower number first among equals: a smaller limit allows a subset.
        better = (mine[None, :] > mine[:, None]) | (
            (mine[None, :] == mine[:, None]) & (e[None, :] < e[:, None])
        )
        rest = tl.where(tl.sum(better.to(tl.int32), axis=1) < limit, logit, float("-inf"))
    n = tl.load(k)
    chosen = tl.zeros((K,), tl.int32)
    gate = tl.zeros((K,), tl.float32)
    for slot in tl.static_range(K):
        best = tl.argmax(rest, axis=0)
        gate = tl.where(slots == slot, tl.sigmoid(tl.max(rest, axis=0)), gate)
        chosen = tl.where(slots == slot, best, chosen)
        rest = tl.where(e == best, float("-inf"), rest)
    gate = tl.where(slots < n, gate, 0.0)
    tl.store(weights + row * K + slots, gate / tl.sqrt(tl.sum(gate, axis=0) * trained))
    here = (slots < n) & (tl.load(held + chosen) > 0)
    place = tl.atomic_add(counts + chosen, tl.full((K,), 1, tl.int32), mask=here)
    tl.store(lists + chosen * T + place, row * K + slots, mask=here)


@triton.jit
def _experts_up(
    h, gate_up, counts, lists, weights, hidden, T,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    e_all = tl.arange(0, E)
    n_all = tl.load(counts + e_all)
    blocks = (n_all + BM - 1) // BM
    if block >= tl.sum(blocks, axis=0):
        return
    e = tl.sum((tl.cumsum(blocks, axis=0) <= block).to(tl.int32), axis=0)
    first = tl.sum(tl.where(e_all < e, blocks, 0), axis=0)
    n = tl.sum(tl.where(e_all == e, n_all, 0), axis=0)
    row = tl.arange(0, BM)
    place = (block - first) * BM + row
    used = place < n
    pair = tl.load(lists + e * T + place, mask=used, other=0)
    f, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_ptr = h + (pair // K)[:, None] * D + d[None, :]
    w_ptr = gate_up + e.to(tl.int64) * (D * 2 * F) + d[:, None] * (2 * F) + f[None, :]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, D, BK):
        a = tl.load(a_ptr, mask=used[:, None], other=0.0)
        gate = tl.dot(a, tl.load(w_ptr), gate, input_precision="ieee")
        up = tl.dot(a, tl.load(w_ptr + F), up, input_precision="ieee")
        a_ptr += BK
        w_ptr += BK * 2 * F
    weight = tl.load(weights + pair, mask=used, other=0.0)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(hidden + (block * BM + row)[:, None] * F + f[None, :], value, mask=used[:, None])


@triton.jit
def _experts_down(
    hidden, down, counts, lists, out, T,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    e_all = tl.arange(0, E)
    n_all = tl.load(counts + e_all)
    blocks = (n_all + BM - 1) // BM
    if block >= tl.sum(blocks, axis=0):
        return
    e = tl.sum((tl.cumsum(blocks, axis=0) <= block).to(tl.int32), axis=0)
    first = tl.sum(tl.where(e_all < e, blocks, 0), axis=0)
    n = tl.sum(tl.where(e_all == e, n_all, 0), axis=0)
    row = tl.arange(0, BM)
    place = (block - first) * BM + row
    used = place < n
    pair = tl.load(lists + e * T + place, mask=used, other=0)
    col, f = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_ptr = hidden + (block * BM + row)[:, None] * F + f[None, :]
    w_ptr = down + e.to(tl.int64) * (F * D) + f[:, None] * D + col[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, F, BK):
        a = tl.load(a_ptr, mask=used[:, None], other=0.0)
        acc = tl.dot(a, tl.load(w_ptr), acc, input_precision="ieee")
        a_ptr += BK
        w_ptr += BK * D
    tl.store(out + pair[:, None] * D + col[None, :], acc, mask=used[:, None])


@triton.jit
def _mix_norm(
    x, out, n_rows, k, gain, h, counts, demand, usage,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a token's experts into the stream and norm it; the first program counts and clears."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    n = tl.where(row < tl.load(n_rows), tl.load(k), 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        total += tl.load(out + (row * K + slot) * D + d, mask=(d < D) & (slot < n), other=0.0).to(tl.float32)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = (value + total.to(x.dtype.element_ty).to(tl.float32)).to(x.dtype.element_ty)
    tl.store(x + row * D + d, value, mask=d < D)
    value = value.to(tl.float32)
    normal = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + EPS)
    tl.store(h + row * D + d, normal * tl.load(gain + d, mask=d < D, other=0.0), mask=d < D)
    if row == 0:
        e = tl.arange(0, E)
        tokens = tl.load(counts + e).to(tl.int64)
        tl.store(usage + e, tl.load(usage + e) + tokens)
        tl.store(usage + E + e, tl.load(usage + E + e) + (tokens > 0).to(tl.int64))
        tl.store(counts + e, tl.zeros((E,), tl.int32))
        tl.store(demand + e, tl.zeros((E,), tl.float32))


def demand_of(logits: Tensor, step: StepInput, demand: Tensor, slots: int) -> None:
    """See `ops.demand_of`."""
    t, e = logits.shape
    _demand[(t,)](logits, step.n_rows, step.top_k, demand, E=e, K=slots, num_warps=1)


def select(
    logits: Tensor,
    step: StepInput,
    demand: Tensor,
    penalty: Tensor,
    held: Tensor,
    counts: Tensor,
    lists: Tensor,
    slots: int,
) -> Tensor:
    """See `ops.select`."""
    t, e = logits.shape
    weights = logits.new_empty(t, slots)
    _select[(t,)](
        logits, demand, penalty, held, step.n_rows, step.top_k, step.readable, counts, lists, weights, t,
        E=e, K=slots, num_warps=4,
    )  # fmt: skip
    return weights


def experts(
    h: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, lists: Tensor, weights: Tensor, zeroed: bool
) -> Tensor:
    """See `ops.experts`; outputs of pairs that nobody computes are 0 if `zeroed`, else uninitialised.

    Raises:
        ValueError: E is no power of two, or D or F is no multiple of its tile.
    """
    t, slots = weights.shape
    e, d, f = gate_up.shape[0], gate_up.shape[1], down.shape[1]
    # Weights are read once whatever the tile, so tiles only have to keep enough bytes in flight.
    rows = 16 if t * slots <= 16 * e else 64
    up, dn = (min(64, f), min(64, d)), (min(128, d), min(64, f))  # columns, depth
    if e & (e - 1) or f % up[0] or d % up[1] or d % dn[0] or f % dn[1]:
        raise ValueError(
            f"the kernels of a step need a power of two of experts and widths that are multiples of their "
            f"tiles (64 and 128), got {e} experts of {f} on a stream of {d}; serve this model on a CPU"
        )
    blocks = min(t * slots, e + t * slots // rows)  # never more than one block per pair
    hidden = h.new_empty(blocks * rows, f)
    out = (h.new_zeros if zeroed else h.new_empty)(t * slots, d)
    _experts_up[(f // up[0], blocks)](
        h, gate_up, counts, lists, weights, hidden, t,
        D=d, F=f, E=e, K=slots, BM=rows, BN=up[0], BK=up[1], num_warps=4, num_stages=4,
    )  # fmt: skip
    _experts_down[(d // dn[0], blocks)](
        hidden, down, counts, lists, out, t,
        D=d, F=f, E=e, BM=rows, BN=dn[0], BK=dn[1], num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def mix_norm(
    x: Tensor, out: Tensor, step: StepInput, gain: Tensor, counts: Tensor, demand: Tensor, usage: Tensor,
    slots: int,
) -> Tensor:  # fmt: skip
    """See `ops.mix_norm`."""
    h = torch.empty_like(x)
    d = x.shape[1]
    _mix_norm[(len(x),)](
        x, out, step.n_rows, step.top_k, gain, h, counts, demand, usage,
        D=d, E=len(counts), K=slots, BLOCK=triton.next_power_of_2(d), num_warps=4,
    )  # fmt: skip
    return h
