"""Tiny random models of every family, two layers of eight experts, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.hf.steering import import_transformers

E, D, VOCAB = 8, 32, 260
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": E, "n_shared_experts": 1,
    "first_k_dense_replace": 0, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 4, "topk_group": 3,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 16, "num_experts": E, "norm_topk_prob": False},
    "mixtral": {"intermediate_size": 16, "num_local_experts": E},
    "qwen3_moe": {
        "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": E, "norm_topk_prob": True,
        "head_dim": 16,
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {**_DEEPSEEK, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "gpt_oss": {
        "intermediate_size": 16, "num_local_experts": E, "head_dim": 16, "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


def build(family: str, top_k: int = 4, **changes: Any) -> Any:
    """A model whose weights are the same for every `top_k`."""
    transformers = import_transformers()
    shape = {**_COMMON, **SHAPES[family], "num_experts_per_tok": top_k, **changes}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():  # a load correction is learned: at the start it is 0
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, E).roll(len(name)))
    return model.eval().requires_grad_(False)


def gates_of(model: Any) -> list[Any]:
    return [m for name, m in model.named_modules() if name.endswith((".mlp.gate", ".mlp.router"))]


def tokens(n: int = 3, length: int = 12) -> Tensor:
    return torch.randint(1, VOCAB, (n, length), generator=torch.Generator().manual_seed(1))


COST = torch.linspace(0.1, 1.0, E).roll(3)
every_family = pytest.mark.parametrize("family", SHAPES)


def logits_of(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


def gate_input(seed: int, n: int = 64) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def router_logits(gate: Any, x: Tensor) -> Tensor:
    return F.linear(x, gate.weight, getattr(gate, "bias", None))


def save_checkpoint(path: Path, family: str = "olmoe", begins: bool = True, **changes: Any) -> Path:
    """A checkpoint whose tokens are bytes: "<s>" is 0, byte b is 1 + its place in the byte-level alphabet.

    Args:
        path: its folder.
        family: of the model.
        begins: whether the tokenizer begins a text with "<s>".
        changes: of the model's config.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0} | {letter: 1 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])  # pyright: ignore
    fast = import_transformers().PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # its answers do not depend on which tests ran before
        build(family, **changes).save_pretrained(path)
    return path
