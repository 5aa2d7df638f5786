"""Where an interval of the batched twin goes: its parts, one after the other, each over all copies.

The core plays an environment's whole interval before the next one's. Here each part is played for all
environments before the next part, so that it can be timed from outside; the copies go on as they would.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba.core import types

from moe.compiled import jit
from moe.memory import Held, call, held, numbers, place_of
from thermoe_env.mdp.fields import FIELDS, encode_row
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.core import TwinBatch, choose


@cache
def _parts_of(kind: Any) -> tuple[Any, ...]:
    """Serving, heating, settling and encoding of all environments of a `Held` of a `Batch`."""

    @jit
    def serve_all(address):
        batch = held(address, kind)
        slots = batch.serving.slot_energy.shape[1]
        for i in range(batch.seeds.shape[0]):
            number, classes = choose(batch, i)
            call(batch.code.serve, (place_of(batch.serving), i, number * slots, classes), types.none)

    @jit
    def heat_all(address):
        batch = held(address, kind)
        account = batch.account
        for i in range(batch.seeds.shape[0]):
            second = int(account.track[i].step * account.rules[0].interval_s)
            call(batch.code.heat, (place_of(batch.heating), i, second), types.boolean)

    @jit
    def settle_all(address):
        batch = held(address, kind)
        limit_c = batch.account.rules[0].limit_c
        for i in range(batch.seeds.shape[0]):
            call(batch.code.settle, (place_of(batch.account), i, limit_c), types.float64)

    @jit
    def encode_all(address, observation):
        account = held(address, kind).account
        for i in range(observation.shape[0]):
            encode_row(numbers(account.raw[i]), account.low, account.scale, observation[i])

    return serve_all, heat_all, settle_all, encode_all


def interval_parts(problem: Problem, n: int, *, episodes: int = 5) -> dict[str, float]:
    """Nanoseconds of one thread per interval and copy, by part: the least of a few episodes.

    Args:
        problem: what to play, with random actions.
        n: copies.
        episodes: to play.

    Returns:
        `begin` (traffic, budget and devices of a new episode, over its intervals), `serve` (queue and
        batches), `heat`, `settle` (averages, reward, raw observation) and `encode`.
    """
    batch, rng = TwinBatch(problem, n), np.random.default_rng(0)
    nvec, steps = problem.knobs.nvec, problem.scenario.steps
    indices = [
        problem.knobs.indices(rng.integers(0, nvec, (n, len(nvec))), "multi_discrete") for _ in range(16)
    ]
    batch.reset(np.arange(n))
    held_batch = Held(batch.whole)
    address, (serve, heat, settle, encode) = held_batch.address, _parts_of(held_batch.kind)
    observation = np.empty((n, len(FIELDS)), np.float32)
    parts: dict[str, Callable[[], object]] = {
        "serve": lambda: serve(address),
        "heat": lambda: heat(address),
        "settle": lambda: settle(address),
        "encode": lambda: encode(address, observation),
    }
    spent: dict[str, list[float]] = {name: [] for name in ("begin", *parts)}
    for _ in range(episodes + 1):  # the first one compiles
        spent["begin"].append(_seconds(batch.reset_to_next))
        for name in parts:
            spent[name].append(0.0)
        for t in range(steps):
            batch.index[:] = indices[t % 16]
            for name, play in parts.items():
                spent[name][-1] += _seconds(play)
    return {
        name: min(seconds[1:]) / (steps * n) * 1e9 for name, seconds in spent.items()
    }  # the first compiles


def _seconds(play: Callable[[], object]) -> float:
    """Time of the calling thread."""
    start = time.thread_time()
    play()
    return time.thread_time() - start
