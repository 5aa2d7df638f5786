"""The Hugging Face class of the engine's shape: teacher-forced decode with a static cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.hf.steering import import_transformers
from moe.lm.config import LmConfig


@dataclass(frozen=True)
class Form:
    """A way to run the class."""

    experts: Literal["eager", "grouped_mm", "batched_mm"]
    """As `set_experts_implementation` takes it: a loop over the experts; the class's default; what `generate`
    puts in its place to decode."""
    compiled: bool = False
    """By `torch.compile` as `generate` does with a static cache: mode "reduce-overhead"."""


@dataclass(frozen=True)
class HfPlan:
    """Decode steps: those before the first that counts, and rounds of steps launched back to back."""

    warm_ups: int
    rounds: int
    steps: int


def decide_routing(model: nn.Module, router: str, generator: torch.Generator) -> None:
    """Draw the routers, parameters whose name ends so, with logits of a deviation of 3 behind a norm."""
    for name, parameter in model.named_parameters():
        if name.endswith(router):
            nn.init.normal_(parameter, std=3.0 / math.sqrt(parameter.shape[1]), generator=generator)


def make_hf(config: LmConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """The class of a shape, `Qwen3MoeForCausalLM`, with random weights."""
    torch.manual_seed(seed)
    transformers = import_transformers()
    hf = transformers.Qwen3MoeConfig(
        vocab_size=config.vocabulary, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, num_experts=config.n_experts, num_experts_per_tok=config.top_k,
        norm_topk_prob=True,
        moe_intermediate_size=config.expert_width, max_position_embeddings=config.context,
        tie_word_embeddings=config.tied,
    )  # fmt: skip
    with device:
        model = transformers.AutoModelForCausalLM.from_config(hf, dtype=dtype)
    decide_routing(model, "mlp.gate.weight", torch.Generator(device).manual_seed(seed))
    return model.eval()


class HfDecoder:
    """Sequences that run together, with their keys and values."""

    def __init__(self, model: Any, tokens: Tensor, first: int) -> None:
        """Take in prompts; the cache is as long as the text, no position longer.

        Args:
            model: of `make_hf`.
            tokens: text, int64.  # [B, S]
            first: tokens of the prompts.
        """
        self._model, self._tokens, self._position = model, tokens, first
        self._cache = import_transformers().StaticCache(config=model.config, max_cache_len=tokens.shape[1])
        model.set_experts_implementation("grouped_mm")
        # By place: versions of the library call the cache by different names.
        model(tokens[:, :first], None, None, self._cache, logits_to_keep=1)

    def step(self, call: Callable[..., Any], **kwargs: Any) -> Any:
        """Run the next token of every sequence by the model or its compiled form."""
        token = self._tokens[:, self._position, None].clone()  # a view's alignment would change by the step
        self._position += 1
        return call(token, None, None, self._cache, **kwargs)


@torch.no_grad()
def measure_hf(
    config: LmConfig, tokens: Tensor, dtype: torch.dtype, seed: int, forms: Sequence[Form], plan: HfPlan
) -> Iterator[dict[str, Any]]:
    """Decode the same text by one form after another.

    Args:
        config: shape.
        tokens: text, int64; the last of its tokens is decoded last.  # [B, S]
        dtype: of weights and activations.
        seed: of the weights.
        forms: in this order.
        plan: steps.

    Yields:
        A row of each form; of one that does not compile, why.
    """
    from torch._dynamo.utils import counters  # takes seconds

    model, version = make_hf(config, tokens.device, dtype, seed), import_transformers().__version__
    for form in forms:
        row = {"class": f"{type(model).__name__} of transformers {version}",
               "form": "compiled" if form.compiled else "eager",
               "experts": form.experts, "running": len(tokens), "context": tokens.shape[1] - 1}  # fmt: skip
        if not form.compiled:
            yield row | _measure(model, model, tokens, form, plan)
            continue
        torch._dynamo.reset()
        counters.clear()
        try:
            found = _measure(model, torch.compile(model.__call__, mode="reduce-overhead"), tokens, form, plan)
        except Exception as error:  # whatever a compiler fails by is what there is to say of it
            found = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        yield row | found | {"graph_breaks": dict(counters["graph_break"]),
                             "cudagraph_skips": counters["inductor"]["cudagraph_skips"]}  # fmt: skip


def _measure(
    model: Any, call: Callable[..., Any], tokens: Tensor, form: Form, plan: HfPlan
) -> dict[str, Any]:
    """Time of a step, median and range over rounds, and the experts of a layer that the last one reads."""
    decoder = HfDecoder(model, tokens, tokens.shape[1] - 1 - plan.warm_ups - plan.rounds * plan.steps)
    model.set_experts_implementation(form.experts)
    warm_up_s = _seconds(decoder, call, plan.warm_ups, tokens.device)
    ms = [1e3 * _seconds(decoder, call, plan.steps, tokens.device) / plan.steps for _ in range(plan.rounds)]
    routers = decoder.step(model, output_router_logits=True).router_logits
    read = [len(logits.topk(model.config.num_experts_per_tok).indices.unique()) for logits in routers]
    return {
        "ms": median(ms), "range_ms": [min(ms), max(ms)], "tokens_per_s": 1e3 * len(tokens) / median(ms),
        "experts_read": sum(read) / len(read), "warm_up_s": warm_up_s,
    }  # fmt: skip


def _seconds(decoder: HfDecoder, call: Callable[..., Any], steps: int, device: torch.device) -> float:
    """Time of steps, back to back."""
    start = time.perf_counter()
    for _ in range(steps):
        decoder.step(call)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
