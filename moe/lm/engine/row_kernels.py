"""The kernels of a decode step around the experts (Triton, CUDA only): norms, attention, score.

`decode_ops` holds the same functions in torch operators and says what they compute.

Shapes: B sequences, D model, H query heads, G key/value heads, Dh head, S positions, V tokens.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-6)


@triton.jit
def _embed_norm(tokens, pos, embed, gain, x, h, L, D: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    token = tl.load(tokens + b * L + tl.load(pos + b)).to(tl.int64)
    value = tl.load(embed + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(x + b * D + d, value, mask=d < D)
    normal = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + EPS)
    tl.store(h + b * D + d, normal * tl.load(gain + d, mask=d < D, other=0.0), mask=d < D)


@triton.jit
def _add_norm(x, delta, gain, h, hf, D: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    value = tl.load(x + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    value += tl.load(delta + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = value.to(x.dtype.element_ty)  # the stream is rounded as in training
    tl.store(x + b * D + d, value, mask=d < D)
    value = value.to(tl.float32)
    normal = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + EPS)
    normal = (normal * tl.load(gain + d, mask=d < D, other=0.0)).to(h.dtype.element_ty)
    tl.store(h + b * D + d, normal, mask=d < D)
    tl.store(hf + b * D + d, normal.to(tl.float32), mask=d < D)


@triton.jit
def _rope_cache(
    qkv, pos, turn, q, k_cache, v_cache, S, TURNS,
    H: tl.constexpr, G: tl.constexpr, DH: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: norm, turn, and either to q or to its place in the cache."""
    b, head = tl.program_id(0), tl.program_id(1)
    p = tl.load(pos + b)
    half = tl.arange(0, DH // 2)
    base = qkv + (b * (H + 2 * G) + head) * DH
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
        out = q + (b * H + head) * DH
        tl.store(out + half, lo)
        tl.store(out + DH // 2 + half, hi)
    else:
        g = (head - H) % G
        place = ((b * G + g).to(tl.int64) * S + p) * DH
        out = k_cache + place if head < H + G else v_cache + place
        tl.store(out + half, lo)
        tl.store(out + DH // 2 + half, hi)


@triton.jit
def _attend(
    q, k_cache, v_cache, pos, mixed, partial, total, S, scale,
    H: tl.constexpr, G: tl.constexpr, DH: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A share of a context for the query heads of one key/value head (split as in flash-decoding)."""
    b, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(pos + b) + 1
    share = tl.cdiv(tl.cdiv(n, SPLITS), BN) * BN
    first, last = split * share, tl.minimum(n, (split + 1) * share)
    row, d, col = tl.arange(0, ROWS), tl.arange(0, DH), tl.arange(0, BN)
    head = g * (H // G) + row
    used = row < H // G
    queries = tl.load(q + (b * H + head)[:, None] * DH + d[None, :], mask=used[:, None], other=0.0)
    base = (b * G + g).to(tl.int64) * S * DH
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DH), tl.float32)
    for start in range(first, last, BN):
        at = start + col
        inside = at < last
        keys = tl.load(
            k_cache + base + at[None, :] * DH + d[:, None], mask=inside[None, :], other=0.0
        )  # [DH, BN]
        score = tl.dot(queries, keys, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp(score - new_top[:, None])
        shrink = tl.exp(top - new_top)
        values = tl.load(
            v_cache + base + at[:, None] * DH + d[None, :], mask=inside[:, None], other=0.0
        )  # [BN, DH]
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        weight = weight * shrink + tl.sum(p, axis=1)
        top = new_top
    if SPLITS == 1:
        tl.store(mixed + (b * H + head)[:, None] * DH + d[None, :], acc / weight[:, None], mask=used[:, None])
    else:
        place = (b * H + head) * SPLITS + split
        tl.store(partial + place[:, None] * DH + d[None, :], acc, mask=used[:, None])
        log = tl.where(weight > 0, top, float("-inf"))
        tl.store(total + place * 2, log, mask=used)
        tl.store(total + place * 2 + 1, weight, mask=used)


@triton.jit
def _join(partial, total, mixed, DH: tl.constexpr, SPLITS: tl.constexpr):
    """Join the shares of one sequence and head."""
    place = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DH)
    top = tl.load(total + (place * SPLITS + s) * 2)
    weight = tl.load(total + (place * SPLITS + s) * 2 + 1)
    factor = tl.exp(top - tl.max(top, axis=0))  # an empty share has top -inf, so factor 0
    acc = tl.load(partial + (place * SPLITS + s)[:, None] * DH + d[None, :])
    tl.store(mixed + place * DH + d, tl.sum(acc * factor[:, None], axis=0) / tl.sum(weight * factor, axis=0))


@triton.jit
def _score(logits, tokens, pos, right, nll, L, first, last, V: tl.constexpr, BLOCK: tl.constexpr):
    """Compare one sequence's logits with the text and move on; behind the window's end start again."""
    b = tl.program_id(0)
    p = tl.load(pos + b)
    target = tl.load(tokens + b * L + p + 1)
    col = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + b * V + start + col).to(tl.float32)
        new = tl.maximum(top, value)
        place = tl.where(value > top, start + col, place)
        mass = mass * tl.exp(top - new) + tl.exp(value - new)
        top = new
    best = tl.max(top, axis=0)
    answer = tl.min(tl.where(top == best, place, V), axis=0)
    log = best + tl.log(tl.sum(mass * tl.exp(top - best), axis=0))
    tl.store(right + b, tl.load(right + b) + (answer == target).to(tl.int32))
    tl.store(nll + b, tl.load(nll + b) + log - tl.load(logits + b * V + target).to(tl.float32))
    tl.store(pos + b, tl.where(p + 1 < last, p + 1, first))


def embed_norm(tokens: Tensor, pos: Tensor, embed: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """See `decode_ops.embed_norm`."""
    d = embed.shape[1]
    x, h = embed.new_empty(len(pos), d), embed.new_empty(len(pos), d)
    _embed_norm[(len(pos),)](
        tokens, pos, embed, gain, x, h, tokens.shape[1], D=d, BLOCK=triton.next_power_of_2(d), num_warps=4
    )
    return x, h


def add_norm(x: Tensor, delta: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """See `decode_ops.add_norm`."""
    h, hf = torch.empty_like(x), x.new_empty(x.shape, dtype=torch.float32)
    d = x.shape[1]
    _add_norm[(len(x),)](x, delta, gain, h, hf, D=d, BLOCK=triton.next_power_of_2(d), num_warps=4)
    return h, hf


def rope_cache(
    qkv: Tensor, pos: Tensor, turn: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    """See `decode_ops.rope_cache`."""
    b, g, s, dh = k_cache.shape
    q = qkv.new_empty(b, n_heads, dh)
    _rope_cache[(b, n_heads + 2 * g)](
        qkv, pos, turn, q, k_cache, v_cache, s, turn.shape[1], H=n_heads, G=g, DH=dh, num_warps=1
    )
    return q


def _splits(n_sequences: int, n_kv_heads: int) -> int:
    """Shares of a context, a power of two up to 16, so that attention fills the chip with 1024 programs."""
    splits = 1
    while splits < 16 and n_sequences * n_kv_heads * splits < 1024:
        splits *= 2
    return splits


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> Tensor:
    """See `decode_ops.attend`."""
    b, h, dh = q.shape
    g, s = k_cache.shape[1:3]
    splits = _splits(b, g)
    mixed = torch.empty_like(q)
    partial = q.new_empty(b * h * splits if splits > 1 else 1, dh, dtype=torch.float32)
    total = q.new_empty(b * h * splits if splits > 1 else 1, 2, dtype=torch.float32)
    _attend[(b, g, splits)](
        q, k_cache, v_cache, pos, mixed, partial, total, s, dh**-0.5,
        H=h, G=g, DH=dh, SPLITS=splits, ROWS=max(16, triton.next_power_of_2(h // g)), BN=64,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join[(b * h,)](partial, total, mixed, DH=dh, SPLITS=splits, num_warps=1)
    return mixed.view(b, h * dh)


def score(
    logits: Tensor, tokens: Tensor, pos: Tensor, right: Tensor, nll: Tensor, first: int, last: int
) -> None:
    """See `decode_ops.score`."""
    v = logits.shape[1]
    _score[(len(pos),)](
        logits, tokens, pos, right, nll, tokens.shape[1], first, last, V=v, BLOCK=min(1024, v), num_warps=4
    )
