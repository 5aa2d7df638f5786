"""The batched core: many twin environments advanced by one compiled call, around any compiled service.

Every environment runs the same scalar functions as the single one, and the same compiled code of them
(`serving_rows`, `heating_rows`, `account_rows`), so results depend neither on the number of environments nor
on threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from numba.core import types

from moe.compiled import copy_row, fill, inlined, inner, jit, parallel
from moe.memory import Held, address_of, as_record, call, held, numbers, place_of, prefetch, take
from moe.randomness import derive
from moe.service.queueing import SLOT_S
from moe.service.traffic import traffic_of
from moe.workload import WORK_DTYPE
from thermoe_env.mdp.account import Account, account_rows
from thermoe_env.mdp.fields import FIELDS, RAW_DTYPE, encode_row, ranges_of
from thermoe_env.mdp.interval import COST_NAMES, TRACK_DTYPE, prices_of, rules_of
from thermoe_env.mdp.limits import open_classes
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import ANNOUNCED, announced_terms
from thermoe_env.problem.knobs import INDEX_DTYPE, VALUE_DTYPE, fill_values
from thermoe_env.problem.problem import Problem
from thermoe_env.seeding import as_seed
from thermoe_env.twin.heat import DEVICE_DTYPE, GPU_DTYPE, fill_clocks, nominal_devices, spread_of
from thermoe_env.twin.records import Batch, BatchState, BatchStep, Call, Code, Interval
from thermoe_env.twin.service import HISTOGRAM_BINS, Serving, serving_rows
from thermoe_env.twin.services import service_of
from thermoe_env.twin.telemetry import Heating, heating_rows

# Threads of GNU OpenMP spin while they wait for each other, which costs most of the speed wherever another
# process wants the cores as well. It reads this when numba starts its threads; the user's own choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_PLAY, _BEGIN, _LEAVE = range(3)
"""What a call does with an environment: one interval, the beginning of an episode, nothing."""


_AT_ONCE = 64
"""Environments that a thread takes at once: one that has to wait for a core leaves the others to the rest."""


@inlined
def _ask_ahead(batch, i):
    """Have the memory brought that the environments after `i` need next."""
    serving, heating, account = batch.serving, batch.heating, batch.account
    n = account.track.shape[0]
    if i + 2 < n:
        prefetch(
            (serving.levels, serving.knobs, serving.work, account.gpu, account.raw, account.track,
             heating.devices, serving.slot_energy, account.terms, account.cost), i + 2,
        )  # fmt: skip
        prefetch(serving.servers, i + 2)
    if i + 1 < n:  # of what was drawn at the episode's beginning: the interval's
        rules, number = account.rules[0], int(account.track[i + 1].step)
        second, slot = int(number * rules.interval_s), number * serving.slot_energy.shape[1]
        arrivals, announced = serving.arrivals[i + 1], account.announced[i + 1]
        prefetch((arrivals[0], arrivals[1]), slot)
        prefetch((serving.shift[i + 1], heating.drift_c[i + 1]), second)
        rows = announced[0], announced[1], announced[2]
        prefetch(rows, number + 1)
        prefetch(rows, number + 1 + rules.notice)


@inlined
def choose(batch, i):
    """Set the knobs and clocks of the coming interval in environment `i`; returns its number."""
    serving, track = batch.serving, batch.account.track[i]
    knobs = serving.knobs[i]
    fill_values(batch.level_table, numbers(serving.levels[i]), numbers(knobs))
    knobs.pace = min(knobs.pace, track.duty)
    fill_clocks(batch.heating.devices[i], knobs.sm_clock, serving.clocks[i])
    return int(track.step), open_classes(track)


@inlined
def _play(batch, i, out):
    """Play an interval in environment `i`."""
    code, account = batch.code, batch.account
    rules, track = account.rules[0], account.track[i]
    number, classes = choose(batch, i)
    second, slot = int(number * rules.interval_s), number * batch.serving.slot_energy.shape[1]
    call(code.serve, (place_of(batch.serving), i, slot, classes, account.announced[i, 2, number]), types.none)
    terminated = call(code.heat, (place_of(batch.heating), i, second), types.boolean)
    out.reward[i] = call(code.settle, (place_of(account), i, rules.limit_c), types.float64)
    encode_row(numbers(account.raw[i]), account.low, account.scale, out.observation[i])
    out.terminated[i] = terminated
    out.truncated[i] = not terminated and track.step >= batch.steps


@inlined
def _begin(batch, i, observation):
    """Begin the episode that is set for environment `i`, and write its first observation [fields]."""
    code, account, seed = batch.code, batch.account, derive(batch.seeds[i], batch.episodes[i])
    call(code.start, (place_of(batch.serving), seed, i), types.none)
    call(code.cool, (place_of(batch.heating), seed, i), types.none)
    call(code.begin, (place_of(account), seed, i, account.rules[0].limit_c), types.none)
    encode_row(numbers(account.first_raw[i]), account.low, account.scale, observation)


@inlined
def _fill_empty(account, i, out):
    """Say that environment `i` played no interval."""
    out.reward[i], out.terminated[i], out.truncated[i] = 0.0, False, False
    fill(account.terms[i], 0.0)
    fill(account.cost[i], 0.0)


@inlined
def _show_again(account, i, observation):
    """Write what was observed last [fields]: a beginning, or an interval."""
    raw = account.first_raw[i] if account.track[i].step == 0 else account.raw[i]
    encode_row(numbers(raw), account.low, account.scale, observation)


@cache
def _advance(kind: Any, call_kind: Any) -> Any:
    """What one thread does for a `Held` of a `Batch` and one of a `Call`, of these types."""

    @inner
    def advance(address, call_address):
        batch, now = held(address, kind), held(call_address, call_kind)
        out, account, n = now.out, batch.account, now.todo.shape[0]
        first = take(now.taken, _AT_ONCE)
        while first < n:
            for i in range(first, min(n, first + _AT_ONCE)):
                _ask_ahead(batch, i)
                begins = now.todo[i] == _BEGIN
                if now.todo[i] == _PLAY:
                    _play(batch, i, out)
                    begins = batch.autoreset > 0 and (out.terminated[i] or out.truncated[i])
                    if begins:
                        copy_row(out.final_observation[i], out.observation[i])
                        batch.episodes[i] += np.uint64(1)
                elif begins:
                    _fill_empty(account, i, out)
                else:
                    _show_again(account, i, out.observation[i])
                if begins:
                    _begin(batch, i, out.observation[i])
            first = take(now.taken, _AT_ONCE)

    return advance


@parallel
def _advance_all(advance, threads, address, call_address):
    """Run `advance`, the address of such a function, on so many threads."""
    # Nothing but a call: what is in a parallel loop takes twice as long to compile.
    for _ in numba.prange(threads):
        call(advance, (address, call_address), types.none)


@jit
def _advance_alone(advance, address, call_address):
    call(advance, (address, call_address), types.none)


def _state_of(problem: Problem, n: int) -> BatchState:
    scenario, n_devices = problem.scenario, len(problem.scenario.devices)
    seconds, notice = scenario.episode_s + 1, int(rules_of(problem)[0]["notice"])
    return BatchState(
        seeds=np.zeros(n, np.uint64),
        episodes=np.zeros(n, np.uint64),
        arrivals=np.zeros((n, 2, round(seconds / SLOT_S) + 1), np.int32),
        shift=np.zeros((n, seconds), np.int64),
        announced=np.zeros((n, len(ANNOUNCED), scenario.steps + notice + 1)),
        drift_c=np.zeros((n, seconds, n_devices)),
        devices=np.zeros((n, n_devices), DEVICE_DTYPE),
        track=np.zeros(n, TRACK_DTYPE),
    )


def _interval_of(problem: Problem, n: int, bins: int) -> Interval:
    n_devices, slots = len(problem.scenario.devices), round(problem.scenario.interval_s / SLOT_S)
    return Interval(
        levels=np.zeros(n, INDEX_DTYPE),
        knobs=np.zeros(n, VALUE_DTYPE),
        work=np.zeros(n, WORK_DTYPE),
        gpu=np.zeros(n, GPU_DTYPE),
        raw=np.zeros(n, RAW_DTYPE),
        histogram=np.zeros((n, bins), np.int64),
        slot_energy=np.zeros((n, slots, n_devices)),
        clocks=np.zeros((n, n_devices)),
        terms=np.zeros((n, len(REWARD_TERMS))),
        cost=np.zeros((n, len(COST_NAMES))),
        first_gpu=np.zeros(n, GPU_DTYPE),
        first_raw=np.zeros(n, RAW_DTYPE),
    )


def _parts_of(
    problem: Problem, service: Any, servers: Any, state: BatchState, now: Interval
) -> tuple[Serving, Heating, Account]:
    """What the compiled parts of an interval find, around one service."""
    scenario, ranges = problem.scenario, ranges_of(problem)
    serving = Serving(
        service, servers, traffic_of(scenario.traffic, scenario.episode_s + 1, problem.capacity_rps),
        state.arrivals, state.shift, now.levels, now.knobs, now.clocks, now.work, now.histogram,
        now.slot_energy,
    )  # fmt: skip
    heating = Heating(
        as_record(spread_of(problem)), nominal_devices(problem), problem.inlet_offset_c, state.devices,
        state.drift_c, now.clocks, now.slot_energy, now.gpu, now.first_gpu,
    )  # fmt: skip
    account = Account(
        rules_of(problem), prices_of(problem), problem.quality_floor, ranges.low, ranges.scale,
        np.array(problem.knobs.default_index, np.int64),
        announced_terms(scenario), state.announced, now.levels,
        state.track, now.work, now.gpu, now.raw, now.terms, now.cost, now.first_gpu, now.first_raw,
    )  # fmt: skip
    return serving, heating, account


def _code(serving: Serving, heating: Heating, account: Account) -> Code:
    """Where the functions are that play one environment; compiled at the first of its kind."""
    here = [Held(part) for part in (serving, heating, account)]
    of_serving, of_heating, of_account = (part.address for part in here)
    start, serve = serving_rows(here[0].kind)
    cool, heat = heating_rows(here[1].kind)
    begin, settle = account_rows(here[2].kind)
    seed = np.uint64(0)
    return Code(
        address_of(start, of_serving, seed, 0),
        address_of(cool, of_heating, seed, 0),
        address_of(begin, of_account, seed, 0, 0.0),
        address_of(serve, of_serving, 0, 0, 0, 0.0),
        address_of(heat, of_heating, 0, 0),
        address_of(settle, of_account, 0, 0.0),
    )


class TwinBatch:
    """`num_envs` twin environments.

    Copies (`copy.deepcopy`, pickle) continue bit for bit and share nothing that changes. After `step` the
    attributes `work`, `gpu`, `raw` (structured, [n]), `terms` [n, 6], `cost` [n, 3], `histogram` [n, bins],
    `slot_energy` [n, slots, D], `index` [n, knobs] hold the interval just played, also where an episode
    ended. Where one was begun by `reset`, or by `step` in place of an interval, `terms` and `cost` are 0.
    """

    def __init__(
        self,
        problem: Problem,
        num_envs: int,
        *,
        latencies: bool = False,
        max_steps: int | None = None,
        autoreset: bool = True,
    ) -> None:
        """Build the environments; `reset` starts them.

        Args:
            problem: what to play.
            num_envs: how many at once.
            latencies: whether to record latencies in `histogram`, which costs time; it has no bins otherwise.
            max_steps: intervals after which an episode is truncated; the scenario's at most.
            autoreset: whether an end begins the next episode in the same step.

        Raises:
            ScenarioError: the problem controls a knob that its service does not read.
            ValueError: `num_envs` or `max_steps` below 1.
        """
        for name, value in (("num_envs", num_envs), ("max_steps", max_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._arguments = {"latencies": latencies, "max_steps": max_steps, "autoreset": autoreset}
        self.problem, self.num_envs = problem, num_envs
        service, n = service_of(problem), num_envs
        self.servers = service.new_state(n)
        """The service's own state."""
        self.state = _state_of(problem, n)
        self._interval = now = _interval_of(problem, n, service.histograms * HISTOGRAM_BINS * latencies)
        self.index = now.levels.view(np.int64).reshape(n, -1)
        self.work, self.gpu, self.raw = now.work, now.gpu, now.raw
        self.terms, self.cost, self.histogram = now.terms, now.cost, now.histogram
        self.slot_energy, self.devices = now.slot_energy, self.state.devices
        parts = _parts_of(problem, service.fixed, self.servers, self.state, now)
        steps = min(problem.scenario.steps, max_steps or problem.scenario.steps)
        self.whole = Batch(
            _code(*parts), *parts, self.state.seeds, self.state.episodes, problem.knobs.level_table, steps,
            int(autoreset),
        )  # fmt: skip
        """All of it, as compiled code finds it."""
        self._final = np.zeros((n, len(FIELDS)), np.float32)
        self._play, self._all = np.full(n, _PLAY), np.ones(n, np.bool_)
        self._taken = np.zeros(1, np.int64)
        self._held, self._call = Held(self.whole), Held(self._told(self._play))
        advance = _advance(self._held.kind, self._call.kind)
        self._advance_at = address_of(advance, self._held.address, self._call.address)

    def __getstate__(self) -> tuple[Any, ...]:
        """What makes the batch, and the arrays that change. What else there is follows."""
        arrays = (*self.state, *self.servers, *self._interval, self._final)
        return self.problem, self.num_envs, self._arguments, arrays

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Build the batch again and fill it."""
        problem, num_envs, arguments, arrays = state
        self.__init__(problem, num_envs, **arguments)
        mine = (*self.state, *self.servers, *self._interval, self._final)
        for array, other in zip(mine, arrays, strict=True):
            array[...] = other

    def reset(self, seeds: Sequence[int] | np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Start episode 0 of each seed.

        Args:
            seeds: one per environment; those of environments that are left alone are not read.
            mask: bool [n], which environments; all by default.

        Returns:
            The observations, float32 [n, fields]; of environments left alone: their last ones.

        Raises:
            ValueError: the number of seeds, or one that is no seed (`thermoe_env.seeding.as_seed`).
        """
        if len(seeds) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need as many seeds, got {len(seeds)}")
        mask = self._all if mask is None else mask
        self.state.seeds[mask] = [as_seed(seed) for seed, wanted in zip(seeds, mask, strict=True) if wanted]
        self.state.episodes[mask] = 0
        return self._advance(np.where(mask, _BEGIN, _LEAVE)).observation

    def reset_to_next(self, mask: np.ndarray | None = None) -> np.ndarray:
        """Start the next episode of the environments' seeds; `mask` and what is returned as in `reset`."""
        mask = self._all if mask is None else mask
        self.state.episodes[mask] += np.uint64(1)
        return self._advance(np.where(mask, _BEGIN, _LEAVE)).observation

    def fork(self, source: TwinBatch, row: int) -> None:
        """Set every environment to what environment `row` of another batch of the same problem is now."""
        mine, theirs = (
            (*batch.state, *batch.servers, batch._interval.raw, batch._interval.first_raw)
            for batch in (self, source)
        )
        for array, other in zip(mine, theirs, strict=True):
            array[:] = other[row]

    def step(self, index: np.ndarray, begin: np.ndarray | None = None) -> BatchStep:
        """Play one interval in every environment.

        Args:
            index: int64 [n, knobs], level of every knob (`KnobTable.indices`).
            begin: bool [n], environments that begin the next episode of their seed instead, at reward 0.
        """
        self.index[:] = index
        if begin is None:
            return self._advance(self._play)
        self.state.episodes[begin] += np.uint64(1)
        return self._advance(np.where(begin, _BEGIN, _PLAY))

    def _told(self, todo: np.ndarray) -> Call:
        n = self.num_envs
        out = BatchStep(
            np.empty((n, len(FIELDS)), np.float32), np.empty(n), np.empty(n, np.bool_), np.empty(n, np.bool_),
            self._final,
        )  # fmt: skip
        return Call(todo, self._taken, out)

    def _advance(self, todo: np.ndarray) -> BatchStep:
        told = self._told(todo)
        self._call.hold(told)
        self._taken[0] = 0
        threads = min(-(-self.num_envs // _AT_ONCE), numba.get_num_threads())
        addresses = self._advance_at, self._held.address, self._call.address
        if threads == 1:
            _advance_alone(*addresses)
        else:
            _advance_all(addresses[0], threads, *addresses[1:])
        return told.out
