"""The functions of a step between its dense products: Triton on CUDA, torch operators on a CPU.

A step runs token rows: each is one token of a running sequence, of its prompt or of its answer, and says in
which slot its sequence runs, at which position, and of which document it is. Keys and values lie in blocks of
`BLOCK` positions that a table gives to slots. Rows behind the first `n_rows` fill up a captured graph: they
write to a spare block and count nowhere.

Shapes: T rows, D model, H query heads, G key/value heads, Dh head, E experts, F hidden units, K slots per
token (the training's top_k), M blocks of a slot, N documents, S positions, V tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.config import BLOCK
from moe.lm.engine.rows import StepInput
from moe.lm.model import EPS, mixing_weights


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), EPS)


def embed_norm(step: StepInput, documents: Tensor, embed: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Begin the stream.

    Args:
        step: Its rows.
        documents: Text, int32.  # [N, S + 1]
        embed: Embedding.  # [V, D]
        gain: Of the norm.  # [D]

    Returns:
        The stream and its norm.  # [T, D] each
    """
    if embed.is_cuda:
        from moe.lm.engine import row_kernels

        return row_kernels.embed_norm(step, documents, embed, gain)
    x = embed[documents[step.document, step.position].long()]
    return x, _norm(x, gain)


def add_norm(x: Tensor, delta: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Add to the stream, in place; return the norm, also in float32 for the router, [T, D] each."""
    if x.is_cuda:
        from moe.lm.engine import row_kernels

        return row_kernels.add_norm(x, delta, gain)
    x += delta
    h = _norm(x, gain)
    return h, h.float()


def rope_cache(
    qkv: Tensor, step: StepInput, blocks: Tensor, turn: Tensor, keys: Tensor, values: Tensor, n_heads: int
) -> Tensor:
    """Norm and turn queries and keys, and put keys and values into their blocks.

    Args:
        qkv: Projections.  # [T, (H + 2G) Dh]
        step: Its rows.
        blocks: Of each slot, int32.  # [slots, M]
        turn: Rotary table.  # [2, S, Dh / 2]
        keys: Changed in place.  # [blocks, G, BLOCK, Dh]
        values: Likewise.
        n_heads: H.

    Returns:
        Queries.  # [T, H, Dh]
    """
    if qkv.is_cuda:
        from moe.lm.engine import row_kernels

        return row_kernels.rope_cache(qkv, step, blocks, turn, keys, values, n_heads)
    g, dh = keys.shape[1], keys.shape[3]
    heads = qkv.view(len(qkv), -1, dh)
    turned = F.rms_norm(heads[:, : n_heads + g], (dh,), eps=EPS)
    position = step.position.long()
    cos, sin = turn[0, position, None], turn[1, position, None]  # [T, 1, Dh / 2]
    lo, hi = turned.float().chunk(2, dim=-1)
    turned = torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1).to(qkv.dtype)
    block = blocks[step.slot.long(), position // BLOCK].long()
    keys[block, :, position % BLOCK] = turned[:, n_heads:]
    values[block, :, position % BLOCK] = heads[:, n_heads + g :]
    return turned[:, :n_heads].contiguous()


def attend(q: Tensor, step: StepInput, blocks: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from each row to its sequence up to its position.  # [T, H, Dh] -> [T, H Dh]."""
    if q.is_cuda:
        from moe.lm.engine import row_kernels

        return row_kernels.attend(q, step, blocks, keys, values)
    mixed = torch.empty_like(q)
    for rows in _alike(step):
        position = step.position[rows]
        n = int(position.max()) // BLOCK + 1
        own = blocks[step.slot[rows].unique_consecutive().long(), :n].long()  # [B, n]
        k, v = (pool[own].transpose(1, 2).flatten(2, 3) for pool in (keys, values))  # [B, G, n BLOCK, Dh]
        seen = (torch.arange(k.shape[2]) <= position[:, None]).view(len(own), 1, -1, k.shape[2])
        query = q[rows].view(len(own), -1, *q.shape[1:]).transpose(1, 2)  # [B, H, rows of one slot, Dh]
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=seen, enable_gqa=True)
        mixed[rows] = out.transpose(1, 2).flatten(0, 1)
    return mixed.flatten(1)


def _alike(step: StepInput) -> list[slice]:
    """Rows that attend together: runs of slots with one row each, and each slot with several."""
    _, n = step.slot.unique_consecutive(return_counts=True)
    parts: list[slice] = []
    first = alone = 0
    for count in n.tolist():
        if count > 1:
            parts += [slice(alone, first), slice(first, first + count)]
            alone = first + count
        first += count
    return [part for part in (*parts, slice(alone, first)) if part.stop > part.start]


def demand_of(logits: Tensor, step: StepInput, demand: Tensor, slots: int) -> None:
    """Add up, per expert, the gates inside each token's own top k, as shares of the token's gates.

    Args:
        logits: Float32.  # [T, E]
        step: Its rows and its top k.
        demand: Float32, added to.  # [E]
        slots: K.
    """
    if logits.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.demand_of(logits, step, demand, slots)
    logits = logits[: int(step.n_rows)]
    top = logits.topk(int(step.top_k), dim=-1).indices
    gates = logits.sigmoid()
    gates = gates / gates.sum(dim=-1, keepdim=True)
    demand += torch.zeros_like(gates).scatter(-1, top, gates.gather(-1, top)).sum(dim=0)


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
    """Choose each token's experts among those that the step may read, and enter it in their lists.

    Args:
        logits: Float32.  # [T, E]
        step: Its rows and knobs.
        demand: See `demand_of`.  # [E]
        penalty: Taken off the demand before it is ranked; the lower number is first among equals.  # [E]
        held: Experts that this device computes, int32, 1 or 0; pairs of others enter no list.  # [E]
        counts: Tokens of each expert, int32, added to; 0 before.  # [E]
        lists: Its (token, slot) pairs, int32, written up to `counts`, in any order.  # [E, T]
        slots: K.

    Returns:
        Weights of the chosen, see `mixing_weights`, 0 in unused slots; float32.  # [T, K]
    """
    if logits.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.select(logits, step, demand, penalty, held, counts, lists, slots)
    weights = logits.new_zeros(len(logits), slots)
    n, k = int(step.n_rows), int(step.top_k)
    logits = logits[:n]
    rank = (demand - penalty).sort(descending=True, stable=True).indices
    barred = torch.ones_like(demand, dtype=torch.bool)
    barred[rank[: int(step.readable)]] = False
    chosen, experts = logits.masked_fill(barred, -torch.inf).topk(k, dim=-1)  # [n, k]
    weights[:n, :k] = mixing_weights(chosen, logits, slots)
    here = held[experts.flatten()] > 0
    pair = (torch.arange(n)[:, None] * slots + torch.arange(k)).flatten()[here]
    by_expert = experts.flatten()[here].sort(stable=True)
    counts += by_expert.values.bincount(minlength=len(counts)).int()
    start = (counts.cumsum(0) - counts)[by_expert.values]
    lists[by_expert.values, torch.arange(len(pair)) - start] = pair[by_expert.indices].int()
    return weights


def experts(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    counts: Tensor,
    lists: Tensor,
    weights: Tensor,
    zeroed: bool = False,
) -> Tensor:
    """Outputs of all (token, slot) pairs, weighed; experts without tokens are not read.

    Args:
        h: Normed stream.  # [T, D]
        gate_up: Gates, then ups, of each expert.  # [E, D, 2F]
        down: Its way back.  # [E, F, D]
        counts: See `select`.  # [E]
        lists: See `select`.  # [E, T]
        weights: See `select`.  # [T, K]
        zeroed: Whether pairs that are not computed here are 0; otherwise they are not to be read.

    Returns:
        Of pair `token * K + slot`.  # [T K, D]
    """
    if h.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.experts(h, gate_up, down, counts, lists, weights, zeroed)
    slots = weights.shape[1]
    out = h.new_zeros(h.shape[0] * slots, h.shape[1])
    for expert in counts.nonzero().flatten().tolist():
        pairs = lists[expert, : int(counts[expert])].long()
        gate, up = (h[pairs // slots] @ gate_up[expert]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * weights.flatten()[pairs][:, None].to(h.dtype)
        out[pairs] = hidden @ down[expert]
    return out


def mix_norm(
    x: Tensor, out: Tensor, step: StepInput, gain: Tensor, counts: Tensor, demand: Tensor, usage: Tensor,
    slots: int,
) -> Tensor:  # fmt: skip
    """Add each token's experts to the stream, in place, and norm it for the next layer.

    Args:
        x: Stream.  # [T, D]
        out: See `experts`.  # [T K, D]
        step: Its rows and its top k.
        gain: Of the norm.  # [D]
        counts: Set to 0, after they were counted in `usage`.  # [E]
        demand: Set to 0.  # [E]
        usage: Tokens of each expert of this layer, and steps that read it, int64, added to.  # [2, E]
        slots: K.

    Returns:
        The norm.  # [T, D]
    """
    if x.is_cuda:
        from moe.lm.engine import expert_kernels

        return expert_kernels.mix_norm(x, out, step, gain, counts, demand, usage, slots)
    n = int(step.n_rows)
    x[:n] += out.view(len(x), slots, -1)[:n, : int(step.top_k)].float().sum(dim=1).to(x.dtype)
    usage += torch.stack([counts, counts > 0])
    counts.zero_()
    demand.zero_()
    return _norm(x, gain)


def score(logits: Tensor, step: StepInput, documents: Tensor, answers: Tensor) -> None:
    """Compare with the text.

    Args:
        logits: Of the token behind each row.  # [T, V]
        step: Its rows.
        documents: Text, int32.  # [N, S + 1]
        answers: Set to the likeliest token, its probability, the entropy of the next token over its maximum,
            and the loss of the text's own in nats; float32.  # [4, T]
    """
    if logits.is_cuda:
        from moe.lm.engine import row_kernels

        return row_kernels.score(logits, step, documents, answers)
    target = documents[step.document, step.position + 1].long()
    log_p = logits.float().log_softmax(dim=-1)
    best = log_p.max(dim=-1)
    answers[0], answers[1] = best.indices, best.values.exp()
    answers[2] = -(log_p.exp() * log_p).sum(dim=-1) / math.log(log_p.shape[1])
    answers[3] = -log_p.gather(1, target[:, None])[:, 0]
