"""The batched core: many twin environments advanced by one compiled call, around any compiled service.

Every environment runs the same scalar functions as the single one (`fill_stream`, `start_devices`, `serve`,
`heat_devices`, `settle`, `encode_row`, ...), so results depend neither on the number of environments nor on
threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from moe.compiled import address_of, call, copy_row, fill, inner, parallel, prefetch, uncounted
from moe.randomness import derive
from moe.service.queueing import SLOT_S
from moe.service.traffic import fill_stream, traffic_of
from moe.workload import WORK_DTYPE
from thermoe_env.mdp.fields import FIELDS, RAW_DTYPE, encode_row, ranges_of
from thermoe_env.mdp.interval import (
    COST_NAMES,
    TRACK_DTYPE,
    as_record,
    begin,
    fill_levels,
    prices_of,
    rules_of,
    settle,
)
from thermoe_env.mdp.limits import open_classes
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import budget_terms, fill_power_budget
from thermoe_env.problem.knobs import INDEX_DTYPE, VALUE_DTYPE, fill_values
from thermoe_env.problem.problem import Problem
from thermoe_env.seeding import as_seed
from thermoe_env.twin.heat import (
    DEVICE_DTYPE,
    GPU_DTYPE,
    fill_clocks,
    heat_devices,
    nominal_devices,
    spread_of,
    start_devices,
)
from thermoe_env.twin.records import BatchState, BatchStep, Fixed, Interval
from thermoe_env.twin.service import HISTOGRAM_BINS, serve, start
from thermoe_env.twin.services import service_of

# Threads of GNU OpenMP spin while they wait for each other, which costs most of the speed wherever another
# process wants the cores as well. It reads this when numba starts its threads; the user's own choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_PLAY, _BEGIN, _LEAVE = range(3)
"""What a call does with an environment: one interval, the beginning of an episode, nothing."""


@inner
def _begin(fixed, traffic, service, state, servers, now, i, observation):
    """Begin the episode that is set for environment `i`, and write its first observation [fields]."""
    rules, seed = fixed.rules[0], derive(state.seeds[i], state.episodes[i])
    gpu, raw, raw_row = now.first_gpu[i], now.first_raw[i], now.first_raw_rows[i]
    fill_stream(traffic, seed, state.arrivals[i], state.shift[i])
    fill_power_budget(fixed.budget[0], seed, state.budget_w[i])
    start(service, seed, servers, i)
    start_devices(
        fixed.spread[0], seed, fixed.nominal, fixed.inlet_offset_c, state.devices[i], state.drift_c[i], gpu
    )
    fill(now.track_rows[i], 0.0)
    fill(raw_row, 0.0)
    begin(rules, rules.limit_c, state.track[i], gpu, state.budget_w[i], raw)
    fill_levels(rules, fixed.default_index, raw_row)
    encode_row(raw_row, fixed.low, fixed.scale, observation)


@inner
def _advance_rows(todo, autoreset, fixed, traffic, service, state, servers, now, step, first, end):
    """`_advance_all` for the environments from `first` up to `end`."""
    fixed, traffic, service, state, servers = uncounted((fixed, traffic, service, state, servers))
    now, step = uncounted((now, step))
    rules, prices, floor, level_table, low, scale = fixed[:6]
    arrivals, shift, budget_w, drift_c, all_devices, track = state[2:]
    index, index_rows, knobs, knob_rows, work, work_rows, gpu, raw, raw_rows = now[:9]
    histogram, slot_energy, clocks, terms, cost = now[9:14]
    observation, reward, terminated, truncated, final_observation = step
    slots = slot_energy.shape[1]
    near = index_rows, knob_rows, work_rows, gpu, raw_rows, slot_energy, terms, cost, all_devices, track
    for i in range(first, end):
        if i + 2 < end:
            prefetch(near, i + 2)
            prefetch(servers, i + 2)
        if i + 1 < end:  # of what was drawn at the episode's beginning: the interval's
            number = int(track[i + 1].step)
            prefetch((arrivals[i + 1, 0], arrivals[i + 1, 1]), number * slots)
            prefetch((shift[i + 1],), int(number * rules[0].interval_s))
            prefetch((drift_c[i + 1], budget_w[i + 1]), number + 1)
            prefetch((budget_w[i + 1],), number + 1 + rules[0].notice)
        begins = todo[i] == _BEGIN
        if todo[i] == _PLAY:
            levels, devices, number = index[i], all_devices[i], int(track[i].step)
            second = int(number * rules[0].interval_s)
            fill_values(level_table, index_rows[i], knob_rows[i])
            knobs[i].pace = min(knobs[i].pace, track[i].duty)
            fill(work_rows[i], 0.0)
            fill(histogram[i], 0)
            fill_clocks(devices, knobs[i].sm_clock, clocks[i])
            serve(
                service, knobs[i], levels, arrivals[i], number * slots, shift[i, second], clocks[i],
                open_classes(rules[0], track[i]), servers, i, work[i], histogram[i], slot_energy[i],
            )  # fmt: skip
            terminated[i] = heat_devices(devices, slot_energy[i], clocks[i], drift_c[i, second], gpu[i])
            reward[i] = settle(
                rules[0], prices[0], floor, rules[0].limit_c, track[i], work[i], gpu[i], budget_w[i],
                levels.ttt_steps > 0, raw[i], terms[i], cost[i],
            )  # fmt: skip
            fill_levels(rules[0], index_rows[i], raw_rows[i])
            encode_row(raw_rows[i], low, scale, observation[i])
            truncated[i] = not terminated[i] and track[i].step >= fixed.steps
            begins = autoreset and (terminated[i] or truncated[i])
            if begins:
                copy_row(final_observation[i], observation[i])
                state.episodes[i] += np.uint64(1)
        elif begins:
            reward[i], terminated[i], truncated[i] = 0.0, False, False
            fill(terms[i], 0.0)
            fill(cost[i], 0.0)
        else:  # what was observed last: a beginning, or an interval
            last = now.first_raw_rows[i] if track[i].step == 0 else raw_rows[i]
            encode_row(last, low, scale, observation[i])
        if begins:
            _begin(fixed, traffic, service, state, servers, now, i, observation[i])


@parallel
def _advance_all(advance_rows, threads, todo, autoreset, fixed, traffic, service, state, servers, now, step):
    """What `todo` [n] says of every environment; with `autoreset` the next episode begins where one ended.

    `advance_rows` is the address of `_advance_rows`.
    """
    n = now.levels.shape[0]
    # One call per thread, since a call counts references to every array of its tuples. And nothing but a
    # call: a parallel loop of numba loses what is written to attributes of tuples.
    for t in numba.prange(threads):
        call(
            advance_rows,
            (todo, autoreset, fixed, traffic, service, state, servers, now, step, n * t // threads,
             n * (t + 1) // threads),
        )  # fmt: skip


def _with_rows(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Records [n] of fields of one type, and the same memory as [n, fields]."""
    base = np.int64 if records.dtype == INDEX_DTYPE else np.float64
    return records, records.view(base).reshape(len(records), -1)


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
        self.problem, self.num_envs, self._autoreset = problem, num_envs, autoreset
        scenario, n, rules = problem.scenario, num_envs, rules_of(problem)
        n_devices = len(scenario.devices)
        service, ranges = service_of(problem), ranges_of(problem)
        seconds = scenario.episode_s + 1
        slots = round(scenario.interval_s / SLOT_S)
        self._fixed = Fixed(
            rules,
            prices_of(problem),
            problem.quality_floor,
            problem.knobs.level_table,
            ranges.low,
            ranges.scale,
            np.array(problem.knobs.default_index, np.int64),
            as_record(budget_terms(scenario.power_budget, scenario.interval_s)),
            as_record(spread_of(problem)),
            nominal_devices(problem),
            min(scenario.steps, max_steps or scenario.steps),
            problem.inlet_offset_c,
        )
        self._traffic = traffic_of(scenario.traffic, seconds, problem.capacity_rps)
        self._service = service.fixed
        self.servers = service.new_state(n)
        """The service's own state."""
        self.state = BatchState(
            np.zeros(n, np.uint64),  # seeds
            np.zeros(n, np.uint64),  # episodes
            np.zeros((n, 2, round(seconds / SLOT_S) + 1), np.int32),  # arrivals
            np.zeros((n, seconds), np.int64),  # shift
            np.zeros((n, scenario.steps + int(rules[0]["notice"]) + 1)),  # budget
            np.zeros((n, seconds, n_devices)),  # drift of the inlets
            np.zeros((n, n_devices), DEVICE_DTYPE),
            np.zeros(n, TRACK_DTYPE),
        )
        self._interval = Interval(
            *_with_rows(np.zeros(n, INDEX_DTYPE)),
            *_with_rows(np.zeros(n, VALUE_DTYPE)),
            *_with_rows(np.zeros(n, WORK_DTYPE)),
            np.zeros(n, GPU_DTYPE),
            *_with_rows(np.zeros(n, RAW_DTYPE)),
            np.zeros((n, service.histograms * HISTOGRAM_BINS if latencies else 0), np.int64),
            np.zeros((n, slots, n_devices)),
            np.zeros((n, n_devices)),  # clocks
            np.zeros((n, len(REWARD_TERMS))),
            np.zeros((n, len(COST_NAMES))),
            np.zeros(n, GPU_DTYPE),
            *_with_rows(np.zeros(n, RAW_DTYPE)),
            _with_rows(self.state.track)[1],
        )
        now = self._interval
        self.index, self.work, self.gpu, self.raw = now.index_rows, now.work, now.gpu, now.raw
        self.terms, self.cost, self.histogram = now.terms, now.cost, now.histogram
        self.slot_energy, self.devices = now.slot_energy, self.state.devices
        self._final = np.zeros((n, len(FIELDS)), np.float32)
        self._play = np.full(n, _PLAY)
        self._all = np.ones(n, np.bool_)
        self._advance_rows = 0

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

    def _advance(self, todo: np.ndarray) -> BatchStep:
        n = self.num_envs
        step = BatchStep(
            np.empty((n, len(FIELDS)), np.float32), np.empty(n), np.empty(n, np.bool_), np.empty(n, np.bool_),
            self._final,
        )  # fmt: skip
        arguments = (
            todo, self._autoreset, self._fixed, self._traffic, self._service, self.state, self.servers,
            self._interval, step,
        )  # fmt: skip
        if self._advance_rows == 0:
            self._advance_rows = address_of(_advance_rows, *arguments, 0, n)
        _advance_all(self._advance_rows, min(n, numba.get_num_threads()), *arguments)
        return step
