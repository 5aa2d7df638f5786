"""Moving tokens to experts and back, without reading anything on the host.

Every (token, chosen expert) pair becomes one row; rows are sorted by expert so that each expert owns a
contiguous block, the layout of ``torch.nn.functional.grouped_mm``. Experts are ordered widest first, so the
experts that have a given hidden slice (see ``experts``) own a prefix of the rows. What ``grouped_mm`` leaves
behind the prefix is uninitialised memory; the functions here never read it.

Shapes: T tokens, D model, E experts, K experts per token, R = T * K rows and one spare row behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from moe.model.kernels import copy_rows, mix_rows


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


def gather_rows(x: Tensor, dispatch: Dispatch, n_experts: int) -> Tensor:
    """Copy each token, [T, D], to its rows of the first ``n_experts``, [R + 1, D]; the others are garbage."""
    return _GatherRows.apply(x, dispatch, dispatch.expert_ends[n_experts - 1])  # pyright: ignore[reportReturnType]


def rows_of_experts(rows: Tensor, dispatch: Dispatch, n_experts: int) -> Tensor:
    """Return ``rows`` as used by the first ``n_experts``: other rows' gradients are garbage and become 0."""
    return _RowsOfExperts.apply(rows, dispatch.expert_ends[n_experts - 1])  # pyright: ignore[reportReturnType]


def combine_rows(
    parts: Sequence[Tensor], prefixes: Sequence[int], weights: Tensor, dispatch: Dispatch
) -> Tensor:
    """Sum each token's rows of all parts by weight.

    The sum runs in a fixed order per token, so unlike ``index_add`` it does not depend on scheduling.

    Args:
        parts: Parts of the outputs, [R + 1, D]; uninitialised in the rows of experts that lack the part.
        prefixes: How many experts, from the first, have each part.
        weights: Combine weights.  # [T, K]
        dispatch: Where the rows come from.

    Returns:
        Mixed outputs.  # [T, D]
    """
    ends = [dispatch.expert_ends[n_experts - 1] for n_experts in prefixes]
    return _CombineRows.apply(weights, dispatch, ends, *parts)  # pyright: ignore[reportReturnType]


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dispatch: Dispatch, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        ctx.dispatch = dispatch  # pyright: ignore[reportAttributeAccessIssue]
        return copy_rows(x, dispatch.token_of_row, end)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        dispatch: Dispatch = ctx.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        ones = torch.ones_like(dispatch.row_of_pair, dtype=torch.float32)
        return mix_rows(grads, list(ctx.saved_tensors), dispatch.row_of_pair, ones), None, None  # pyright: ignore[reportAttributeAccessIssue]


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
        ctx: FunctionCtx, weights: Tensor, dispatch: Dispatch, ends: list[Tensor], *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weights, *ends, *parts)
        ctx.dispatch = dispatch  # pyright: ignore[reportAttributeAccessIssue]
        return mix_rows(parts, ends, dispatch.row_of_pair, weights)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, *saved = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        ends, parts = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        dispatch: Dispatch = ctx.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        weight_of_row = F.pad(weights.flatten()[dispatch.pair_of_row], (0, 1))  # [R + 1]
        grad_of_row = grads[0].index_select(0, dispatch.token_of_row)  # [R + 1, D]
        grad_weights = torch.zeros_like(weights)
        for rows, end in zip(parts, ends, strict=True):
            dot_of_row = (grad_of_row * rows).sum(dim=-1, dtype=torch.float32)  # [R + 1]
            grad_weights += torch.where(dispatch.row_of_pair < end, dot_of_row[dispatch.row_of_pair], 0)
        grad_part = grad_of_row * weight_of_row[:, None].to(grad_of_row.dtype)
        return grad_weights, None, None, *[grad_part] * len(parts)
