"""The functions of a decode step between its dense products: Triton on CUDA, torch operators on a CPU.

Shapes: B sequences, D model, H query heads, G key/value heads, Dh head, E experts, F hidden units, K slots
per token (the training's top_k), S positions, V tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.config import Gate
from moe.lm.model import EPS
from moe.lm.routing import normalised


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), EPS)


def embed_norm(tokens: Tensor, pos: Tensor, embed: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Begin the stream.

    Args:
        tokens: Text, int32.  # [B, S + 1]
        pos: Position of each sequence, int32.  # [B]
        embed: Embedding.  # [V, D]
        gain: Of the norm.  # [D]

    Returns:
        The stream and its norm.  # [B, D] each
    """
    if embed.is_cuda:
        from moe.lm.engine import row_kernels

        return stream_kernels.embed_norm(tokens, pos, embed, gain)
    x = embed[tokens.gather(1, pos[:, None].long())[:, 0].long()]
    return x, _norm(x, gain)


def add_norm(x: Tensor, delta: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Add to the stream, in place; return the norm, also in float32 for the router, [B, D] each."""
    if x.is_cuda:
        from moe.lm.engine import row_kernels

        return stream_kernels.add_norm(x, delta, gain)
    x += delta
    h = _norm(x, gain)
    return h, h.float()


def rope_cache(
    qkv: Tensor, pos: Tensor, turn: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    """Norm and turn queries and keys, and put keys and values into the cache.

    Args:
        qkv: Projections.  # [B, (H + 2G) Dh]
        pos: Positions, int32.  # [B]
        turn: Rotary table.  # [2, positions, Dh / 2]
        k_cache: Keys, changed in place.  # [B, G, S, Dh]
        v_cache: Values, likewise.
        n_heads: H.

    Returns:
        Queries.  # [B, H, Dh]
    """
    if qkv.is_cuda:
        from moe.lm.engine import row_kernels

        return stream_kernels.rope_cache(qkv, pos, turn, k_cache, v_cache, n_heads)
    b, g, _, dh = k_cache.shape
    heads = qkv.view(b, -1, dh)
    turned = F.rms_norm(heads[:, : n_heads + g], (dh,), eps=EPS)
    cos, sin = turn[0, pos.long(), None], turn[1, pos.long(), None]  # [B, 1, Dh / 2]
    lo, hi = turned.float().chunk(2, dim=-1)
    turned = torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1).to(qkv.dtype)
    every = torch.arange(b, device=qkv.device)
    k_cache[every, :, pos.long()] = turned[:, n_heads:]
    v_cache[every, :, pos.long()] = heads[:, n_heads + g :]
    return turned[:, :n_heads].contiguous()


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> Tensor:
    """Attend from one position of each sequence to all up to it.  # [B, H, Dh] -> [B, H Dh]."""
    if q.is_cuda:
        from moe.lm.engine import row_kernels

        return stream_kernels.attend(q, k_cache, v_cache, pos)
    seen = torch.arange(k_cache.shape[2], device=q.device) <= pos[:, None]  # [B, S]
    mixed = F.scaled_dot_product_attention(
        q[:, :, None], k_cache, v_cache, attn_mask=seen[:, None, None], enable_gqa=True
    )
    return mixed.flatten(1)


def demand_of(logits: Tensor, top_k: Tensor, demand: Tensor, slots: int, gate: Gate) -> None:
    """Add up, per expert, the probabilities inside each token's own top k.

    Args:
        logits: Float32.  # [B, E]
        top_k: Experts per token, 0-dim int32.
        demand: Float32, added to.  # [E]
        slots: K.
        gate: Of the model.
    """
    if logits.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.demand_of(logits, top_k, demand, slots, gate)
    top = logits.topk(int(top_k), dim=-1).indices
    p = normalised(logits, gate)
    demand += torch.zeros_like(p).scatter(-1, top, p.gather(-1, top)).sum(dim=0)


def select(
    logits: Tensor,
    demand: Tensor,
    top_k: Tensor,
    budget: Tensor,
    counts: Tensor,
    table: Tensor,
    slots: int,
    gate: Gate,
) -> Tensor:
    """Choose each token's experts among those that the step may read, and enter it in their lists.

    Args:
        logits: Float32.  # [B, E]
        demand: See `demand_of`; the lower number first among equals.  # [E]
        top_k: Experts per token, 0-dim int32.
        budget: Experts that may be read, 0-dim int32, at least `top_k`.
        counts: Tokens of each expert, int32, added to; 0 before.  # [E]
        table: Its (token, slot) pairs, int32, written up to `counts`, in any order.  # [E, B]
        slots: K.
        gate: Of the model.

    Returns:
        Weights, renormalised over the chosen, 0 in unused slots; float32.  # [B, K]
    """
    if logits.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.select(logits, demand, top_k, budget, counts, table, slots, gate)
    allowed = torch.zeros_like(demand, dtype=torch.bool)
    allowed[demand.sort(descending=True, stable=True).indices[: int(budget)]] = True
    top = logits.masked_fill(~allowed, -math.inf).topk(int(top_k), dim=-1)
    for token, chosen in enumerate(top.indices.tolist()):
        for slot, expert in enumerate(chosen):
            table[expert, counts[expert]] = token * slots + slot
            counts[expert] += 1
    return F.pad(normalised(top.values, gate), (0, slots - int(top_k)))


def experts(
    h: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, table: Tensor, weights: Tensor
) -> Tensor:
    """Outputs of all (token, slot) pairs, weighed; experts without tokens are not read.

    Args:
        h: Normed stream.  # [B, D]
        gate_up: Gates, then ups, of each expert.  # [E, D, 2F]
        down: Its way back.  # [E, F, D]
        counts: See `select`.  # [E]
        table: See `select`.  # [E, B]
        weights: See `select`.  # [B, K]

    Returns:
        Of pair `token * K + slot`; those of unused slots are not to be read.  # [B K, D]
    """
    if h.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.experts(h, gate_up, down, counts, table, weights)
    slots = weights.shape[1]
    out = h.new_zeros(h.shape[0] * slots, h.shape[1])
    for expert in counts.nonzero().flatten().tolist():
        pairs = table[expert, : int(counts[expert])].long()
        gate, up = (h[pairs // slots] @ gate_up[expert]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * weights.flatten()[pairs][:, None].to(h.dtype)
        out[pairs] = hidden @ down[expert]
    return out


def mix_norm(
    x: Tensor,
    out: Tensor,
    top_k: Tensor,
    gain: Tensor,
    counts: Tensor,
    demand: Tensor,
    used: Tensor,
    slots: int,
) -> Tensor:
    """Add each token's experts to the stream, in place, and norm it for the next layer.

    Args:
        x: Stream.  # [B, D]
        out: See `experts`.  # [B K, D]
        top_k: Experts per token, 0-dim int32.
        gain: Of the norm.  # [D]
        counts: Set to 0, after the experts with tokens are added to `used`.  # [E]
        demand: Set to 0.  # [E]
        used: Experts read so far, 0-dim int64.
        slots: K.

    Returns:
        The norm.  # [B, D]
    """
    if x.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.mix_norm(x, out, top_k, gain, counts, demand, used, slots)
    x += out.view(len(x), slots, -1)[:, : int(top_k)].float().sum(dim=1).to(x.dtype)
    used += (counts > 0).sum()
    counts.zero_()
    demand.zero_()
    return _norm(x, gain)


def score(
    logits: Tensor, tokens: Tensor, pos: Tensor, right: Tensor, nll: Tensor, first: int, last: int
) -> None:
    """Compare with the text, and move every sequence on; behind the end of its window it starts again.

    Args:
        logits: Of the next token.  # [B, V]
        tokens: Text, int32.  # [B, S + 1]
        pos: Positions, int32, moved on.  # [B]
        right: Right tokens so far, int32, added to.  # [B]
        nll: Loss so far in nats, float32, added to.  # [B]
        first: Where a sequence starts again.
        last: Position behind the last one that is decoded.
    """
    if logits.is_cuda:
        from moe.lm.engine import row_kernels

        return stream_kernels.score(logits, tokens, pos, right, nll, first, last)
    target = tokens.gather(1, pos[:, None].long() + 1)[:, 0].long()
    right += (logits.argmax(dim=-1) == target).int()
    nll += F.cross_entropy(logits.float(), target, reduction="none")
    pos.copy_(torch.where(pos + 1 < last, pos + 1, first))
