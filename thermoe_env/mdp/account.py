"""The account of intervals, row by row: what `begin` and `settle` read and write, found by one address."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from moe.compiled import fill, inlined, jit
from moe.memory import call, held, numbers
from thermoe_env.mdp.fields import encode_finite
from thermoe_env.mdp.interval import begin, fill_levels, settle
from thermoe_env.mdp.limits import held_by, open_classes
from thermoe_env.mdp.signals import fill_announced


class Account(NamedTuple):
    """Episodes [n], and all that accounting for them reads and writes."""

    rules: np.ndarray
    """`Rules`, an array of one record; likewise the next."""
    prices: np.ndarray
    quality_floor: np.ndarray  # [S]
    low: np.ndarray  # [fields], see `Ranges`
    scale: np.ndarray
    default_index: np.ndarray  # int64 [knobs]
    events: np.ndarray
    """`EventTerms` of each of `ANNOUNCED`, records [3]."""
    announced: np.ndarray
    """float64 [n, 3, steps + notice + 1]."""
    levels: np.ndarray
    """Records of `INDEX_DTYPE` [n]: those in force."""
    track: np.ndarray
    """Records of `TRACK_DTYPE` [n]."""
    work: np.ndarray
    """Records of `WORK_DTYPE` [n]."""
    gpu: np.ndarray
    """Records of `GPU_DTYPE` [n]."""
    raw: np.ndarray
    """Records of `RAW_DTYPE` [n]."""
    terms: np.ndarray
    """float64 [n, terms of the reward]."""
    cost: np.ndarray
    """float64 [n, costs]."""
    first_gpu: np.ndarray
    """Of an episode's beginning, which may be apart from the interval that ended the one before."""
    first_raw: np.ndarray


@cache
def account_rows(kind: Any) -> tuple[Any, Any]:
    """What begins an episode in one row of an `Account` of some type, and what settles an interval.

    Args:
        kind: of a `Held` of it.

    Returns:
        (`begin_row` of (address, seed, row, limit in force), `settle_row` of (address, row, limit in force),
        which returns the reward); the raw observation is filled.
    """

    @jit
    def begin_row(address, seed, i, limit_c):
        here = held(address, kind)
        rules, track, raw = here.rules[0], here.track[i], here.first_raw[i]
        fill_announced(here.events, seed, here.announced[i])
        fill(numbers(track), 0.0)
        fill(numbers(raw), 0.0)
        begin(rules, limit_c, track, here.first_gpu[i], here.announced[i], raw)
        fill_levels(rules, here.default_index, numbers(raw))

    @jit
    def settle_row(address, i, limit_c):
        here = held(address, kind)
        rules, levels = here.rules[0], here.levels[i]
        reward = settle(
            rules, here.prices[0], here.quality_floor, limit_c, here.track[i], here.work[i], here.gpu[i],
            here.announced[i], levels.ttt_steps > 0, here.raw[i], here.terms[i], here.cost[i],
        )  # fmt: skip
        fill_levels(rules, numbers(levels), numbers(here.raw[i]))
        return reward

    return begin_row, settle_row


@inlined
def _coming(rules, track):
    """Of the coming interval: (stage, classes that may be begun, duty, what holds, see `held_by`)."""
    return int(track.stage), open_classes(track), track.duty, held_by(rules, track)


@cache
def account_alone(kind: Any) -> tuple[Any, Any]:
    """The functions of `account_rows` with what is observed, for an `Account` of one row.

    Returns:
        (`begin_one` of (address of `begin_row`, address, seed, limit, observation), which returns (whether
        all raw values are finite, `_coming`); `settle_one` of (address of `settle_row`, address, limit,
        observation), which returns (reward, whether finite, `_coming`))
    """

    @jit
    def begin_one(begin_row, address, seed, limit_c, observation):
        call(begin_row, (address, seed, 0, limit_c), types.none)
        here = held(address, kind)
        finite = encode_finite(numbers(here.first_raw[0]), here.low, here.scale, observation)
        return finite, _coming(here.rules[0], here.track[0])

    @jit
    def settle_one(settle_row, address, limit_c, observation):
        reward = call(settle_row, (address, 0, limit_c), types.float64)
        here = held(address, kind)
        finite = encode_finite(numbers(here.raw[0]), here.low, here.scale, observation)
        return reward, finite, _coming(here.rules[0], here.track[0])

    return begin_one, settle_one
