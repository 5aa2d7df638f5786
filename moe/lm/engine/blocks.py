"""Which blocks of keys and values belong to which running sequence."""

from __future__ import annotations

import numpy as np

from moe.lm.config import BLOCK


def blocks_for(positions: int) -> int:
    """Blocks that hold the keys and values of so many positions."""
    return -(-positions // BLOCK)


class Blocks:
    """A pool of blocks, given to slots whole: a sequence that runs never waits for memory.

    Block 0 is spare: rows that fill up a captured graph write there, from the slot behind the last.

    Attributes:
        table: Blocks of each slot, 0 where it has none.  # [slots + 1, M]
        slots: Most sequences at once.
        n_blocks: Blocks without the spare one.
    """

    def __init__(self, slots: int, context: int, n_blocks: int) -> None:
        """Start with everything free.

        Raises:
            ValueError: a sequence of the longest context would never find room.
        """
        most = blocks_for(context)
        if n_blocks < most:
            raise ValueError(
                f"{n_blocks} blocks of {BLOCK} positions hold no sequence of {context} positions: give the "
                f"cache at least {most * BLOCK} positions"
            )
        self.slots, self.n_blocks = slots, n_blocks
        self.table = np.zeros((slots + 1, most), np.int32)
        self.clear()

    def clear(self) -> None:
        """Take everything back."""
        self.table[:] = 0
        self._free_blocks = list(range(self.n_blocks, 0, -1))
        self._free_slots = list(range(self.slots - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return len(self._free_blocks)

    @property
    def free_slots(self) -> int:
        """Slots in which no sequence runs."""
        return len(self._free_slots)

    def has_room(self, positions: int) -> bool:
        """Whether a sequence of so many positions, at most the context, finds a slot and blocks."""
        most = min(len(self._free_blocks), self.table.shape[1])
        return bool(self._free_slots) and blocks_for(positions) <= most

    def reserve(self, positions: int) -> int:
        """Give a slot and blocks to a sequence; returns the slot.

        Raises:
            RuntimeError: no room; ask `has_room` first.
        """
        if not self.has_room(positions):
            raise RuntimeError(
                f"no room for a sequence of {positions} positions: {self.free_slots} slots and "
                f"{self.free_blocks} blocks of {BLOCK} are free, one may have {self.table.shape[1]}"
            )
        slot, n = self._free_slots.pop(), blocks_for(positions)
        self.table[slot, :n] = [self._free_blocks.pop() for _ in range(n)]
        return slot

    def release(self, slot: int) -> None:
        """Take a sequence's slot and blocks back.

        Raises:
            RuntimeError: nobody has the slot.
        """
        row = self.table[slot]
        if not row.any():
            raise RuntimeError(f"slot {slot} is free already")
        self._free_blocks += row[row > 0].tolist()
        self._free_slots.append(slot)
        row[:] = 0
