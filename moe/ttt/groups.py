"""Which parameters adapt: groups by what they are, and the batch norms whose statistics move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from moe.model.config import GROUPS, Group
from moe.model.layers import BatchNorm, GroupNorm, LayerNorm, RmsNorm
from moe.model.router import Router
from moe.model.transformer import Block

NORMS = (BatchNorm, GroupNorm, LayerNorm, RmsNorm)


def collect_params(model: nn.Module, group: Group = "norms") -> tuple[list[nn.Parameter], list[str]]:
    """Return the parameters of a group, and their names, in the model's order.

    Args:
        model: Model, or a part of one.
        group: ``"norms"`` gains and offsets of all norms, ``"router"`` the maps to expert logits,
            ``"expert_norms"`` the norms in front of the experts, ``"last_block"`` all of the last block.

    Raises:
        ValueError: The group is unknown, or empty for this model.
    """
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group!r}")
    members = {id(parameter) for module in _modules(model, group) for parameter in module.parameters()}
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in members]
    if not named:
        raise ValueError(f"group {group!r} is empty for this {type(model).__name__}; adapt another group")
    return [parameter for _, parameter in named], [name for name, _ in named]


def batch_norms(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """Return the names and batch norms of a model; none where it has norms of another kind."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm))


@contextmanager
def batch_statistics_in_force(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics, and let the running ones follow, while the context lasts."""
    for _, norm in batch_norms(model):
        norm.train()
    try:
        yield
    finally:
        for _, norm in batch_norms(model):
            norm.eval()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers that adaptation moves, not copies of them."""
    return [buffer for _, norm in batch_norms(model) for buffer in norm.buffers()]


def _modules(model: nn.Module, group: Group) -> list[nn.Module]:
    modules = list(model.modules())
    blocks = [module for module in modules if isinstance(module, Block)]
    if group == "norms":
        return [module for module in modules if isinstance(module, NORMS)]
    if group == "router":
        return [module for module in modules if isinstance(module, Router)]
    return [block.moe_norm for block in blocks] if group == "expert_norms" else list(blocks[-1:])
