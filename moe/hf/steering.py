"""Routing bias and expert count of a Hugging Face Mixture-of-Experts model, at run time, without editing it.

`attach` hooks the gates of a loaded `transformers` model. With other knobs than the model's own, the hook
chooses the experts anew from the gate's input and hands them on in place of the gate's choice. As in
`moe.model.router.route` the bias is selection only: it decides who is chosen, and the chosen are weighed by
unbiased scores, in the way of their family. Importing this module imports no transformers.

Shapes: T tokens, D model, E experts, K experts per token, L layers with experts.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.hf.families import HfModelError, family_of, limits_groups
from moe.model.router import BIAS_SCALE, Routing
from moe.model.usage import tokens_per_expert

OLDEST = (5, 15)
"""First supported release of transformers: from here on every gate returns (logits, weights, experts)."""


class Attachment:
    """The knobs of an attached model; undoes itself at the end of a ``with`` block, or by `detach`.

    Until a knob is set the model does what it did, bit for bit.

    Attributes:
        n_experts: Experts E per layer.
        own_top_k: Experts per token that the model was made for.
        max_top_k: Most that can be chosen: E, or the experts of the groups that a token may use.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hook the gates; see `attach`."""
        self._gates = _gates(model)
        gate: Any = self._gates[0]
        self.n_experts, self.own_top_k = int(gate.num_experts), int(gate.top_k)
        self.max_top_k = self.n_experts
        if limits_groups(gate):
            self.max_top_k = self.n_experts // gate.num_group * gate.topk_group
        self._select = family_of(model.config).select
        self._model: Any = model
        # The auxiliary loss reads the count of experts from here, not from the gate.
        self._count_for_loss = getattr(model, "num_experts_per_tok", None)
        self._top_k, self._routing_bias = self.own_top_k, 0.0
        self._expert_cost: Tensor | None = None
        self._pulls: list[Tensor] | None = None  # per layer [E], None where they would change nothing
        self._seen: list[Routing | None] = [None] * len(self._gates)
        # Before other hooks, so that they see the experts that really run. Logits are passed on untouched.
        self._handles = [
            gate.register_forward_hook(_GateHook(self, layer), prepend=True)
            for layer, gate in enumerate(self._gates)
        ]
        self._handles.append(model.register_forward_pre_hook(self._forget))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was before; may be called twice."""
        if self._handles and self._count_for_loss is not None:
            self._model.num_experts_per_tok = self._count_for_loss
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def expert_count(self) -> int:
        """Experts per token, 1 to `max_top_k`."""
        return self._top_k

    @expert_count.setter
    def expert_count(self, value: int) -> None:
        self._refuse_if_detached()
        value = operator.index(value)
        if not 1 <= value <= self.max_top_k:
            raise HfModelError(
                f"expert_count must be within 1..{self.max_top_k} of the model's {self.n_experts} experts, "
                f"got {value}"
            )
        self._top_k = value
        if self._count_for_loss is not None:
            self._model.num_experts_per_tok = value

    @property
    def routing_bias(self) -> float:
        """Strength of the pull to cheap experts, 0 to 1; without an `expert_cost` it does nothing."""
        return self._routing_bias

    @routing_bias.setter
    def routing_bias(self, value: float) -> None:
        self._refuse_if_detached()
        if not 0.0 <= value <= 1.0:
            raise HfModelError(f"routing_bias must lie in [0, 1], got {value}")
        if value != self._routing_bias:
            self._routing_bias = float(value)
            self._make_pulls()

    @property
    def expert_cost(self) -> Tensor | None:
        """Cost per expert in [0, 1], [E], the same for all layers, on the CPU; None for none."""
        return self._expert_cost

    @expert_cost.setter
    def expert_cost(self, value: Tensor | Sequence[float] | None) -> None:
        self._refuse_if_detached()
        if value is not None:
            value = torch.as_tensor(value, dtype=torch.float32, device="cpu").detach().clone()
            if value.shape != (self.n_experts,):
                raise HfModelError(
                    f"expert_cost needs one number for each of the {self.n_experts} experts, got shape "
                    f"{tuple(value.shape)}; is it the cost table of another model?"
                )
            if not bool(((value >= 0.0) & (value <= 1.0)).all()):  # NaN is neither
                raise HfModelError(
                    f"expert_cost must lie in [0, 1], got {value.tolist()}; divide by the largest"
                )
        self._expert_cost = value
        self._make_pulls()

    @property
    def routing(self) -> tuple[Routing, ...]:
        """What each of the L layers decided in the latest forward pass, on the device.

        Logits and weights are in the model's own types; `weights` sum to what the family makes of them.

        Raises:
            HfModelError: a gate has not been called.
        """
        seen = [routing for routing in self._seen if routing is not None]
        if len(seen) < len(self._seen):
            missing = [layer for layer, routing in enumerate(self._seen) if routing is None]
            raise HfModelError(
                f"no routing was seen in the layers with experts number {missing}: run the model first; if "
                "it ran, a kernel bypasses its gates: load it without use_kernels and without MXFP4 kernels"
            )
        return tuple(seen)

    @property
    def tokens_per_expert(self) -> Tensor:
        """Tokens that the latest forward pass sent to each expert, int32 [L, E], counted on the device."""
        return torch.stack([tokens_per_expert(routing) for routing in self.routing])

    def decide(self, layer: int, gate: Any, x: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Hook of a gate: note its decision, or put another in its place; None leaves the output alone."""
        logits, weights, experts = output
        if self._top_k == self.own_top_k and self._pulls is None:
            self._seen[layer] = Routing(logits.detach(), weights.detach(), experts)
            return None
        # Not the gate's own logits: releases differ in what they put there.
        bias = getattr(gate, "bias", None)
        own = F.linear(
            x.reshape(-1, x.shape[-1]).to(logits.dtype),
            gate.weight.to(logits.dtype),
            None if bias is None else bias.to(logits.dtype),
        )  # [T, E]
        pull = None if self._pulls is None else self._pulls[layer]
        chosen, experts = self._select(gate, own, self._top_k, pull)
        chosen = chosen.to(weights.dtype)
        self._seen[layer] = Routing(own.detach(), chosen.detach(), experts)
        return logits, chosen, experts

    def _make_pulls(self) -> None:
        self._pulls = None
        if self._expert_cost is None or not self._routing_bias:
            return
        excess = self._expert_cost - self._expert_cost.min()
        if bool(excess.any()):
            pull = self._routing_bias * BIAS_SCALE * excess
            self._pulls = [pull.to(gate.weight.device) for gate in self._gates]

    def _forget(self, *_: Any) -> None:
        self._seen = [None] * len(self._gates)

    def _refuse_if_detached(self) -> None:
        if not self._handles:
            raise HfModelError("this attachment is detached; attach to the model again")


class _GateHook:
    """Forward hook of one gate, by whose type an attached model is known."""

    def __init__(self, attachment: Attachment, layer: int) -> None:
        self._attachment, self._layer = attachment, layer

    def __call__(self, gate: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        return self._attachment.decide(self._layer, gate, args[0], output)


def attach(model: nn.Module) -> Attachment:
    """Take hold of the routing of a loaded `transformers` model of one of `FAMILIES`.

    ``with attach(model) as knobs: knobs.expert_count = 4`` steers the model until the block ends, also by an
    exception. Router logits that the model returns (``output_router_logits``) stay its own, unbiased ones;
    its auxiliary loss counts as many experts as are in force, but does not see the bias.

    Raises:
        HfModelError: transformers is missing or too old; the model is none of transformers, has no experts,
            is of an unknown family, has gates of unknown make, or is attached already.
    """
    transformers = import_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise HfModelError(
            f"{type(model).__name__} is not a model of transformers; load one with its classes"
        )
    return Attachment(model)


def import_transformers() -> Any:
    """Import transformers, which is an optional extra.

    Raises:
        HfModelError: it is missing, or older than `OLDEST`.
    """
    try:
        # By name: to know its types, type checkers read all of its models, which takes minutes.
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise HfModelError(f"transformers cannot be imported ({error}): pip install '.[hf]'") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise HfModelError(
            f"transformers {transformers.__version__} is too old: in some families its routers choose "
            f"outside of the gate; at least {OLDEST[0]}.{OLDEST[1]} is needed: pip install '.[hf]'"
        )
    return transformers


def _gates(model: Any) -> list[Any]:
    """The gates of a model in order of its layers, all alike and none attached."""
    end = family_of(model.config).gate
    gates: list[Any] = [module for name, module in model.named_modules() if name.endswith(end)]
    if not gates:
        raise HfModelError(
            f"this {model.config.model_type} has no layer with experts (no module named *{end}); take another"
        )
    for gate in gates:
        for attribute in ("top_k", "num_experts", "weight"):
            if not hasattr(gate, attribute):
                raise HfModelError(
                    f"the gate {type(gate).__name__} has no {attribute!r}: it is not the one that "
                    f"transformers has for {model.config.model_type}; load the model without custom code"
                )
        if any(isinstance(hook, _GateHook) for hook in gate._forward_hooks.values()):
            raise HfModelError("the model is attached already; detach that attachment first")
    shapes = {(gate.num_experts, gate.top_k) for gate in gates}
    if len(shapes) > 1:
        raise HfModelError(
            f"the layers differ in (experts, experts per token): {sorted(shapes)}; one setting of the knobs "
            "cannot fit them all"
        )
    return gates
