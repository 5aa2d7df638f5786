"""What compiled code finds by addresses is the same memory and code, and nobody counts references."""

from __future__ import annotations

import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba.core import types

from moe.compiled import jit
from moe.memory import Held, address_of, call, held, numbers, place_of, prefetch, take

Pair = namedtuple("Pair", ["wide", "narrow"])
Lot = namedtuple("Lot", ["pair", "ones", "records", "factor", "number"])
RECORD = np.dtype([("first", np.float64), ("others", np.float64, (2,))])


def lot() -> Lot:
    pair = Pair(np.zeros((2, 3), np.int32), np.arange(5.0))
    return Lot(pair, np.ones(4), np.zeros(3, RECORD), 2.5, 7)


def test_prefetching_changes_no_memory() -> None:
    rng = np.random.default_rng(0)
    kept = Held(Pair(rng.normal(size=(50, 37)), rng.normal(size=50)))
    kind, (wide, narrow) = kept.kind, kept._value
    expected = wide + narrow[:, None]

    @jit
    def shift_all(address, ahead):
        pair = held(address, kind)
        for i in range(pair.wide.shape[0]):
            if i + ahead < pair.wide.shape[0]:
                prefetch((pair.wide, pair.narrow), i + ahead)
                prefetch(pair, i + ahead)
            for j in range(pair.wide.shape[1]):
                pair.wide[i, j] += pair.narrow[i]

    before = sys.getrefcount(wide), sys.getrefcount(narrow)
    shift_all(kept.address, 2)
    assert np.array_equal(wide, expected)
    assert (sys.getrefcount(wide), sys.getrefcount(narrow)) == before
    shift_all(Held(Pair(np.zeros((3, 0)), np.ones(3))).address, 1)  # rows without entries


def test_what_is_held_is_the_same_memory_for_as_long_as_it_is() -> None:
    value = lot()
    kept = Held(value)
    kind = kept.kind
    arrays = (*value.pair, value.ones, value.records)
    counts = [sys.getrefcount(array) for array in arrays]

    @jit
    def change(address, row):
        lent = held(address, kind)
        lent.pair.wide[1, row] += 7
        lent.ones[0] = lent.pair.narrow.sum()
        record = lent.records[row]
        record.first = 1.0
        numbers(record)[2] += 3.0
        return lent.factor * lent.number

    for row in range(3):
        assert change(kept.address, row) == 17.5
    assert value.pair.wide.tolist() == [[0, 0, 0], [7, 7, 7]] and value.ones.tolist() == [10.0, 1.0, 1.0, 1.0]
    assert value.records["first"].tolist() == [1.0] * 3
    assert value.records["others"].tolist() == [[0.0, 3.0]] * 3
    assert counts == [sys.getrefcount(array) for array in arrays]
    kept.hold(lot()._replace(factor=1.0))
    assert change(kept.address, 0) == 7.0 and value.pair.wide[1, 0] == 7


def test_code_is_called_by_its_address_and_lent_tuples_handed_on_by_theirs() -> None:
    value = lot()
    kept, part = Held(value), Held(value.pair)
    kind, part_kind = kept.kind, part.kind

    @jit
    def largest(address, factor):
        if factor < 0.0:
            raise ValueError("negative")
        return factor * held(address, part_kind).narrow.max()

    @jit
    def twice(largest, address, factor):
        return 2.0 * call(largest, (place_of(held(address, kind).pair), factor), types.float64)

    code = address_of(largest, part.address, 1.0)
    assert twice(code, kept.address, 10.0) == 80.0
    try:
        twice(code, kept.address, -1.0)
    except ValueError as error:
        assert str(error) == "negative"
    else:
        raise AssertionError("an error of called code was lost")


def test_threads_take_every_number_once() -> None:
    @jit
    def mark(taken, marks):
        first = take(taken, 3)
        while first < marks.shape[0]:
            for i in range(first, min(marks.shape[0], first + 3)):
                marks[i] += 1
            first = take(taken, 3)

    taken, marks = np.zeros(1, np.int64), np.zeros(100_000, np.int64)
    mark(np.full(1, marks.size), marks)  # compiles
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(mark, taken, marks) for _ in range(4)]:
            done.result()
    assert (marks == 1).all()
