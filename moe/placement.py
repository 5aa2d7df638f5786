"""Which device holds which expert, as data; and what a device's heat makes of the routing cost.

Shapes: E experts, D devices. Torch is imported only where a tensor is made, so that the twin needs none.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class PlacementError(ValueError):
    """A placement breaks a rule, or is of another model; the message names the rule and the remedy."""


@dataclass(frozen=True)
class Placement:
    """Every expert on one device, the same in every layer. A device may hold none.

    Attributes:
        device_of_expert: Device of each expert.  # [E]
        n_devices: Number of devices D.

    Raises:
        PlacementError: There is no expert, an expert is left out (None), or a device is absent.
    """

    device_of_expert: tuple[int, ...]
    n_devices: int

    def __post_init__(self) -> None:
        """Refuse what places nothing, or nowhere."""
        _refuse_no_device(self.n_devices)
        if not self.device_of_expert:
            raise PlacementError("device_of_expert places no expert; give one device per expert")
        left_out = [e for e, device in enumerate(self.device_of_expert) if type(device) is not int]
        if left_out:
            raise PlacementError(
                f"device_of_expert leaves out experts {left_out}, got {self.device_of_expert}; give each the "
                f"number of a device, 0..{self.n_devices - 1}"
            )
        absent = sorted({device for device in self.device_of_expert if not 0 <= device < self.n_devices})
        if absent:
            raise PlacementError(
                f"device_of_expert names devices {absent}, present are 0..{self.n_devices - 1}; "
                "move their experts or raise n_devices"
            )

    @classmethod
    def even(cls, expert_widths: Sequence[int], n_devices: int) -> Placement:
        """Place experts so that all devices hold about equally many hidden units.

        Widest first, each goes to the device with the fewest units so far, then the fewest experts, then the
        lowest number: no device ends above 4/3 of the best possible maximum (Graham, SIAM J. Appl. Math. 17,
        1969).

        Args:
            expert_widths: Hidden units of each expert, as in ``ModelConfig``.  # [E]
            n_devices: Number of devices D.
        """
        _refuse_no_device(n_devices)
        device_of_expert = [0] * len(expert_widths)
        held = [(0, 0, device) for device in range(n_devices)]  # units, experts, device
        for expert in sorted(range(len(expert_widths)), key=lambda expert: -expert_widths[expert]):
            units, experts, device = heapq.heappop(held)
            heapq.heappush(held, (units + expert_widths[expert], experts + 1, device))
            device_of_expert[expert] = device
        return cls(tuple(device_of_expert), n_devices)

    @classmethod
    def of_devices(cls, experts_of_device: Sequence[Sequence[int]], n_experts: int) -> Placement:
        """Place the experts of a model as each device lists them.

        Args:
            experts_of_device: Numbers of the experts that each device holds.  # [D] lists
            n_experts: Number of experts E of the model.

        Raises:
            PlacementError: An expert is left out, unknown, or named more than once.
        """
        placed = [expert for experts in experts_of_device for expert in experts]
        twice = sorted({expert for expert in placed if placed.count(expert) > 1})
        if twice:
            raise PlacementError(
                f"each expert lives on one device, experts {twice} are named more than once; name each once"
            )
        device_of = {expert: device for device, experts in enumerate(experts_of_device) for expert in experts}
        left_out, unknown = (
            sorted(set(range(n_experts)) - set(placed)),
            sorted(set(placed) - set(range(n_experts))),
        )
        if left_out or unknown:
            raise PlacementError(
                f"devices must place experts 0 to {n_experts - 1} of the model, each on one: left out are "
                f"{left_out}, unknown are {unknown}; correct `experts`"
            )
        return cls(tuple(device_of[expert] for expert in range(n_experts)), len(experts_of_device))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Placement:
        """Build a placement from ``to_dict``'s output.

        Raises:
            PlacementError: A field is unknown or missing, or a rule is broken.
        """
        known = {"device_of_expert", "n_devices"}
        if set(values) != known:
            raise PlacementError(f"a placement has exactly the fields {sorted(known)}, got {sorted(values)}")
        return cls(tuple(values["device_of_expert"]), values["n_devices"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {"device_of_expert": list(self.device_of_expert), "n_devices": self.n_devices}

    @property
    def n_experts(self) -> int:
        """Number of experts E."""
        return len(self.device_of_expert)

    def check(self, n_experts: int) -> None:
        """Refuse a model of another number of experts.

        Raises:
            PlacementError: The placement leaves experts of the model out, or places more than it has.
        """
        if self.n_experts != n_experts:
            raise PlacementError(
                f"the model has {n_experts} experts and device_of_expert places {self.n_experts}; "
                "give one device per expert"
            )

    def experts_on(self, device: int) -> tuple[int, ...]:
        """Return the experts of a device, ascending.

        Raises:
            PlacementError: The device is absent.
        """
        if not 0 <= device < self.n_devices:
            raise PlacementError(f"device {device} is absent, present are 0..{self.n_devices - 1}")
        return tuple(expert for expert, at in enumerate(self.device_of_expert) if at == device)

    def per_device(self, per_expert: np.ndarray) -> np.ndarray:
        """Sum a quantity of experts, [..., E], over the experts of each device, [..., D]."""
        self.check(per_expert.shape[-1])
        held = [per_expert[..., list(self.experts_on(d))].sum(axis=-1) for d in range(self.n_devices)]
        return np.stack(held, axis=-1)

    def thermal_cost(
        self,
        expert_energy: Sequence[float],
        device_signal: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Return the routing cost of each expert: its energy times the heat of the device that holds it.

        Pass it as ``expert_cost`` to ``MoEModel.forward``. A signal of 0 everywhere, or equal energies and
        equal signals, make all costs equal, and an equal cost changes no routing.

        Args:
            expert_energy: Energy per token of each expert in any unit; its width stands for it.  # [E]
            device_signal: Thermal signal of each device, 0 (cool) to 1 (at its limit).  # [D]
            device: Where the tensor goes.

        Returns:
            Float32 costs in [0, 1].  # [E]

        Raises:
            PlacementError: Lengths are not E and D, an energy is negative or not finite or all are 0, or a
                signal is not within 0..1.
        """
        import torch

        energy, signal = np.asarray(expert_energy, np.float64), np.asarray(device_signal, np.float64)
        if energy.shape != (self.n_experts,) or signal.shape != (self.n_devices,):
            raise PlacementError(
                f"thermal_cost needs {self.n_experts} expert energies and {self.n_devices} device signals, "
                f"got shapes {energy.shape} and {signal.shape}"
            )
        if not (np.isfinite(energy).all() and energy.min() >= 0.0 and energy.max() > 0.0):
            raise PlacementError(
                f"expert_energy must be finite, not negative and not all 0, got {energy.tolist()}; "
                "measure it again"
            )
        if not ((signal >= 0.0) & (signal <= 1.0)).all():  # NaN compares false
            raise PlacementError(
                f"device_signal must lie within 0..1, got {signal.tolist()}; clip it where it is computed"
            )
        cost = energy / energy.max() * signal[list(self.device_of_expert)]  # [E]
        return torch.from_numpy(cost).to(device, torch.float32)


def _refuse_no_device(n_devices: int) -> None:
    if n_devices < 1:
        raise PlacementError(f"n_devices must be at least 1, got {n_devices}")
