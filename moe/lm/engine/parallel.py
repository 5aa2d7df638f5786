"""Experts of one model on several devices: one process per device, in step.

Every rank holds the sequences, the cache and all weights, and runs every row; of the experts it computes
those that a placement gives to its device. Each layer adds up what the ranks' experts said (one all-reduce of
the stream, in a buffer of the step's rows), so a layer lasts as long as its slowest device. The bias knows
which expert is where by the engine's `penalty`.

Rank 0 leads: it admits, decides and launches; the others follow what it announces. All ranks see the same
numbers: what is added up is the same everywhere, and so is the demand by which experts are ranked.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import ThermoeError
from moe.placement import Placement, PlacementError

STOP, STEP, RESERVE, USAGE, PENALTY = range(5)
"""Kinds of announcements."""


class DevicesLostError(ThermoeError):
    """Another device of the group does not answer any more."""


class ExpertGroup:
    """The devices that share a model's experts; the default group of `torch.distributed`.

    Attributes:
        rank: Of this process; rank 0 leads.
        placement: Which device computes which expert.
    """

    def __init__(self, placement: Placement) -> None:
        """Join the group that is initialised.

        Raises:
            PlacementError: it places experts on another number of devices than there are.
        """
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        if placement.n_devices != ranks:
            raise PlacementError(
                f"the placement is for {placement.n_devices} devices, {ranks} take part; place the experts "
                "on as many"
            )
        self.placement, self._ranks = placement, ranks

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return self.rank == 0

    def held(self, device: torch.device) -> Tensor:
        """Which experts are computed here, int32, 1 or 0, on a device.  # [E]."""
        here = np.array(self.placement.device_of_expert) == self.rank
        return torch.from_numpy(here.astype(np.int32)).to(device)

    def add(self, x: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        dist.all_reduce(x)

    def agree(self, x: Tensor) -> None:
        """Replace a tensor by its mean over all ranks, so that it is the same to the last bit."""
        dist.all_reduce(x)
        x /= self._ranks

    def announce(self, message: Tensor, kind: int, payload: np.ndarray | None = None) -> None:
        """Tell the followers what comes; `message` is a buffer of int32 on the CPU, the same size everywhere.

        Raises:
            DevicesLostError: a rank is gone.
        """
        host = message.numpy()
        host[0] = kind
        if payload is not None:
            host[1] = len(payload)
            host[2 : 2 + len(payload)] = payload
        self._broadcast(message)

    def listen(self, message: Tensor) -> tuple[int, np.ndarray]:
        """Wait for the next announcement; returns its kind and payload.

        Raises:
            DevicesLostError: the leader is gone.
        """
        self._broadcast(message)
        host = message.numpy()
        return int(host[0]), host[2 : 2 + int(host[1])]

    def _broadcast(self, message: Tensor) -> None:
        try:
            dist.broadcast(message, src=0)
        except RuntimeError as error:
            raise DevicesLostError(
                f"rank {self.rank}: another device of the group does not answer ({error}); start all again"
            ) from error
