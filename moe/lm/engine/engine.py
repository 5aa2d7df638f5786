"""Teacher-forced decode of held-out text: one step of all running sequences, on CUDA as one graph.

The graph holds its own text: it reads each sequence's token at the sequence's position, scores the next one
and moves on, so that a replay needs nothing from the host. A sequence that reaches the end of its window
starts again behind its prompt, where it writes the same keys and values as before under the same knobs: the
load is stationary, on real text and real routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.engine import ops as ops
from moe.lm.model import LanguageModel

WARM_UPS = 3
_TOGETHER = 32
"""Windows prefilled at once."""
Skip = Literal["", "experts", "moe"]


class DecodeEngine:
    """All sequences that run together.

    Attributes:
        tokens: Their text, int32.  # [B, S + 1]
        first: Length of the prompt.
        last: S; positions `first` to S - 1 are decoded.
        top_k: Experts per token, 0-dim int32.
        budget: Experts that a layer may read in a step, 0-dim int32.
        pos: Position of each sequence, int32.  # [B]
        right: Right tokens since `clear`, int32.  # [B]
        nll: Loss since `clear` in nats, float32.  # [B]
        used: Experts read, summed over layers and steps since `clear`, 0-dim int64.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, first: int, skip: Skip = "") -> None:
        """Prefill the windows and stand ready, staggered so that the mean context is the same in every step.

        Args:
            model: In serving types, with experts.
            tokens: Held-out text, int32.  # [B, S + 1]
            first: Length of the prompt.
            skip: To time a share: "experts" leaves out the expert products, "moe" the routing as well.
        """
        c = model.config
        self.model, self.tokens = model, tokens.contiguous()
        self.first, self.last = first, tokens.shape[1] - 1
        self.skip: Skip = skip
        self.slots = c.top_k
        device, b = tokens.device, len(tokens)
        self.cache = torch.empty(
            c.n_layers, 2, b, c.n_kv_heads, self.last, c.head_dim, dtype=model.dtype, device=device
        )  # [L, 2, B, G, S, Dh]
        self.top_k = torch.tensor(c.top_k, dtype=torch.int32, device=device)
        self.budget = torch.tensor(c.n_experts, dtype=torch.int32, device=device)
        spread = torch.arange(b) * (self.last - first) // b
        self.start = (first + spread).to(torch.int32).to(device)
        self.pos = self.start.clone()
        self.right = torch.zeros(b, dtype=torch.int32, device=device)
        self.nll = torch.zeros(b, device=device)
        self.used = torch.zeros((), dtype=torch.int64, device=device)
        self.demand = torch.zeros(c.n_experts, device=device)
        self.counts = torch.zeros(c.n_experts, dtype=torch.int32, device=device)
        self.table = torch.zeros(c.n_experts, b, dtype=torch.int32, device=device)
        self.blank = torch.zeros(b * c.top_k if skip else 0, c.d_model, dtype=model.dtype, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prefill()

    @torch.no_grad()
    def prefill(self) -> None:
        """Fill the cache with the whole windows, served as in training."""
        for start in range(0, len(self.tokens), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            cache = [(layer[0, some], layer[1, some]) for layer in self.cache]
            self.model(self.tokens[some, :-1].long(), cache=cache)

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence."""
        model, c = self.model, self.model.config
        blocks = model.layers()
        gains = [block.attention_norm.weight for block in blocks[1:]] + [model.norm.weight]
        x, h = ops.embed_norm(self.tokens, self.pos, model.embed, blocks[0].attention_norm.weight)
        for block, (k_cache, v_cache), gain in zip(blocks, self.cache, gains, strict=True):
            qkv = block.attention.qkv(h)  # [B, (H + 2G) Dh]
            q = ops.rope_cache(qkv, self.pos, model.turn, k_cache, v_cache, c.n_heads)  # [B, H, Dh]
            mixed = ops.attend(q, k_cache, v_cache, self.pos)  # [B, H Dh]
            h, h32 = ops.add_norm(x, block.attention.out(mixed), block.moe_norm.weight)
            out = self.blank
            if self.skip != "moe":
                weights = self._route(h32, block.moe.router)
                if not self.skip:
                    moe = block.moe
                    out = ops.experts(h, moe.gate_up, moe.down, self.counts, self.table, weights)  # [B K, D]
            h = ops.mix_norm(x, out, self.top_k, gain, self.counts, self.demand, self.used, self.slots)
        ops.score(model.logits(h), self.tokens, self.pos, self.right, self.nll, self.first, self.last)

    def _route(self, h: Tensor, router: Tensor | None) -> Tensor:
        """Choose experts for the normed stream, float32, [B, D]; weights [B, K], choices in `table`."""
        if router is None:
            raise ValueError("a dense model has no experts to decode with")
        gate = self.model.config.gate
        logits = F.linear(h, router)  # [B, E]
        ops.demand_of(logits, self.top_k, self.demand, self.slots, gate)
        return ops.select(
            logits, self.demand, self.top_k, self.budget, self.counts, self.table, self.slots, gate
        )

    def capture(self) -> DecodeEngine:
        """Record the step as a CUDA graph; on a CPU nothing changes."""
        if self.tokens.is_cuda:
            self.graph = captured(self.step, WARM_UPS)
            self.clear()
        return self

    def replay(self) -> None:
        """Do one step, captured or not."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def set(self, top_k: int, budget: int) -> None:
        """Turn the knobs; the next step sees them.

        Raises:
            ValueError: not 1 <= top_k <= K, or not top_k <= budget <= E.
        """
        if not 1 <= top_k <= self.slots:
            raise ValueError(f"top_k must be 1 to {self.slots}, the training's, got {top_k}")
        if not top_k <= budget <= self.model.config.n_experts:
            raise ValueError(f"budget must be {top_k} to {self.model.config.n_experts} experts, got {budget}")
        self.top_k.fill_(top_k)
        self.budget.fill_(budget)

    def clear(self) -> None:
        """Forget the scores and go back to the starting positions."""
        self.pos.copy_(self.start)
        for total in (self.right, self.nll, self.used, self.counts, self.demand):
            total.zero_()


def captured(run: Callable[[], None], warm_ups: int) -> torch.cuda.CUDAGraph:
    """Record `run()` as a CUDA graph, after some calls on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
