"""Moving tokens to experts and back, without reading anything on the host.

Every (token, chosen expert) pair becomes one row; rows are sorted by expert so that each expert owns a
contiguous block, the layout of ``torch.nn.functional.grouped_mm``. Experts are ordered widest first, so the
experts that have a given hidden slice (see ``experts``) own a prefix of the rows. What ``grouped_mm`` leaves
behind the prefix is uninitialised memory; the functions here never read it.

Shapes: T tokens, D model, E experts, K experts per token, R = T * K rows and one spare row behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from moe.kernels import mix_rows


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, expert) pair sits among the sorted rows.

    Attributes:
        token_of_row: Token that row r carries; the spare row carries token 0.  # [R + 1]
        pair_of_row: Flat (token, choice) pair of row r.  # [R]
        row_of_pair: Its inverse.  # [T, K]
        expert_ends: Row behind the last row of each expert, int32 as grouped_mm wants it.  # [E]
    """

    token_of_row: Tensor
    pair_of_row: Tensor
    row_of_pair: Tensor
    expert_ends: Tensor

    @property
    def spare_row(self) -> int:
        """Index of the spare row, which belongs to no expert."""
        return self.pair_of_row.numel()

    @property
    def tokens_per_expert(self) -> Tensor:
        """Tokens sent to each expert, without null slots, int32, [E]; no host synchronisation."""
        return self.expert_ends.diff(prepend=self.expert_ends.new_zeros(1))


def make_dispatch(experts: Tensor, n_experts: int) -> Dispatch:
    """Sort the (token, expert) pairs of a choice, [T, K], by expert; null slots (id E) come last."""
    top_k = experts.shape[1]
    kind = torch.uint8 if n_experts < 256 else torch.int16  # of bytes: one radix pass instead of eight
    keys = experts.flatten().to(kind)
    sorted_keys, pair_of_row = keys.sort(stable=True)  # [R]
    expert_ids = torch.arange(n_experts, device=experts.device, dtype=kind)
    expert_ends = torch.searchsorted(sorted_keys, expert_ids, right=True, out_int32=True)  # [E]
    row_of_pair = torch.empty_like(pair_of_row)
    row_of_pair[pair_of_row] = torch.arange(keys.numel(), device=experts.device)
    return Dispatch(
        token_of_row=F.pad(pair_of_row.div(top_k, rounding_mode="floor"), (0, 1)),
        pair_of_row=pair_of_row,
        row_of_pair=row_of_pair.view_as(experts),
        expert_ends=expert_ends,
    )


def gather_rows(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy each token, [T, D], to the rows of its experts, [R + 1, D]."""
    return _GatherRows.apply(x, dispatch)  # pyright: ignore[reportReturnType]


def rows_of_experts(rows: Tensor, dispatch: Dispatch, n_experts: int) -> Tensor:
    """Return ``rows`` as used by the first ``n_experts``: other rows' gradients are garbage and become 0."""
    return _RowsOfExperts.apply(rows, dispatch.expert_ends[n_experts - 1])  # pyright: ignore[reportReturnType]


def combine_rows(
    rows: Tensor, weights: Tensor, dispatch: Dispatch, n_experts: int, onto: Tensor | None = None
) -> Tensor:
    """Sum each token's rows by weight, over its choices among the first ``n_experts``.

    The sum runs in a fixed order per token, so unlike ``index_add`` it does not depend on scheduling.

    Args:
        rows: Expert outputs; rows of other experts may be uninitialised.  # [R + 1, D]
        weights: Combine weights.  # [T, K]
        dispatch: Where the rows come from.
        n_experts: Size of the prefix of experts that produced rows.
        onto: What the sums are added to; None means zero.  # [T, D]

    Returns:
        Mixed outputs.  # [T, D]
    """
    return _CombineRows.apply(rows, weights, onto, dispatch, dispatch.expert_ends[n_experts - 1])  # pyright: ignore[reportReturnType]


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch  # pyright: ignore[reportAttributeAccessIssue]
        return x.index_select(0, dispatch.token_of_row)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        ones = torch.ones_like(dispatch.row_of_pair, dtype=torch.float32)
        return mix_rows(grads[0], dispatch.row_of_pair, ones, dispatch.expert_ends[-1]), None


class _RowsOfExperts(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (end,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        grad = grads[0]
        used = torch.arange(grad.shape[0], device=grad.device) < end  # [R + 1]
        return torch.where(used[:, None], grad, 0), None  # where, not times: 0 * NaN is NaN


class _CombineRows(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, weights: Tensor, onto: Tensor | None, dispatch: Dispatch, end: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, end)
        ctx.dispatch, ctx.onto = dispatch, onto is not None  # pyright: ignore[reportAttributeAccessIssue]
        return mix_rows(rows, dispatch.row_of_pair, weights, end, onto)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        rows, weights, end = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        dispatch: Dispatch = ctx.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        weight_of_row = F.pad(weights.flatten()[dispatch.pair_of_row], (0, 1))  # [R + 1]
        grad_of_row = grads[0].index_select(0, dispatch.token_of_row)  # [R + 1, D]
        dot_of_row = (grad_of_row * rows).sum(dim=-1, dtype=torch.float32)  # [R + 1]
        grad_weights = dot_of_row[dispatch.row_of_pair]  # [T, K]
        grad_weights = torch.where(dispatch.row_of_pair < end, grad_weights, 0)
        grad_onto = grads[0] if ctx.onto else None  # pyright: ignore[reportAttributeAccessIssue]
        return grad_of_row * weight_of_row[:, None].to(rows.dtype), grad_weights, grad_onto, None, None
