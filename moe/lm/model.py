"""A standard fine-grained Mixture-of-Experts language model, and its dense twin, whole sequences at once.

Pre-norm, rotary positions, grouped-query attention with normed queries and keys, SwiGLU experts chosen by a
linear router. Masters are float32; matrices are cast to the activations' type where they are used.

Shapes: B sequences, S positions, T = B * S tokens, D model, H query heads, G key/value heads, Dh head, E
experts, F hidden units of an expert, K choices per token, R = T * K rows and one spare row behind them, V
tokens, L layers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from moe.lm.config import LmConfig
from moe.model.dispatch import Dispatch, gather_rows, make_dispatch
from moe.model.kernels import copy_rows, mix_rows

EPS = 1e-6


@dataclass(frozen=True)
class RoutingDecision:
    """What one layer decided.

    Attributes:
        logits: Float32.  # [T, E]
        experts: int64.  # [T, K]
        dispatch: Where the rows of each expert are.
    """

    logits: Tensor
    experts: Tensor
    dispatch: Dispatch


def mixing_weights(chosen: Tensor, logits: Tensor, trained_top_k: int) -> Tensor:
    """Weights of chosen experts.

    Gates are sigmoids, as in DeepSeek-V3 (arXiv 2412.19437, equation 15). In training those of the chosen are
    divided by their sum. Where fewer are chosen, or others than the token's best, they are divided by the
    root of that sum times the sum in training: half way between weights that sum to one and weights kept as
    they are, and better than both.

    Args:
        chosen: Router logits of the chosen, float32.  # [..., K]
        logits: Of all experts.  # [..., E]
        trained_top_k: Experts per token in training.

    Returns:
        Float32.  # [..., K]
    """
    gates = chosen.sigmoid()
    trained = logits.topk(trained_top_k, dim=-1).values.sigmoid().sum(dim=-1, keepdim=True)
    return gates / (gates.sum(dim=-1, keepdim=True) * trained).sqrt()


class _WeightedSwiGlu(Function):
    """silu(gate) * up * weight of the row's choice.

    Weighing the hidden units instead of the outputs makes the later mix a plain sum, so that nobody keeps the
    outputs for the backward pass.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.dispatch = dispatch  # pyright: ignore[reportAttributeAccessIssue]
        if gate_up.is_cuda:
            from moe.lm import train_kernels

            return train_kernels.weighted_swiglu(gate_up, weights, dispatch)
        gate, up = gate_up.chunk(2, dim=-1)  # [R + 1, F] each
        return F.silu(gate) * up * _weight_of_row(weights, dispatch).to(gate.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up, weights = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        dispatch: Dispatch = ctx.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        (grad,) = grads
        if gate_up.is_cuda:
            from moe.lm import train_kernels

            return *train_kernels.weighted_swiglu_backward(grad, gate_up, weights, dispatch), None
        gate, up = gate_up.chunk(2, dim=-1)
        dot = (grad.float() * (F.silu(gate) * up).float()).sum(dim=-1)  # [R + 1]
        grad_weights = dot[dispatch.row_of_pair]  # [T, K]
        grad = grad * _weight_of_row(weights, dispatch).to(gate.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([grad_gate, grad * F.silu(gate)], dim=-1), grad_weights, None


def _weight_of_row(weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Weight of the choice that each row serves, 0 for the spare row.  # [R + 1, 1]."""
    return F.pad(weights.flatten()[dispatch.pair_of_row], (0, 1))[:, None]


class _SumRows(Function):
    """Sum of each token's rows; null slots, behind the last expert's end, count nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch  # pyright: ignore[reportAttributeAccessIssue]
        ones = torch.ones(dispatch.row_of_pair.shape, device=rows.device)
        return mix_rows([rows], [dispatch.expert_ends[-1]], dispatch.row_of_pair, ones)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        return copy_rows(grads[0].contiguous(), dispatch.token_of_row, dispatch.expert_ends[-1]), None


class Linear(nn.Module):
    """Linear map without offset, cast to the input's type."""

    def __init__(self, n_in: int, n_out: int) -> None:
        """Leave the weight, [n_out, n_in], uninitialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n_in] to [..., n_out]."""
        return F.linear(x, self.weight.to(x.dtype))


class RmsNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, width: int) -> None:
        """Start with gains of 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPS)


class Experts(nn.Module):
    """Router and experts of one layer, or one dense SwiGLU."""

    def __init__(self, config: LmConfig) -> None:
        """Leave the matrices uninitialised."""
        super().__init__()
        self.config = config
        d, f, n = config.d_model, config.expert_width, config.n_experts
        shape = (n,) if n else ()
        self.router = nn.Parameter(torch.empty(n, d)) if n else None  # [E, D]
        self.gate_up = nn.Parameter(torch.empty(*shape, d, 2 * f))  # [E, D, 2F]
        self.down = nn.Parameter(torch.empty(*shape, f, d))  # [E, F, D]

    def forward(self, x: Tensor, top_k: int) -> tuple[Tensor, RoutingDecision | None]:
        """Return what is added to the stream, [B, S, D], and the decisions."""
        if self.router is None:
            gate, up = (x @ self.gate_up.to(x.dtype)).chunk(2, dim=-1)
            return (F.silu(gate) * up) @ self.down.to(x.dtype), None
        tokens = x.flatten(0, 1)  # [T, D]
        logits = F.linear(tokens.float(), self.router.float())  # [T, E]
        chosen, experts = logits.topk(top_k, dim=-1)  # [T, K] each
        weights = mixing_weights(chosen, logits, self.config.top_k)
        dispatch = make_dispatch(experts, logits.shape[-1])
        rows = gather_rows(tokens, dispatch, logits.shape[-1])  # [R + 1, D]
        ends = dispatch.expert_ends
        gate_up = F.grouped_mm(rows, self.gate_up.to(x.dtype), offs=ends)  # [R + 1, 2F]
        hidden = cast(Tensor, _WeightedSwiGlu.apply(gate_up, weights, dispatch))  # [R + 1, F]
        out = F.grouped_mm(hidden, self.down.to(x.dtype), offs=ends)  # [R + 1, D]
        mixed = cast(Tensor, _SumRows.apply(out, dispatch))
        return mixed.view_as(x), RoutingDecision(logits, experts, dispatch)


class Attention(nn.Module):
    """Causal grouped-query attention with normed queries and keys and rotary positions."""

    def __init__(self, config: LmConfig) -> None:
        """Leave the matrices uninitialised."""
        super().__init__()
        self.config = config
        inner = config.n_heads * config.head_dim
        self.qkv = Linear(config.d_model, inner + 2 * config.n_kv_heads * config.head_dim)
        self.out = Linear(inner, config.d_model)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Return what is added to the stream, [B, S, D]."""
        c = self.config
        heads = self.qkv(x).unflatten(-1, (-1, c.head_dim))  # [B, S, H + 2G, Dh]
        n_turned = c.n_heads + c.n_kv_heads
        turned = rotate(F.rms_norm(heads[:, :, :n_turned], (c.head_dim,), eps=EPS), turn)
        q, k = turned.transpose(1, 2).split([c.n_heads, c.n_kv_heads], dim=1)
        v = heads[:, :, n_turned:].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, H, S, Dh]
        return self.out(mixed.transpose(1, 2).flatten(2))


def turn_table(length: int, head_dim: int) -> Tensor:
    """Cosines and sines of the rotary positions, float32, [2, length, Dh / 2], on torch's default device."""
    rate = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * rate
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the halves of [B, S, heads, Dh] by position."""
    cos, sin = turn[0, : x.shape[1], None], turn[1, : x.shape[1], None]  # [S, 1, Dh / 2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: LmConfig) -> None:
        """Leave the matrices uninitialised."""
        super().__init__()
        self.attention_norm, self.attention = RmsNorm(config.d_model), Attention(config)
        self.moe_norm, self.moe = RmsNorm(config.d_model), Experts(config)


class LanguageModel(nn.Module):
    """The model; weights are uninitialised until `initialise` or `load_state_dict`.

    Attributes:
        dtype: Type of the activations.
        turn: Rotary table, see `turn_table`.
    """

    turn: Tensor

    def __init__(self, config: LmConfig, dtype: torch.dtype) -> None:
        """Create the layers on torch's default device."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Parameter(torch.empty(config.vocabulary, config.d_model))  # [V, D]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RmsNorm(config.d_model)
        self.head = None if config.tied else Linear(config.d_model, config.vocabulary)
        self.register_buffer("turn", turn_table(config.context, config.head_dim), persistent=False)

    def layers(self) -> list[Block]:
        """The layers, first to last."""
        return [cast(Block, block) for block in self.blocks]

    def forward(self, tokens: Tensor, top_k: int | None = None) -> tuple[Tensor, list[RoutingDecision]]:
        """Run whole sequences.

        Args:
            tokens: int64.  # [B, S]
            top_k: Experts per token; None means those of the training.

        Returns:
            The normed stream, [B, S, D], and the decisions of each layer, none of a dense one.
        """
        x = F.embedding(tokens, self.embed).to(self.dtype)
        decisions = []
        for block in self.layers():
            x = x + block.attention(block.attention_norm(x), self.turn)
            update, decision = block.moe(block.moe_norm(x), top_k or self.config.top_k)
            x = x + update
            if decision is not None:
                decisions.append(decision)
        return self.norm(x), decisions

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the normed stream in its type.  # [..., V]."""
        return F.linear(x, self.embed.to(x.dtype)) if self.head is None else self.head(x)

    def loss(self, tokens: Tensor) -> tuple[Tensor, list[RoutingDecision]]:
        """Cross-entropy of windows, int64, [B, S + 1], 0-dim; and the decisions, for `RoutingLoss`."""
        x, decisions = self(tokens[:, :-1])
        return F.cross_entropy(self.logits(x).float().flatten(0, 1), tokens[:, 1:].flatten()), decisions

    def serve(self) -> LanguageModel:
        """Hold matrices in the activations' type, for serving; routers and norms stay float32."""
        self.requires_grad_(False).eval()
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not name.endswith("router"):
                parameter.data = parameter.data.to(self.dtype)
        return self


def initialise(model: LanguageModel, generator: torch.Generator) -> LanguageModel:
    """Draw every matrix; those that write to the stream are smaller by sqrt(2 L), the head is zero."""
    c = model.config
    into_stream = 1 / math.sqrt(2 * c.n_layers)
    stds = {
        "embed": c.d_model**-0.5 if c.tied else 0.3,
        "router": 0.1 * c.d_model**-0.5,
        "gate_up": c.d_model**-0.5,
        "down": c.expert_width**-0.5 * into_stream,
        "qkv.weight": c.d_model**-0.5,
        "out.weight": (c.n_heads * c.head_dim) ** -0.5 * into_stream,
        "head.weight": 0.0,
    }
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            std = next(std for kind, std in stds.items() if name.endswith(kind))
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


def describe(model: LanguageModel) -> dict[str, Any]:
    """Shape and parameters of a model: all, in experts, active per token."""
    c = model.config
    everything = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("gate_up", "down")))
    active = everything - experts * (1 - c.top_k / c.n_experts) if c.n_experts else everything
    return {
        "parameters": everything, "expert_parameters": experts, "active_parameters": round(active),
        **asdict(c),
    }  # fmt: skip
