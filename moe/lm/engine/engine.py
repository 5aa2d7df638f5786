"""Steps of running sequences: token rows through the model, on CUDA as one captured graph per number of rows.

A decode row is the last token of an answer so far; a prompt goes in as rows too, a chunk at a time, beside
the rows of the others. The text is given (teacher forcing): the work is that of sampling, and each token can
be scored. Everything that changes from step to step is copied to the device in one piece, and what a step
found comes back in one; in between the host waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.adapt import HeadAdapter, HeadSettings
from moe.lm.config import AHEAD, BLOCK, ROW_BUCKETS
from moe.lm.engine import ops
from moe.lm.engine.blocks import Blocks, blocks_for
from moe.lm.engine.parallel import PENALTY, RESERVE, STEP, STOP, USAGE, ExpertGroup
from moe.lm.engine.rows import Rows, StepInput
from moe.lm.engine.step import Step, Work
from moe.lm.model import LanguageModel

_WARM_UPS = 2
T = TypeVar("T")


@dataclass(frozen=True)
class _Graph:
    """A captured step and what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    control: Tensor
    lists: Tensor
    answers: Tensor
    logits: Tensor
    stream: Tensor


class Engine:
    """A model, its cache, and the text of its requests, on one device.

    Attributes:
        model: In serving types, with experts.
        documents: Text, int32; on the device, and read by the steps launched after a change.  # [N, S + 1]
        blocks: Who has which part of the cache.
        penalty: Taken off the experts' demand before they are ranked, float32, in tokens' worth of gates; a
            number per expert, of any layer.  # [E]
        max_rows: Most rows of a step.
        adapter: What answers in place of the model's head and learns, None where nothing does.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: np.ndarray,
        *,
        slots: int = 512,
        max_rows: int = 1024,
        cache_positions: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        group: ExpertGroup | None = None,
        adapts: HeadSettings | None = None,
    ) -> None:
        """Allocate the cache; call `capture` before the first step on CUDA.

        Args:
            model: In serving types, on the device that is to serve.
            documents: Text of at most the model's context and one token, integers.  # [N, S + 1]
            slots: Most sequences that run together.
            max_rows: Most rows of a step: decode rows and the chunk of prompts beside them.
            cache_positions: Positions whose keys and values there is room for; None: enough for all slots.
            clock: Of a CPU's marks.
            group: Devices that share the experts, see `moe.lm.engine.parallel`; all build the same engine.
            adapts: How the head learns; None: it stays as it was trained.

        Raises:
            ValueError: a dense model, text of more positions or other tokens than the model has, a cache too
                small for one sequence, or several devices that are to adapt.
        """
        c = model.config
        if not c.n_experts:
            raise ValueError("a dense model has no experts to serve with: give one that has")
        if documents.shape[1] > c.context + 1 or not 0 <= documents.min() <= documents.max() < c.vocabulary:
            raise ValueError(
                f"documents of {documents.shape[1]} tokens from {documents.min()} to {documents.max()} are "
                f"not for a model of {c.vocabulary} tokens and {c.context} positions: use its own tokenizer"
            )
        if adapts is not None and group is not None:
            raise ValueError("devices that share the experts do not adapt: leave out `adapts`, or the group")
        self.adapter = None if adapts is None else HeadAdapter(model, adapts)
        self.model, self.max_rows, self._clock = model, max_rows, clock
        device = model.embed.device
        self._cuda = device.type == "cuda"
        self.documents = torch.tensor(documents, dtype=torch.int32, device=device)
        if cache_positions is None:
            cache_positions = slots * blocks_for(c.context) * BLOCK
        self.blocks = Blocks(slots, documents.shape[1] - 1, cache_positions // BLOCK)
        self._table = torch.from_numpy(self.blocks.table).to(device, copy=True)  # [slots + 1, M]
        self._cache = torch.zeros(
            c.n_layers, 2, self.blocks.n_blocks + 1, c.n_kv_heads, BLOCK, c.head_dim,
            dtype=model.dtype, device=device,
        )  # [L, 2, blocks, G, BLOCK, Dh]  # fmt: skip
        self.penalty = torch.zeros(c.n_experts, device=device)
        self._group = group
        everything = torch.ones(c.n_experts, dtype=torch.int32, device=device)
        self._held = everything if group is None else group.held(device)  # [E]
        self._message = torch.zeros(5 + 3 * max_rows + self.blocks.table.shape[1], dtype=torch.int32)
        self._demand = torch.zeros(c.n_experts, device=device)
        self._counts = torch.zeros(c.n_experts, dtype=torch.int32, device=device)
        self._usage = torch.zeros(c.n_layers, 2, c.n_experts, dtype=torch.int64, device=device)
        self._graphs: dict[int, _Graph] = {}
        self._ring: list[Step | None] = [None] * AHEAD
        self._sent = torch.zeros(AHEAD, 3 + 3 * max_rows, dtype=torch.int32, pin_memory=self._cuda)
        self._received = torch.zeros(AHEAD, 4, max_rows, pin_memory=self._cuda)
        self._launched = 0

    @torch.no_grad()
    def capture(self) -> None:
        """Record a graph per number of rows, the largest first; on a CPU there is nothing to do."""
        if not self._cuda:
            return
        pool = None
        for n in sorted({n for n in ROW_BUCKETS if n < self.max_rows} | {self.max_rows}, reverse=True):
            control = torch.zeros(3 + 3 * n, dtype=torch.int32, device=self._table.device)
            control[:3] = torch.tensor([0, 1, self.model.config.n_experts])
            control[3 : 3 + n] = len(self.blocks.table) - 1  # the spare slot
            answers = torch.zeros(4, n, device=control.device)
            lists = torch.zeros(len(self.penalty), n, dtype=torch.int32, device=control.device)
            graph, (logits, stream) = _captured(partial(self._step, control, lists, answers), pool)
            pool = graph.pool()
            self._graphs[n] = _Graph(graph, control, lists, answers, logits, stream)
        self._usage.zero_()
        if self.adapter is not None:
            self.adapter.rehearse()

    def reserve(self, positions: int) -> int:
        """Give a slot and blocks to a sequence of so many positions; returns the slot.

        Raises:
            RuntimeError: no room; ask `blocks.has_room` first.
        """
        slot = self.blocks.reserve(positions)
        row = self.blocks.table[slot].copy()
        self._announce(RESERVE, np.append(np.int32(slot), row))
        self._enter(slot, row)
        return slot

    def _enter(self, slot: int, row: np.ndarray) -> None:
        """Give a slot its blocks, in the order of the steps: earlier ones see the old."""
        self._table[slot].copy_(torch.from_numpy(row), non_blocking=True)

    def release(self, slot: int) -> None:
        """Take a slot and its blocks back; steps that were launched may still read them."""
        self.blocks.release(slot)

    def launch(self, rows: Rows, top_k: int, readable: int) -> Step:
        """Start a step; waits only for the one `AHEAD` steps before it.

        Args:
            rows: At least one, at most `max_rows`.
            top_k: Experts per token.
            readable: Experts of a layer that may be read.

        Raises:
            ValueError: too many rows, or not 1 <= top_k <= the training's, or not top_k <= readable <= E.
        """
        n, c = len(rows.slot), self.model.config
        if not 1 <= n <= self.max_rows:
            raise ValueError(f"a step has 1 to {self.max_rows} rows, got {n}")
        if not 1 <= top_k <= c.top_k:
            raise ValueError(f"top_k must be 1 to {c.top_k}, the training's, got {top_k}")
        if not top_k <= readable <= c.n_experts:
            raise ValueError(f"readable must be {top_k} to {c.n_experts} experts, got {readable}")
        place = self._next_place()
        size = n if not self._cuda else next(b for b in sorted(self._graphs) if b >= n)
        host = self._sent[place, : 3 + 3 * size].numpy()
        host[:3] = n, top_k, readable
        for part, values, spare in zip(
            host[3:].reshape(3, size), (rows.slot, rows.position, rows.document),
            (len(self.blocks.table) - 1, 0, 0), strict=True,
        ):  # fmt: skip
            part[:n], part[n:] = values, spare
        self._announce(STEP, host)
        return self._run(place, size)

    def _next_place(self) -> int:
        """The next place of the ring, free."""
        place = self._launched % AHEAD
        self._launched += 1
        before = self._ring[place]
        if before is not None:
            before.answers()
        return place

    def _run(self, place: int, size: int) -> Step:
        """Start the step that lies in a place of the ring."""
        sent = self._sent[place, : 3 + 3 * size]
        n = int(sent[0])
        received = self._received[place].view(-1)[: 4 * size].view(4, size)
        started = self.mark()
        if self._cuda:
            captured = self._graphs[size]
            captured.control.copy_(sent, non_blocking=True)
            captured.graph.replay()
            logits, stream = captured.logits, captured.stream
            received.copy_(captured.answers, non_blocking=True)
        else:
            lists = torch.zeros(len(self.penalty), n, dtype=torch.int32)
            logits, stream = self._step(sent, lists, received)
        step = Step(received[:, :n], logits[:n], stream[:n], started, self.mark())
        self._ring[place] = step
        return step

    def learn(self, steps: int) -> Work:
        """Let the adapter take steps on the lessons that are whole, behind all that was launched.

        Raises:
            NothingToLearnError: no lesson is whole.
            ValueError: the engine does not adapt.
        """
        if self.adapter is None:
            raise ValueError("this engine does not adapt: build it with `adapts`")
        started = self.mark()
        self.adapter.learn(steps)
        return Work(started, self.mark())

    def mark(self) -> Any:
        """A mark of now: an event behind all that was launched, or a CPU's clock reading."""
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset(self) -> None:
        """Wait for all steps, take all slots and blocks back, and undo all adaptation."""
        self.synchronize()
        if self.adapter is not None:
            self.adapter.reset()
        self.blocks.clear()
        self.usage()

    def set_penalty(self, penalty: np.ndarray) -> None:
        """Set `penalty`, for the steps launched from now on.  # [E]."""
        values = np.ascontiguousarray(penalty, np.float32)
        self._announce(PENALTY, values.view(np.int32))
        self.penalty.copy_(torch.from_numpy(values), non_blocking=True)

    def stop_followers(self) -> None:
        """Let the other devices of the group end; the engine launches no more steps."""
        self._announce(STOP)

    def follow(self) -> None:
        """Do what the leader of the group announces, until it stops.

        Raises:
            DevicesLostError: it is gone.
        """
        while self._follow_once():
            pass

    def _follow_once(self) -> bool:
        """Take part in what is announced next; returns whether there is more to come."""
        assert self._group is not None
        kind, payload = self._group.listen(self._message)
        if kind == STEP:
            place = self._next_place()
            self._sent[place, : len(payload)] = torch.from_numpy(payload)
            self._run(place, (len(payload) - 3) // 3)
        elif kind == RESERVE:
            self._enter(int(payload[0]), payload[1:].copy())
        elif kind == PENALTY:
            self.penalty.copy_(torch.from_numpy(payload.view(np.float32).copy()), non_blocking=True)
        elif kind == USAGE:
            self._read_usage()
        return kind != STOP

    def _announce(self, kind: int, payload: np.ndarray | None = None) -> None:
        if self._group is not None and self._group.leads:
            self._group.announce(self._message, kind, payload)

    def synchronize(self) -> None:
        """Wait until all steps are done."""
        if self._cuda:
            torch.cuda.synchronize()

    def usage(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for all steps; return what they did to experts since the last call.

        Returns:
            Tokens per expert and steps that read it, int64.  # [L, E] each
        """
        self._announce(USAGE)
        return self._read_usage()

    def _read_usage(self) -> tuple[np.ndarray, np.ndarray]:
        if self._group is not None:
            self._group.add(self._usage)
        tokens, reads = self._usage.to("cpu", copy=True).numpy().swapaxes(0, 1)
        self._usage.zero_()
        return tokens, reads

    @torch.no_grad()
    def _step(self, control: Tensor, lists: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Run rows through the model; returns logits and stream behind them.  # [T, V], [T, D]."""
        model, step = self.model, StepInput.of(control)
        c, layers = model.config, model.layers()
        gains = [layer.attention_norm.weight for layer in layers[1:]] + [model.norm.weight]
        x, h = ops.embed_norm(step, self.documents, model.embed, layers[0].attention_norm.weight)
        for layer, (keys, values), usage, gain in zip(layers, self._cache, self._usage, gains, strict=True):
            qkv = layer.attention.qkv(h)  # [T, (H + 2G) Dh]
            q = ops.rope_cache(qkv, step, self._table, model.turn, keys, values, c.n_heads)  # [T, H, Dh]
            mixed = ops.attend(q, step, self._table, keys, values)  # [T, H Dh]
            h, h32 = ops.add_norm(x, layer.attention.out(mixed), layer.moe_norm.weight)
            moe = layer.moe
            assert moe.router is not None
            logits = F.linear(h32, moe.router)  # [T, E]
            ops.demand_of(logits, step, self._demand, c.top_k)
            if self._group is not None:
                self._group.agree(self._demand)  # sums of floats in another order may rank otherwise
            weights = ops.select(
                logits, step, self._demand, self.penalty, self._held, self._counts, lists, c.top_k
            )
            shared = self._group is not None
            out = ops.experts(h, moe.gate_up, moe.down, self._counts, lists, weights, shared)  # [T K, D]
            if self._group is not None:
                out = self._add_up(out, len(x))
            h = ops.mix_norm(x, out, step, gain, self._counts, self._demand, usage, c.top_k)
        logits = model.logits(h) if self.adapter is None else self.adapter.logits(h, step.document)
        ops.score(logits, step, self.documents, answers)
        return logits, h

    def _add_up(self, out: Tensor, n_rows: int) -> Tensor:
        """Sums over experts of all devices, in the first slot of each row; the other slots are 0."""
        assert self._group is not None
        slots = out.view(n_rows, -1, out.shape[1])  # [T, K, D]
        total = slots.float().sum(dim=1)
        self._group.add(total)
        slots.zero_()
        slots[:, 0] = total.to(out.dtype)
        return out


def _captured(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record `run()` as a CUDA graph, after some calls on a stream of their own; returns what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()
    return graph, out
