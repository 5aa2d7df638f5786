"""Experts on several devices: one process per device, tokens sent to their experts and back.

Each rank of a ``torch.distributed`` group holds the weights of its own experts (`moe.placement`) and all
weights that are no expert's. A layer sorts the (token, choice) rows of its rank by device, exchanges them
by all-to-all (gloo on a CPU, NCCL on CUDA), computes what arrives by the grouped form of `experts`, and
mixes what comes back on the rank that owns the token, in the order of its choices (expert parallelism:
GShard, arXiv 2006.16668, section 3.2). Experts of width 0 and null choices need no rows and send none.

Two ways to use a distributed model:

* every rank calls it with its own tokens, forward and, if at all, backward the same number of times;
* rank 0 calls it inside ``with leading(model)`` while the others are in ``follow(model)``.

How many rows go where must be known on the host to exchange them: each layer waits for its device once. One
device (`moe.model.experts.Experts`) never does.

Shapes: T tokens, D model, E experts, K experts per token, R = T * K rows and one spare row behind them,
N ranks, P experts of width above 0, in order of their rank.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from moe.errors import ThermoeError
from moe.model.dispatch import combine_rows, gather_rows, make_dispatch
from moe.model.experts import Experts, ExpertSlice
from moe.model.router import Routing
from moe.model.transformer import Block, ModelOutput, MoEModel
from moe.placement import Placement, PlacementError

STOP = -1
"""Sent by a leader in place of a layer's number."""


class OutOfStepError(ThermoeError):
    """Ranks are not in the same layer, or a follower cannot take part in what the leader asks."""


@dataclass
class _Link:
    """What the layers of a model share.

    Attributes:
        group: Ranks of the model, None for the default group.
        leading: The other ranks follow this one.
        exchanging: From the announcement of a layer to its outputs: nobody listens for another one.
    """

    group: dist.ProcessGroup | None
    leading: bool = False
    exchanging: bool = False


@dataclass(frozen=True)
class _Plan:
    """One exchange as this rank sees it.

    Attributes:
        layer: Layer that rank 0 is in, or ``STOP``.
        sent: Rows to each rank.  # [N]
        received: Rows from each rank.  # [N]
        local_experts: Expert of each row received, counted on this rank; 0 for the spare row.  # [rows + 1]
    """

    layer: int
    sent: list[int]
    received: list[int]
    local_experts: Tensor


class DistributedExperts(nn.Module):
    """This rank's experts of a layer, in place of all of them (`MoELayer.experts`).

    Args:
        experts: All experts of the layer; those of other ranks are not kept.
        placement: Rank of each expert.
        layer: Number of the layer.
        link: Shared by the layers of a model.
    """

    position_of_expert: Tensor
    message_index: Tensor
    layer_number: Tensor

    def __init__(self, experts: Experts, placement: Placement, layer: int, link: _Link) -> None:
        super().__init__()
        rank = dist.get_rank(link.group)
        slices = [cast(ExpertSlice, part) for part in experts.slices]
        device = slices[0].gate_up.device
        n_wide = slices[0].n_experts  # the widest come first, those of width 0 are in no slice
        held = [[e for e in placement.experts_on(r) if e < n_wide] for r in range(placement.n_devices)]
        self.n_experts, self.n_wide = experts.n_experts, n_wide
        self.n_of_rank = [len(own) for own in held]
        self.layer, self.link = layer, link
        self.local = _local_experts(experts, held[rank]) if held[rank] else None
        self.free = experts.free
        # Follows requires_grad_() as weights do, also where a rank has none: else it would miss the backward.
        self.anchor = nn.Parameter(torch.empty(0, device=device), slices[0].gate_up.requires_grad)
        # Place of each expert among the wide ones by rank; the others, and a null choice (id E), come last.
        position = torch.full((self.n_experts + 1,), n_wide)
        position[[e for own in held for e in own]] = torch.arange(n_wide)
        self.register_buffer("position_of_expert", position.to(device), persistent=False)  # [E + 1]
        # A message to a rank: the layer's number, then the rows for each of its experts.
        places = torch.arange(1, n_wide + 1).split(self.n_of_rank)
        message = torch.cat([torch.cat([torch.zeros(1, dtype=torch.int64), own]) for own in places])
        self.register_buffer("message_index", message.to(device), persistent=False)  # [N + P]
        self.register_buffer("layer_number", torch.tensor([layer], device=device), persistent=False)  # [1]

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the mixed outputs of the chosen experts for this rank's tokens, [T, D]; T may be 0.

        Waits for the device once, to learn the number of rows to exchange.

        Raises:
            OutOfStepError: Ranks are in different layers, or a leader asks for gradients.
        """
        n_tokens, top_k = routing.experts.shape
        position, weights = self.position_of_expert[routing.experts], routing.weights  # [T, K]
        if n_tokens == 0:  # one token that goes nowhere, so that no shape is empty
            x, weights = F.pad(x, (0, 0, 0, 1)), F.pad(weights, (0, 0, 0, 1))
            position = torch.full((1, top_k), self.n_wide, device=x.device)
        dispatch = make_dispatch(position, self.n_wide + 1)
        rows = gather_rows(x, dispatch, self.n_wide)  # [R + 1, D]
        learns = torch.is_grad_enabled() and (rows.requires_grad or self.anchor.requires_grad)
        if self.link.leading and learns:
            raise OutOfStepError(
                "a leader's followers take no part in a backward pass; call the model under torch.no_grad(), "
                "or call it on every rank"
            )
        plan = self.agree(dispatch.tokens_per_expert[: self.n_wide])
        if plan.layer != self.layer:
            raise OutOfStepError(
                f"this rank is in layer {self.layer}, rank 0 in layer {plan.layer}; call the model equally "
                "often on every rank, or call follow() on all but rank 0"
            )
        outputs = self.compute(rows, plan)  # [R + 1, D]
        mixed = combine_rows([outputs], [self.n_wide], weights, dispatch)[:n_tokens]
        return self.free(mixed, x[:n_tokens], routing)

    def agree(self, counts: Tensor | None, stop: bool = False) -> _Plan:
        """Tell every rank how many rows it will get, and learn how many come here. Waits for the device.

        Args:
            counts: Rows for each expert of width above 0, by position; None means none.  # [P]
            stop: Tell the followers to stop.
        """
        n_local, n_ranks = self.n_of_rank[dist.get_rank(self.link.group)], len(self.n_of_rank)
        counts = self.message_index.new_zeros(self.n_wide) if counts is None else counts
        number = torch.full_like(self.layer_number, STOP) if stop else self.layer_number
        message = torch.cat([number, counts.to(number.dtype)])[self.message_index]  # [N + P]
        answer = message.new_empty(n_ranks * (1 + n_local))
        to_rank, from_rank = [1 + n for n in self.n_of_rank], [1 + n_local] * n_ranks
        self.link.exchanging = True
        dist.all_to_all_single(answer, message, from_rank, to_rank, group=self.link.group)
        host = torch.cat([message, answer]).tolist()  # the one wait
        sent = _sums(host[: len(message)], to_rank)
        received = _sums(host[len(message) :], from_rank)
        arriving = answer.view(n_ranks, 1 + n_local)[:, 1:].flatten()
        local = torch.arange(n_local, device=message.device).repeat(n_ranks)
        local = local.repeat_interleave(arriving, output_size=sum(received))
        return _Plan(host[len(message)], sent, received, F.pad(local, (0, 1)))

    def compute(self, rows: Tensor, plan: _Plan) -> Tensor:
        """Have each rank's experts compute the rows for it, and return their outputs in the same places.

        Args:
            rows: Rows by position, those that are exchanged first.  # [R + 1, D]
            plan: What `agree` returned on every rank.

        Returns:
            Outputs; 0 in rows that were not exchanged.  # [R + 1, D]
        """
        # The spare row is 0 and computed by the first expert: no shape is empty, and it adds to no gradient.
        arrived = self._exchange(rows, plan.sent, plan.received, sum(plan.received) + 1)
        if self.local is not None:
            weights, logits = (
                rows.new_ones(len(arrived), 1),
                rows.new_empty(len(arrived), self.local.n_experts),
            )
            arrived = self.local(arrived, Routing(logits, weights.float(), plan.local_experts[:, None]))
        outputs = self._exchange(arrived, plan.received, plan.sent, len(rows))
        self.link.exchanging = False
        return outputs

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int], n_out: int) -> Tensor:
        return _Exchange.apply(rows, self.anchor, self.link.group, sent, received, n_out)  # pyright: ignore[reportReturnType]


def distribute(model: MoEModel, placement: Placement, group: dist.ProcessGroup | None = None) -> MoEModel:
    """Keep only this rank's experts in a model, in place, and return it.

    Every rank calls it with the same weights and placement, and from then on runs the model with its own
    inputs, possibly none, equally often. Outputs and the gradients of inputs and experts are those of one
    device with all tokens; the gradients of other weights are those of this rank's tokens, to be summed over
    ranks. Norms over the batch see only this rank's samples when they train.

    Raises:
        PlacementError: The placement is of another number of experts, or has not one device per rank.
    """
    placement.check(model.config.n_experts)
    n_ranks = dist.get_world_size(group)
    if placement.n_devices != n_ranks:
        raise PlacementError(
            f"the placement has {placement.n_devices} devices, the group {n_ranks} ranks; "
            f"start {placement.n_devices} processes or place the experts on {n_ranks}"
        )
    link = _Link(group)
    for number, block in enumerate(model.blocks):
        layer = cast(Block, block).moe
        experts = DistributedExperts(layer.experts, placement, number, link)
        layer.experts = experts  # pyright: ignore[reportAttributeAccessIssue]
    return model


@contextlib.contextmanager
def leading(model: MoEModel) -> Iterator[MoEModel]:
    """Use a distributed model on rank 0 alone, while the other ranks are in `follow`.

    They are told to stop however the block ends, so an error here leaves none of them waiting. Only where
    rows were under way can they not be told: they then end with the group, by its timeout at the latest.

    Raises:
        ValueError: This is not rank 0.
    """
    first = _layers(model)[0]
    link = first.link
    if (rank := dist.get_rank(link.group)) != 0:
        raise ValueError(f"rank 0 leads, this is rank {rank}; call follow() here")
    link.leading = True
    try:
        yield model
    finally:
        link.leading = False
        if not link.exchanging:
            first.agree(None, stop=True)
            link.exchanging = False


@torch.no_grad()
def follow(model: MoEModel) -> int:
    """Compute this rank's experts for the leader until it stops, and return the number of layers computed.

    It waits for the leader inside a collective, at most as long as the group's timeout.

    Raises:
        ValueError: This is rank 0.
    """
    layers = _layers(model)
    if dist.get_rank(layers[0].link.group) == 0:
        raise ValueError("rank 0 leads and cannot follow; use `with leading(model)` here")
    nothing = layers[0].anchor.new_zeros((1, model.config.d_model), dtype=model.compute_dtype)  # spare row
    computed = 0
    while (plan := layers[0].agree(None)).layer != STOP:
        layers[plan.layer].compute(nothing, plan)
        computed += 1
    return computed


def tokens_per_device(output: ModelOutput, placement: Placement) -> Tensor:
    """Return the tokens that this rank sent to the experts of each device in each layer, int64, [L, N].

    Sum over ranks for the tokens of all. A token counts once for each of its experts.
    """
    counts = output.tokens_per_expert  # [L, E]
    device = torch.tensor(placement.device_of_expert, device=counts.device)
    return counts.new_zeros(len(counts), placement.n_devices).index_add_(1, device, counts)


def _layers(model: MoEModel) -> list[DistributedExperts]:
    layers = [cast(Any, block).moe.experts for block in model.blocks]
    if not all(isinstance(layer, DistributedExperts) for layer in layers):
        raise TypeError("this model holds all its experts; call distribute() on every rank first")
    return layers


def _sums(messages: list[int], lengths: list[int]) -> list[int]:
    """Sum the rows that each message announces, behind the layer's number."""
    ends = list(itertools.accumulate(lengths))
    return [sum(messages[end - length + 1 : end]) for end, length in zip(ends, lengths, strict=True)]


def _local_experts(experts: Experts, held: list[int]) -> Experts:
    """Copy some experts, ascending and of width above 0, out of the slices of all."""
    parts = [cast(ExpertSlice, part) for part in experts.slices]
    widths = tuple(sum(part.down.shape[1] for part in parts if e < part.n_experts) for e in held)
    with torch.device("meta"):
        local = Experts(parts[0].gate_up.shape[1], widths)
    # Cut where those of all are cut, so that sums run as on one device.
    local.slices = nn.ModuleList(_local_slice(part, held) for part in parts if held[0] < part.n_experts)
    return local


def _local_slice(part: ExpertSlice, held: list[int]) -> ExpertSlice:
    own = [expert for expert in held if expert < part.n_experts]  # a prefix: the widest come first here too
    with torch.device("meta"):
        local = ExpertSlice(part.gate_up.shape[1], len(own), part.down.shape[1])
    local.gate_up = nn.Parameter(part.gate_up.detach()[own], part.gate_up.requires_grad)
    local.down = nn.Parameter(part.down.detach()[own], part.down.requires_grad)
    return local


class _Exchange(Function):
    """Rows to their ranks; backward, their gradients to where the rows came from."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        anchor: Tensor,
        group: dist.ProcessGroup | None,
        sent: list[int],
        received: list[int],
        n_out: int,
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received, ctx.n_in = group, sent, received, len(rows)  # pyright: ignore[reportAttributeAccessIssue]
        return _all_to_all(rows, group, sent, received, n_out)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        saved = cast(Any, ctx)
        grad = _all_to_all(grads[0], saved.group, saved.received, saved.sent, saved.n_in)
        return grad, None, None, None, None, None


def _all_to_all(
    rows: Tensor, group: dist.ProcessGroup | None, sent: list[int], received: list[int], n_out: int
) -> Tensor:
    """Exchange the first ``sum(sent)`` rows; of the ``n_out`` returned, those that did not arrive are 0."""
    n_sent, n_received = sum(sent), sum(received)
    result = rows.new_empty(n_out, rows.shape[1])
    result[n_received:] = 0
    dist.all_to_all_single(result[:n_received], rows[:n_sent].contiguous(), received, sent, group=group)
    return result
