"""Muon for matrices, AdamW for the rest.

Muon as in arXiv 2502.16982: momentum, orthogonalised, scaled so that AdamW's learning rates fit. Every
expert's gate, up and down is a matrix of its own, all of a layer orthogonalised in one batched product. With
1.6 G parameters the passes over memory cost as much as the products, so each is one kernel on CUDA, and no
gradient is copied into another layout: halves of a packed matrix go to the batched product as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.lm.config import Recipe
from moe.lm.model import LanguageModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Keller Jordan's quintic, which moves singular values towards 1."""
STEPS = 5
DECAY = 0.1
"""Weight decay of matrices."""


def orthogonalise(g: Tensor) -> Tensor:
    """Replace the singular values of matrices, bfloat16, [N, rows, columns], by about one."""
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = g * (1 / (norm + 1e-7)).bfloat16()
    tall = g.shape[-2] > g.shape[-1]
    for _ in range(STEPS):
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


class Optimiser:
    """Both optimisers under one schedule factor."""

    def __init__(self, model: LanguageModel, recipe: Recipe) -> None:
        """Give each parameter to its optimiser.

        Args:
            model: in training.
            recipe: its rates. A tied embedding is the head too and has the head's.
        """
        c = model.config
        self.lr = recipe.lr
        self.splits = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim)
        self.cuda = model.embed.is_cuda
        matrices, routers, rest = [], [], []
        for name, p in model.named_parameters():
            if name.endswith("router"):
                routers.append(p)
            elif p.ndim > 1 and not name.endswith(("embed", "head.weight")):
                matrices.append((name, p))
            elif name != "embed":
                rest.append(p)
        self.matrices: list[tuple[str, Tensor]] = matrices
        self.momenta = [torch.zeros_like(p) for _, p in matrices]
        groups = [
            {"params": rest, "lr": recipe.adam_lr},
            {"params": routers, "lr": recipe.router_lr},
            {"params": [model.embed], "lr": recipe.adam_lr if c.tied else recipe.embed_lr},
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],  # a dense model has no routers
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=self.cuda,
        )
        self.rates = [group["lr"] for group in self.adam.param_groups]

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        """Apply and clear the gradients; `factor` is the schedule's."""
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.adam.step()
        lr = self.lr * factor
        for (name, parameter), buffer in zip(self.matrices, self.momenta, strict=True):
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: call backward before step")
            ahead = self._look_ahead(parameter.grad, buffer, momentum)
            parameter.grad = None
            parts = self._parts(name, ahead)
            for part in parts:
                part.copy_(orthogonalise(part))
            scale = 0.2 * max(parts[0].shape[-2:]) ** 0.5  # a root mean square of about 0.2
            self._add(parameter, ahead, 1 - lr * DECAY, -lr * scale)
        self.adam.zero_grad(set_to_none=True)

    def _parts(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """Views of one parameter's matrices, each [N, rows, columns]."""
        stack = x if x.ndim == 3 else x[None]
        if name.endswith("gate_up"):
            return stack.chunk(2, dim=-1)
        return stack.split(self.splits, dim=-2) if name.endswith("qkv.weight") else (stack,)

    def _look_ahead(self, grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Update the momentum and return Nesterov's look ahead, bfloat16."""
        if self.cuda:
            from moe.lm import train_kernels

            return train_kernels.momentum_step(grad, buffer, momentum)
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum).bfloat16()

    def _add(self, parameter: Tensor, x: Tensor, keep: float, rate: float) -> None:
        """Parameter = keep * parameter + rate * x."""
        if self.cuda:
            from moe.lm import train_kernels

            train_kernels.scaled_add(parameter, x, keep, rate)
        else:
            parameter.mul_(keep).add_(x, alpha=rate)
