"""A pre-norm Mixture-of-Experts transformer for images and for bytes.

Shapes: B samples, S tokens of a sample, T = B * S tokens, D model, E experts, L layers, C classes.
Matrices are cast to the activations' type where they are used, so the same code trains with float32 masters
and bfloat16 arithmetic, and serves from bfloat16 weights. Router and norms stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.model.config import IMAGE_SIZE, ModelConfig
from moe.model.experts import ConstantExpert, Experts, ExpertSlice
from moe.model.layers import BatchNorm, Convolution, GroupNorm, LayerNorm, Linear, RmsNorm, make_norm
from moe.model.router import Router, Routing, route
from moe.model.stem import Stem


@dataclass(frozen=True)
class ModelOutput:
    """Answers of a batch and the routing behind them; everything stays on the device.

    Attributes:
        logits: Float32 logits, [B, C] for vision and [B, S, C] for language.
        routing: One decision per layer.
        rotation_logits: Float32 logits of the quarter turns, [B, 4]; None without a rotation head.
    """

    logits: Tensor
    routing: tuple[Routing, ...]
    rotation_logits: Tensor | None = None

    @property
    def predictions(self) -> Tensor:
        """Most probable class of each answer, [B] or [B, S]."""
        return self.logits.argmax(dim=-1)

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class, [B] or [B, S]."""
        return self.logits.softmax(dim=-1).amax(dim=-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of each answer over its maximum log C, 0 to 1, [B] or [B, S]."""
        log_p = self.logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1) / math.log(self.logits.shape[-1])

    @property
    def tokens_per_expert(self) -> Tensor:
        """Tokens sent to each expert of each layer, [L, E]."""
        ends = torch.stack([routing.dispatch.expert_ends for routing in self.routing])  # [L, E]
        return ends.diff(dim=-1, prepend=ends.new_zeros(len(ends), 1))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), causal for language."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.causal = config.task == "language"
        self.qkv = Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim)
        self.out = Linear(self.n_heads * self.head_dim, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each sample of [B, S, D]."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, S, head_dim]
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        # For no samples, a rank's share of a small batch, CUDA's attention returns nothing at all.
        attend = F.scaled_dot_product_attention
        mixed = attend(q, k, v, is_causal=self.causal, enable_gqa=True) if len(x) else q
        return self.out(mixed.transpose(1, 2).flatten(2))


class MoELayer(nn.Module):
    """Router and experts; returns its routing rather than storing it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config.d_model, config.n_experts, config.balance_bias)
        self.experts = Experts(config.d_model, config.expert_widths, config.zero_computation)
        self.max_top_k = config.top_k_choices[-1]

    def forward(
        self,
        x: Tensor,
        top_k: int | Tensor,
        routing_bias: float | Tensor,
        expert_cost: Tensor,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Send each token of [B, S, D] through its experts, but for padding, [B * S]."""
        tokens = x.flatten(0, -2)  # [T, D]
        routing = route(
            self.router(tokens),
            top_k,
            routing_bias,
            expert_cost,
            balance_bias=self.router.balance_bias,
            max_top_k=self.max_top_k,
            padding=padding,
        )
        return self.experts(tokens, routing).view_as(x), routing


class Block(nn.Module):
    """Attention and a Mixture-of-Experts layer, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.moe_norm = make_norm(config)
        self.moe = MoELayer(config)

    def forward(
        self,
        x: Tensor,
        top_k: int | Tensor,
        routing_bias: float | Tensor,
        expert_cost: Tensor,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Return the updated stream, [B, S, D], and the routing; padding, [B * S], reaches no expert."""
        x = x + self.attention(self.attention_norm(x))
        update, routing = self.moe(self.moe_norm(x), top_k, routing_bias, expert_cost, padding)
        return x + update, routing


class MoEModel(nn.Module):
    """Mixture-of-Experts transformer.

    Weights are uninitialised until ``initialise`` or ``load_state_dict`` is called.

    Attributes:
        config: Its shape.
        compute_dtype: Type of the activations and of matrix products.
        expert_cost: Default cost per expert, its width over the widest.  # [E]
    """

    expert_cost: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        if config.stem:
            self.embed: nn.Module = Stem(config)
        elif config.task == "vision":
            self.embed = Linear(config.patch_size**2, config.d_model)
        else:
            self.embed = nn.Embedding(config.n_classes, config.d_model)
        self.position = nn.Parameter(torch.empty(config.tokens_per_sample, config.d_model))  # [S, D]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = Linear(config.d_model, config.n_classes)
        self.rotation_head = Linear(config.d_model, 4) if config.rotation_head else None
        self.register_buffer("expert_cost", width_cost(config), persistent=False)

    def forward(
        self,
        inputs: Tensor,
        top_k: int | Sequence[int] | Tensor | None = None,
        routing_bias: float | Tensor = 0.0,
        expert_cost: Tensor | None = None,
        *,
        n_samples: Tensor | None = None,
    ) -> ModelOutput:
        """Answer a batch.

        Args:
            inputs: Images, uint8, [B, 28, 28]; or bytes, any integer type, [B, S] with S up to
                ``context_length``.
            top_k: Experts per token, for all layers or one per layer; None means the config's. A 0-dim
                tensor, for all layers and up to the largest choice, stays on the device (see `graph`).
            routing_bias: Strength of the pull to cheap experts, 0..1; a float or a 0-dim tensor.
            expert_cost: Cost per expert in [0, 1]; None means ``self.expert_cost``.  # [E]
            n_samples: Samples that are asked for, as a 0-dim tensor that only the device reads; those behind
                fill the batch up. They reach no expert and are counted nowhere, and their answers mean
                nothing. For eval mode, in which no norm looks across samples. None means all.

        Raises:
            ValueError: ``top_k`` is out of range or not one per layer, the bias or cost is refused by
                `route`, or a sequence is too long.
        """
        config = self.config
        top_k = config.top_k if top_k is None else top_k
        same = isinstance(top_k, int | Tensor)
        top_k_of_layer = [top_k] * config.n_layers if same else list(top_k)
        if len(top_k_of_layer) != config.n_layers:
            raise ValueError(f"top_k needs one value per layer ({config.n_layers}), got {top_k_of_layer}")
        expert_cost = self.expert_cost if expert_cost is None else expert_cost
        x = self.embed_inputs(inputs)  # [B, S, D]
        padding = None
        if n_samples is not None:
            n_tokens = x.shape[:2].numel()
            padding = torch.arange(n_tokens, device=x.device) >= n_samples * x.shape[1]  # [B * S]
        decisions = []
        for block, layer_top_k in zip(self.blocks, top_k_of_layer, strict=True):
            x, routing = block(x, layer_top_k, routing_bias, expert_cost, padding)
            decisions.append(routing)
        x = self.norm(x)
        if config.task == "vision":
            x = x.mean(dim=1)  # [B, D]
        turns = None if self.rotation_head is None else self.rotation_head(x).float()  # [B, 4]
        return ModelOutput(logits=self.head(x).float(), routing=tuple(decisions), rotation_logits=turns)

    def embed_inputs(self, inputs: Tensor) -> Tensor:
        """Turn images or bytes into tokens, [B, S, D], of ``compute_dtype``."""
        config = self.config
        if config.stem:
            x = self.embed(self._pixels(inputs))  # [B, S, D]
        elif config.task == "vision":
            patches = self._pixels(inputs)
            side = IMAGE_SIZE // config.patch_size
            patches = patches.view(-1, side, config.patch_size, side, config.patch_size)
            x = self.embed(patches.transpose(2, 3).flatten(3).flatten(1, 2))  # [B, S, D]
        else:
            if inputs.shape[1] > config.context_length:
                raise ValueError(f"context_length is {config.context_length} bytes, got {inputs.shape[1]}")
            x = self.embed(inputs.int()).to(self.compute_dtype)  # [B, S, D]
        return x + self.position[: x.shape[1]].to(x.dtype)

    def first_features(self, inputs: Tensor) -> Tensor:
        """Return what the first norm takes in, float32, [B, P, W]: no state of the norms changes it.

        P is tokens, or pixels behind the first convolution of a stem; W is their channels.
        """
        if isinstance(self.embed, Stem):
            return self.embed.first_features(self._pixels(inputs)).float()
        return self.embed_inputs(inputs).float()

    def _pixels(self, images: Tensor) -> Tensor:
        return images.to(self.compute_dtype).div(127.5).sub(1)  # [B, 28, 28] in [-1, 1]

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Hold matrices and compute in ``dtype``, leaving router and norms in float32; returns self."""
        self.compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear | Convolution | nn.Embedding | ExpertSlice | ConstantExpert):
                module.to(dtype)
        self.position.data = self.position.data.to(dtype)
        return self

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def n_active_params(self, top_k: int) -> float:
        """Return the mean number of parameters that act on a token when experts are chosen evenly."""
        config = self.config
        expert_params = sum(
            p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters()
        )
        return self.n_params - expert_params * (1 - top_k / config.n_experts)

    def flops_per_token(self, top_k: int) -> float:
        """Return the mean forward FLOPs of a token, two per multiply-add of its matrix products.

        Experts count as chosen evenly; norms, softmax and activations are left out, masked attention is not.
        """
        config = self.config
        inner = config.n_heads * config.head_dim
        attention = config.d_model * (2 * inner + 2 * config.n_kv_heads * config.head_dim)
        attention += 2 * config.tokens_per_sample * inner
        mean_width = sum(config.expert_widths) / config.n_experts
        experts = config.d_model * (config.n_experts + 3 * top_k * mean_width)
        ends = config.d_model * (config.n_classes + 4 * config.rotation_head)
        if config.task == "vision":
            first = config.tokens_per_sample * config.d_model * config.patch_size**2
            products = self.embed.products if isinstance(self.embed, Stem) else first
            ends = (ends + products) / config.tokens_per_sample
        return 2 * (config.n_layers * (attention + experts) + ends)


def width_cost(config: ModelConfig) -> Tensor:
    """Return each expert's width over the widest, its cost where nobody measured one, float32, [E]."""
    widths = torch.tensor(config.expert_widths, dtype=torch.float32)
    return widths / widths.max()


def initialise(model: MoEModel, generator: torch.Generator) -> MoEModel:
    """Draw every weight from ``generator`` (on the model's device) and return the model.

    Matrices are normal with variance 1 / fan-in; those that write to the residual stream are divided by
    sqrt(2 L) to keep its variance independent of depth (GPT-2). The router starts small, so that all experts
    are tried; the head too, so that the first answers are uniform.
    """
    config = model.config
    into_stream = 1 / math.sqrt(2 * config.n_layers)
    mean_width = sum(config.expert_widths) / config.n_experts

    def normal(parameter: Tensor, std: float) -> None:
        nn.init.normal_(parameter, std=std, generator=generator)

    for module in model.modules():
        if isinstance(module, BatchNorm | GroupNorm | LayerNorm | RmsNorm):
            module.reset_parameters()
        elif isinstance(module, Convolution):
            normal(module.weight, math.sqrt(2 / module.weight[0].numel()))  # He et al., arXiv 1502.01852
        elif isinstance(module, Attention):
            normal(module.qkv.weight, config.d_model**-0.5)
            normal(module.out.weight, (config.n_heads * config.head_dim) ** -0.5 * into_stream)
        elif isinstance(module, Router):
            normal(module.weight, 0.1 * config.d_model**-0.5)
        elif isinstance(module, ConstantExpert):
            normal(module.vector, into_stream)
            normal(module.shares, config.d_model**-0.5)
        elif isinstance(module, ExpertSlice):
            normal(module.gate_up, config.d_model**-0.5)
            normal(module.down, mean_width**-0.5 * into_stream)
    if isinstance(model.embed, Stem):
        normal(model.embed.project.weight, model.embed.project.weight.shape[1] ** -0.5)
    elif isinstance(model.embed, nn.Embedding):
        normal(model.embed.weight, 1.0)
    else:
        normal(model.embed.weight, config.patch_size**-1.0)  # pyright: ignore[reportArgumentType]
    normal(model.position, 0.1)
    normal(model.head.weight, 0.1 * config.d_model**-0.5)
    if model.rotation_head is not None:  # last: the other weights are those of the model without
        normal(model.rotation_head.weight, 0.1 * config.d_model**-0.5)
    return model
