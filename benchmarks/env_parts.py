"""Where an interval of the batched twin goes: its parts, one after the other, each over all copies.

The core plays an environment's whole interval before the next one's. Here each part is played for all
environments before the next part, so that it can be timed from outside; the copies go on as they would.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from moe.compiled import fill, jit, uncounted
from thermoe_env.mdp.fields import FIELDS, encode_row
from thermoe_env.mdp.interval import fill_levels, settle
from thermoe_env.mdp.limits import open_classes
from thermoe_env.problem.knobs import fill_values
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.heat import fill_clocks, heat_devices
from thermoe_env.twin.service import serve


@jit
def _serve_all(fixed, service, state, servers, now):
    fixed, service, state, servers, now = uncounted((fixed, service, state, servers, now))
    rules, slots = fixed.rules[0], now.slot_energy.shape[1]
    for i in range(now.levels.shape[0]):
        number = int(state.track[i].step)
        fill_values(fixed.level_table, now.index_rows[i], now.knob_rows[i])
        fill(now.work_rows[i], 0.0)
        fill_clocks(state.devices[i], now.knobs[i].sm_clock, now.clocks[i])
        serve(
            service, now.knobs[i], now.levels[i], state.arrivals[i], number * slots,
            state.shift[i, int(number * rules.interval_s)], now.clocks[i],
            open_classes(rules, state.track[i]), servers, i, now.work[i], now.histogram[i],
            now.slot_energy[i],
        )  # fmt: skip


@jit
def _heat_all(fixed, service, state, servers, now):
    fixed, state, now = uncounted((fixed, state, now))
    for i in range(now.levels.shape[0]):
        second = int(state.track[i].step * fixed.rules[0].interval_s)
        heat_devices(
            state.devices[i], now.slot_energy[i], now.clocks[i], state.drift_c[i, second], now.gpu[i]
        )


@jit
def _settle_all(fixed, service, state, servers, now):
    fixed, state, now = uncounted((fixed, state, now))
    for i in range(now.levels.shape[0]):
        settle(
            fixed.rules[0], fixed.prices[0], fixed.quality_floor, fixed.rules[0].limit_c, state.track[i],
            now.work[i], now.gpu[i], state.budget_w[i], now.levels[i].ttt_steps > 0, now.raw[i], now.terms[i],
            now.cost[i],
        )  # fmt: skip
        fill_levels(fixed.rules[0], now.index_rows[i], now.raw_rows[i])


@jit
def _encode_all(fixed, now, observation):
    fixed, now, observation = uncounted((fixed, now, observation))
    for i in range(now.levels.shape[0]):
        encode_row(now.raw_rows[i], fixed.low, fixed.scale, observation[i])


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
    arrays = batch._fixed, batch._service, batch.state, batch.servers, batch._interval
    observation = np.empty((n, len(FIELDS)), np.float32)
    parts: dict[str, Callable[[], object]] = {
        "serve": lambda: _serve_all(*arrays),
        "heat": lambda: _heat_all(*arrays),
        "settle": lambda: _settle_all(*arrays),
        "encode": lambda: _encode_all(batch._fixed, batch._interval, observation),
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
