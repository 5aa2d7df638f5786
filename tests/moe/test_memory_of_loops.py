"""What loops over many arrays do with their memory changes no number and leaves no reference behind."""

from __future__ import annotations

import sys
from collections import namedtuple

import numpy as np

from moe.compiled import Held, held, jit, prefetch, uncounted

Pair = namedtuple("Pair", ["wide", "narrow"])


@jit
def _shift_all(pair, ahead):
    pair = uncounted(pair)
    wide, narrow = pair.wide, pair.narrow
    for i in range(wide.shape[0]):
        if i + ahead < wide.shape[0]:
            prefetch((wide, narrow), i + ahead)
        for j in range(wide.shape[1]):
            wide[i, j] += narrow[i]


def test_uncounted_arrays_are_the_same_memory_and_prefetching_changes_none_of_it() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=(50, 37)), rng.normal(size=50)
    expected = wide + narrow[:, None]
    before = sys.getrefcount(wide), sys.getrefcount(narrow)
    _shift_all(Pair(wide, narrow), 2)
    assert np.array_equal(wide, expected)
    assert (sys.getrefcount(wide), sys.getrefcount(narrow)) == before


def test_rows_without_entries_may_be_prefetched() -> None:
    wide = np.zeros((3, 0))
    _shift_all(Pair(wide, np.ones(3)), 1)
    assert wide.shape == (3, 0)


def test_held_arrays_are_the_same_memory_for_as_long_as_they_are_held() -> None:
    pair, ones = Pair(np.zeros((2, 3), np.int32), np.arange(5.0)), np.ones(4)
    kept = Held((pair, ones, 2.5))
    kind = kept.kind
    counts = [sys.getrefcount(array) for array in (*pair, ones)]

    @jit
    def change(address, row):
        pair, ones, factor = held(address, kind)
        pair.wide[1, row] += 7
        ones[0] = pair.narrow.sum()
        return factor

    for row in range(3):
        assert change(kept.address, row) == 2.5
    assert pair.wide.tolist() == [[0, 0, 0], [7, 7, 7]] and ones.tolist() == [10.0, 1.0, 1.0, 1.0]
    assert counts == [sys.getrefcount(array) for array in (*pair, ones)]
