"""SwiGLU experts of unequal width, computed by grouped matrix products.

A SwiGLU network is a sum over its hidden units, so a wide expert is exactly a narrow one plus further
units. Units are stored in *slices*: slice 0 holds the first units of every expert, slice 1 the next ones of
those that have more, and so on. Within a slice all experts are equally wide, as one grouped product needs,
and with the widest expert first they own a prefix of the sorted rows, behind which the product stops. So
any mix of widths costs just its own arithmetic, and the host never learns how many rows went where.

Shapes: D model, F hidden units of a slice, E experts of a slice, R rows.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from moe.model.config import ZeroComputation
from moe.model.dispatch import Dispatch, combine_rows, gather_rows, rows_of_experts
from moe.model.kernels import swiglu, swiglu_backward
from moe.model.router import Routing


class ExpertSlice(nn.Module):
    """Equally many hidden units of the first ``n_experts`` experts."""

    def __init__(self, d_model: int, n_experts: int, n_units: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.gate_up = nn.Parameter(torch.empty(n_experts, d_model, 2 * n_units))  # [E, D, 2F]
        self.down = nn.Parameter(torch.empty(n_experts, n_units, d_model))  # [E, F, D]

    def forward(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Return this slice's part of the outputs, [R + 1, D], uninitialised in other experts' rows."""
        ends = dispatch.expert_ends[: self.n_experts]
        rows = rows_of_experts(rows, dispatch, self.n_experts)
        gate_up = F.grouped_mm(rows, self.gate_up.to(rows.dtype), offs=ends)  # [R + 1, 2F]
        hidden = _SwiGlu.apply(gate_up, ends[-1])  # [R + 1, F]
        return F.grouped_mm(hidden, self.down.to(rows.dtype), offs=ends)  # pyright: ignore[reportArgumentType]


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, end)
        return swiglu(gate_up, end)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        gate_up, end = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return swiglu_backward(grads[0], gate_up, end), None


class Experts(nn.Module):
    """All experts of a layer.

    Args:
        d_model: Width D of the tokens.
        expert_widths: Hidden width of each expert, widest first.
        zero_computation: What each expert of width 0 answers, as in ``ModelConfig``.
    """

    def __init__(
        self,
        d_model: int,
        expert_widths: tuple[int, ...],
        zero_computation: tuple[ZeroComputation, ...] = (),
    ) -> None:
        super().__init__()
        self.n_experts = len(expert_widths)
        levels = [0, *sorted(set(expert_widths) - {0})]
        self.slices = nn.ModuleList(
            ExpertSlice(d_model, sum(width >= high for width in expert_widths), high - low)
            for low, high in itertools.pairwise(levels)
        )
        self.free = FreeExperts(d_model, self.n_experts - len(zero_computation), zero_computation)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the mixed outputs of the chosen experts (SwiGLU: arXiv 2002.05202, eq. 6), [T, D]."""
        dispatch = routing.dispatch
        slices = cast(list[ExpertSlice], list(self.slices))
        rows = gather_rows(x, dispatch, slices[0].n_experts)  # [R + 1, D]
        parts = [expert_slice(rows, dispatch) for expert_slice in slices]  # [R + 1, D]
        prefixes = [expert_slice.n_experts for expert_slice in slices]
        mixed = combine_rows(parts, prefixes, routing.weights, dispatch)
        return self.free(mixed, x, routing)


class FreeExperts(nn.Module):
    """The experts of width 0. They need no rows: their part is a factor per token.

    Args:
        d_model: Width D of the tokens.
        first: Number of the first of them.
        kinds: What each answers, as in ``ModelConfig.zero_computation``.
    """

    def __init__(self, d_model: int, first: int, kinds: tuple[ZeroComputation, ...]) -> None:
        super().__init__()
        kind_of_expert = dict(enumerate(kinds, start=first))
        self.copies = [e for e, kind in kind_of_expert.items() if kind == "copy"]
        self.constants = nn.ModuleDict(
            {str(e): ConstantExpert(d_model) for e, kind in kind_of_expert.items() if kind == "constant"}
        )

    def forward(self, mixed: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """Add the parts of copy and constant experts to what the others mixed, [T, D]; zero adds nothing."""
        if not self.copies and not self.constants:
            return mixed
        share_of_x = _weight_of(routing, self.copies)  # [T, 1]
        for expert, module in self.constants.items():
            constant = cast(ConstantExpert, module)
            of_input, of_vector = constant.shares_of(x)
            weight = _weight_of(routing, [int(expert)])  # [T, 1]
            share_of_x = share_of_x + weight * of_input
            mixed = torch.addcmul(mixed, (weight * of_vector).to(x.dtype), constant.vector.to(x.dtype))
        return torch.addcmul(mixed, share_of_x.to(x.dtype), x)


class ConstantExpert(nn.Module):
    """A mix of its input and a learned vector, by learned shares (MoE++, arXiv 2410.07348, eq. 5)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(d_model))  # [D]
        self.shares = nn.Parameter(torch.empty(2, d_model))  # [2, D]

    def shares_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the input and of the vector, which sum to 1, float32, [T, 1] each."""
        of_input, of_vector = F.linear(x, self.shares.to(x.dtype)).float().softmax(dim=-1).split(1, dim=-1)
        return of_input, of_vector


def _weight_of(routing: Routing, experts: list[int]) -> Tensor:
    """Weight of some experts together in each token's mix, [T, 1]."""
    chosen = sum(
        (routing.experts == expert for expert in experts), torch.zeros_like(routing.experts)
    )  # [T, K]
    return (routing.weights * chosen).sum(dim=-1, keepdim=True)
