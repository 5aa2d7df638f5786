"""The kernels of a step around the experts (Triton, CUDA only): norms, attention, score.

`ops` holds the same functions in torch operators and says what they compute.

Shapes: T rows, D model, H query heads, G key/value heads, Dh head, M blocks of a slot, S positions, V tokens.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.lm.config import BLOCK
from moe.lm.engine.rows import StepInput

EPS = tl.constexpr(1e-6)


@triton.jit
def _embed_norm(document, position, documents, embed, gain, x, h, L, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    token = tl.load(documents + tl.load(document + row).to(tl.int64) * L + tl.load(position + row)).to(
        tl.int64
    )
    value = tl.load(embed + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(x + row * D + d, value, mask=d < D)
    normal = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + EPS)
    tl.store(h + row * D + d, normal * tl.load(gain + d, mask=d < D, other=0.0), mask=d < D)


@triton.jit
def _add_norm(x, delta, gain, h, hf, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    value += tl.load(delta + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = value.to(x.dtype.element_ty)  # the stream is rounded as in training
    tl.store(x + row * D + d, value, mask=d < D)
    value = value.to(tl.float32)
    normal = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + EPS)
    normal = (normal * tl.load(gain + d, mask=d < D, other=0.0)).to(h.dtype.element_ty)
    tl.store(h + row * D + d, normal, mask=d < D)
    tl.store(hf + row * D + d, normal.to(tl.float32), mask=d < D)


@triton.jit
def _rope_cache(
    qkv, slot, position, blocks, turn, q, keys, values, M, TURNS,
    H: tl.constexpr, G: tl.constexpr, DH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row: norm, turn, and either to q or to its place in the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    p = tl.load(position + row)
    half = tl.arange(0, DH // 2)
    base = qkv + (row * (H + 2 * G) + head) * DH
    lo = tl.load(base + half).to(tl.float32)
    hi = tl.load(base + DH // 2 + half).to(tl.float32)
    if head < H + G:
        scale = tl.rsqrt((tl.sum(lo * lo, axis=0) + tl.sum(hi * hi, axis=0)) / DH + EPS)
        kind = qkv.dtype.element_ty
        lo, hi = (lo * scale).to(kind).to(tl.float32), (hi * scale).to(kind).to(tl.float32)
        cos = tl.load(turn + p * (DH // 2) + half)
        sin = tl.load(turn + (TURNS + p) * (DH // 2) + half)
        lo, hi = lo * cos - hi * sin, hi * cos + lo * sin
    if head < H:
        out = q + (row * H + head) * DH
        tl.store(out + half, lo)
        tl.store(out + DH // 2 + half, hi)
    else:
        g = (head - H) % G
        block = tl.load(blocks + tl.load(slot + row) * M + p // BLOCK).to(tl.int64)
        place = ((block * G + g) * BLOCK + p % BLOCK) * DH
        out = keys + place if head < H + G else values + place
        tl.store(out + half, lo)
        tl.store(out + DH // 2 + half, hi)


@triton.jit
def _attend(
    q, slot, position, blocks, keys, values, mixed, partial, total, M, scale,
    H: tl.constexpr, G: tl.constexpr, DH: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A share of a context for the query heads of one key/value head (split as in flash-decoding)."""
    row, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(position + row) + 1
    own = blocks + tl.load(slot + row) * M
    share = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK) * BLOCK
    first, last = split * share, tl.minimum(n, (split + 1) * share)
    line, d, col = tl.arange(0, ROWS), tl.arange(0, DH), tl.arange(0, BLOCK)
    head = g * (H // G) + line
    used = line < H // G
    queries = tl.load(q + (row * H + head)[:, None] * DH + d[None, :], mask=used[:, None], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DH), tl.float32)
    for start in range(first, last, BLOCK):  # from block to block: shares begin at blocks
        base = (tl.load(own + start // BLOCK).to(tl.int64) * G + g) * BLOCK * DH
        inside = start + col < last
        key = tl.load(
            keys + base + col[None, :] * DH + d[:, None], mask=inside[None, :], other=0.0
        )  # [DH, BLOCK]
        score = tl.dot(queries, key, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp(score - new_top[:, None])
        shrink = tl.exp(top - new_top)
        value = tl.load(
            values + base + col[:, None] * DH + d[None, :], mask=inside[:, None], other=0.0
        )  # [BLOCK, DH]
        acc = acc * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        weight = weight * shrink + tl.sum(p, axis=1)
        top = new_top
    if SPLITS == 1:
        tl.store(
            mixed + (row * H + head)[:, None] * DH + d[None, :], acc / weight[:, None], mask=used[:, None]
        )
    else:
        place = (row * H + head) * SPLITS + split
        tl.store(partial + place[:, None] * DH + d[None, :], acc, mask=used[:, None])
        log = tl.where(weight > 0, top, float("-inf"))
        tl.store(total + place * 2, log, mask=used)
        tl.store(total + place * 2 + 1, weight, mask=used)


@triton.jit
def _join(partial, total, mixed, DH: tl.constexpr, SPLITS: tl.constexpr):
    """Join the shares of one row and head."""
    place = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DH)
    top = tl.load(total + (place * SPLITS + s) * 2)
    weight = tl.load(total + (place * SPLITS + s) * 2 + 1)
    factor = tl.exp(top - tl.max(top, axis=0))  # an empty share has top -inf, so factor 0
    acc = tl.load(partial + (place * SPLITS + s)[:, None] * DH + d[None, :])
    tl.store(mixed + place * DH + d, tl.sum(acc * factor[:, None], axis=0) / tl.sum(weight * factor, axis=0))


@triton.jit
def _score(logits, document, position, documents, answers, L, T, LOG_V, V: tl.constexpr, BLOCK: tl.constexpr):
    """Compare one row's logits with the text."""
    row = tl.program_id(0)
    target = tl.load(documents + tl.load(document + row).to(tl.int64) * L + tl.load(position + row) + 1)
    col = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + row * V + start + col).to(tl.float32)
        new = tl.maximum(top, value)
        place = tl.where(value > top, start + col, place)
        shrink, p = tl.exp(top - new), tl.exp(value - new)
        mass = mass * shrink + p
        moment = moment * shrink + p * value
        top = new
    best = tl.max(top, axis=0)
    answer = tl.min(tl.where(top == best, place, V), axis=0)
    total = tl.sum(mass * tl.exp(top - best), axis=0)
    log = best + tl.log(total)
    entropy = log - tl.sum(moment * tl.exp(top - best), axis=0) / total
    tl.store(answers + row, answer.to(tl.float32))
    tl.store(answers + T + row, 1.0 / total)
    tl.store(answers + 2 * T + row, entropy / LOG_V)
    tl.store(answers + 3 * T + row, log - tl.load(logits + row * V + target).to(tl.float32))


def embed_norm(step: StepInput, documents: Tensor, embed: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.embed_norm`."""
    t, d = len(step.slot), embed.shape[1]
    x, h = embed.new_empty(t, d), embed.new_empty(t, d)
    _embed_norm[(t,)](
        step.document, step.position, documents, embed, gain, x, h, documents.shape[1],
        D=d, BLOCK=triton.next_power_of_2(d), num_warps=4,
    )  # fmt: skip
    return x, h


def add_norm(x: Tensor, delta: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.add_norm`."""
    h, hf = torch.empty_like(x), x.new_empty(x.shape, dtype=torch.float32)
    d = x.shape[1]
    _add_norm[(len(x),)](x, delta, gain, h, hf, D=d, BLOCK=triton.next_power_of_2(d), num_warps=4)
    return h, hf


def rope_cache(
    qkv: Tensor, step: StepInput, blocks: Tensor, turn: Tensor, keys: Tensor, values: Tensor, n_heads: int
) -> Tensor:
    """See `ops.rope_cache`."""
    g, dh = keys.shape[1], keys.shape[3]
    q = qkv.new_empty(len(qkv), n_heads, dh)
    _rope_cache[(len(qkv), n_heads + 2 * g)](
        qkv, step.slot, step.position, blocks, turn, q, keys, values, blocks.shape[1], turn.shape[1],
        H=n_heads, G=g, DH=dh, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    return q


def _splits(n_rows: int, n_kv_heads: int) -> int:
    """Shares of a context, a power of two up to 16, so that attention fills the chip with 1024 programs."""
    splits = 1
    while splits < 16 and n_rows * n_kv_heads * splits < 1024:
        splits *= 2
    return splits


def attend(q: Tensor, step: StepInput, blocks: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """See `ops.attend`."""
    t, h, dh = q.shape
    g = keys.shape[1]
    splits = _splits(t, g)
    mixed = torch.empty_like(q)
    shares = t * h * splits if splits > 1 else 1
    partial = q.new_empty(shares, dh, dtype=torch.float32)
    total = q.new_empty(shares, 2, dtype=torch.float32)
    _attend[(t, g, splits)](
        q, step.slot, step.position, blocks, keys, values, mixed, partial, total, blocks.shape[1], dh**-0.5,
        H=h, G=g, DH=dh, SPLITS=splits, ROWS=max(16, triton.next_power_of_2(h // g)), BLOCK=BLOCK,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join[(t * h,)](partial, total, mixed, DH=dh, SPLITS=splits, num_warps=1)
    return mixed.view(t, h * dh)


def score(logits: Tensor, step: StepInput, documents: Tensor, answers: Tensor) -> None:
    """See `ops.score`."""
    t, v = logits.shape
    _score[(t,)](
        logits, step.document, step.position, documents, answers, documents.shape[1], t, math.log(v),
        V=v, BLOCK=min(1024, v), num_warps=4,
    )  # fmt: skip
