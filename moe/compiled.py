"""What compiled code shares: how it is compiled, and loops that NumPy's slices would be slow to compile."""

from __future__ import annotations

import numba

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
"""For small functions of the hottest loops: a call that hands over arrays costs more than they do."""


@inlined
def fill(row, value):
    """Set every entry (a slice takes seconds to compile, for the sake of its errors)."""
    for i in range(row.shape[0]):
        row[i] = value


@inlined
def copy_row(row, source):
    """Copy one row into another of the same length."""
    for i in range(row.shape[0]):
        row[i] = source[i]
