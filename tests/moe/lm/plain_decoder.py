"""A tiny language model and a plain decoder of it: position by position, head by head, expert by expert."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.config import LmConfig
from moe.lm.model import EPS, LanguageModel, initialise

TINY = LmConfig(
    vocabulary=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8,
    expert_width=32, top_k=4, context=160,
)  # fmt: skip


def make_model(config: LmConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Random weights with a router that decides and a head that answers."""
    model = initialise(LanguageModel(config, dtype), torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            parameter.data.mul_(30)
        if name == "head.weight":
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    return model.to(device).serve()


def make_tokens(b: int, length: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(TINY.vocabulary, (b, length), generator=generator, dtype=torch.int32).to(device)


def plain_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    normal = x / torch.sqrt((x * x).mean() + EPS)
    return normal if gain is None else normal * gain


def plain_turn(x: Tensor, position: int) -> Tensor:
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def plain_gates(logits: Tensor) -> list[float]:
    return [1 / (1 + math.exp(-v)) for v in logits.tolist()]


def plain_top(values: list[float], n: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


def plain_readable(logits: Tensor, top_k: int, readable: int) -> list[int]:
    """Experts in most demand among the tokens of one step, [T, E]."""
    demand = [0.0] * logits.shape[1]
    for row in logits:
        gates = plain_gates(row)
        for expert in plain_top(row.tolist(), top_k):
            demand[expert] += gates[expert] / sum(gates)
    return plain_top(demand, readable)


def plain_losses(model: LanguageModel, tokens: Tensor, first: int, top_k: int, readable: int) -> Tensor:
    """Losses of all positions, [B, S]: the prompt before `first` as in training, then under knobs."""
    c = model.config
    group = c.n_heads // c.n_kv_heads
    memory: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in tokens] for _ in range(c.n_layers)]
    losses = torch.zeros(len(tokens), tokens.shape[1] - 1)
    for position in range(tokens.shape[1] - 1):
        stream = [model.embed[int(row[position])] for row in tokens]
        k, limit = (c.top_k, c.n_experts) if position < first else (top_k, readable)
        for block, seen in zip(model.layers(), memory, strict=True):
            for b, x in enumerate(stream):
                qkv = block.attention.qkv.weight @ plain_norm(x, block.attention_norm.weight)
                heads = qkv.view(-1, c.head_dim)
                keys = [
                    plain_turn(plain_norm(h), position) for h in heads[c.n_heads : c.n_heads + c.n_kv_heads]
                ]
                seen[b].append((torch.stack(keys), heads[c.n_heads + c.n_kv_heads :]))
                mixed = []
                for head in range(c.n_heads):
                    query = plain_turn(plain_norm(heads[head]), position)
                    scores = torch.stack([query @ ks[head // group] for ks, _ in seen[b]]) / c.head_dim**0.5
                    shares = torch.exp(scores - scores.max())
                    shares = shares / shares.sum()
                    mixed.append(
                        sum(s * vs[head // group] for s, (_, vs) in zip(shares, seen[b], strict=True))
                    )
                stream[b] = x + block.attention.out.weight @ torch.cat(mixed)  # type: ignore[arg-type]
            normed = [plain_norm(x, block.moe_norm.weight) for x in stream]
            assert block.moe.router is not None
            logits = torch.stack([block.moe.router @ h for h in normed])
            allowed = plain_readable(logits, k, limit)
            for b, h in enumerate(normed):
                gates = plain_gates(logits[b])
                chosen = sorted(allowed, key=lambda e: (-gates[e], e))[:k]
                trained = sum(sorted(gates)[-c.top_k :])
                total = math.sqrt(sum(gates[e] for e in chosen) * trained)
                for e in chosen:
                    gate, up = (h @ block.moe.gate_up[e]).chunk(2)
                    stream[b] = stream[b] + gates[e] / total * ((F.silu(gate) * up) @ block.moe.down[e])
        for b, x in enumerate(stream):
            answers = (model.embed if model.head is None else model.head.weight) @ plain_norm(
                x, model.norm.weight
            )
            losses[b, position] = F.cross_entropy(answers, tokens[b, position + 1].long())
    return losses
