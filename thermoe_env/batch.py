"""The batched core: many twin environments advanced by one compiled call.

Every environment runs the same scalar functions as the single one (`serve`, `heat`, `settle`,
`encode_row`), so results depend neither on the number of environments nor on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from moe.queueing import SLOT_S
from thermoe_env.fields import FIELDS, RAW_DTYPE, encode_row
from thermoe_env.interval import COST_NAMES, TRACK_DTYPE, begin, knob_level, prices_of, rules_of, settle
from thermoe_env.knobs import KNOB_NAMES
from thermoe_env.problem import Problem
from thermoe_env.profiled import (
    HISTOGRAM_BINS,
    SERVER_DTYPE,
    WORK_DTYPE,
    KnobLevels,
    draw_episode_stream,
    serve,
    start_server,
    terms_of,
)
from thermoe_env.reward import REWARD_TERMS
from thermoe_env.seeding import episode_seed
from thermoe_env.signals import draw_power_budget
from thermoe_env.twin import DEVICE_DTYPE, GPU_DTYPE, heat, idle_reading, start_device


@numba.njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _step_all(
    tables, service, rules, prices, levels, index, level_share, arrivals, shift, budget, drift, next_request,
    head_slot, server, weights, device, track, work, gpu, raw, raw_rows, histogram, slot_energy, terms, cost,
    observation, reward, tripped,
):  # fmt: skip
    """One interval of every environment."""
    for i in numba.prange(index.shape[0]):
        knobs = KnobLevels(
            index[i, 0], int(levels[1, index[i, 1]]), index[i, 2], int(levels[3, index[i, 3]]),
            levels[4, index[i, 4]], levels[5, index[i, 5]],
        )  # fmt: skip
        second = int(server[i].time_s + 1e-9)
        serve(
            tables, service, arrivals[i], shift[i, second], next_request[i], head_slot[i], server[i],
            weights[i], knobs, device[i].clock, track[i].stage < rules.deferrable_below, work[i],
            histogram[i], slot_energy[i],
        )  # fmt: skip
        tripped[i] = heat(device[i], slot_energy[i], drift[i, second], gpu[i])
        reward[i] = settle(
            rules, prices, track[i], work[i], gpu[i], budget[i], knobs.ttt_steps, level_share[i], raw[i],
            terms[i], cost[i],
        )  # fmt: skip
        encode_row(raw_rows[i], observation[i])


@dataclass(frozen=True)
class BatchStep:
    """What one step of all environments returned. Arrays are the core's own: copy to keep."""

    observation: np.ndarray
    """float32 [n, fields]; of a finished environment: the first of its next episode."""
    reward: np.ndarray
    """float64 [n]."""
    terminated: np.ndarray
    """bool [n]: the device shut itself down."""
    truncated: np.ndarray
    """bool [n]: the episode's time is over."""
    final_observation: np.ndarray
    """float32 [n, fields]: the last one of the episode where one ended, else as `observation`."""


class TwinBatch:
    """`num_envs` twin environments with same-step autoreset.

    After `step` the attributes `work`, `gpu`, `raw` (structured, [n]), `terms` [n, 6], `cost` [n, 3],
    `histogram` [n, bins], `index` [n, knobs] hold the interval just played, also where an episode ended.
    """

    def __init__(self, problem: Problem, num_envs: int) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.problem, self.num_envs = problem, num_envs
        scenario, n = problem.scenario, num_envs
        self._tables, self._service = problem.tables, terms_of(problem)
        self._rules, self._prices = rules_of(problem), prices_of(problem)
        self._levels = np.zeros((len(KNOB_NAMES), max(len(v) for v in problem.knobs.levels.values())))
        for row, name in enumerate(KNOB_NAMES):
            self._levels[row, : len(problem.knobs.levels[name])] = problem.knobs.levels[name]
        seconds = scenario.episode_s + 1
        slots = round(scenario.interval_s / SLOT_S)
        self._arrivals = np.zeros((n, 2, round(seconds / SLOT_S) + 1), np.int32)
        self._shift = np.zeros((n, seconds), np.int64)
        self._drift = np.zeros((n, seconds))
        self._budget = np.zeros((n, scenario.steps + self._rules.notice + 1))
        self._next_request = np.zeros((n, 2), np.int64)
        self._head_slot = np.zeros((n, 2), np.int64)
        self._server = np.zeros(n, SERVER_DTYPE)
        self._weights = np.zeros((n, len(problem.profile.shifts) + 1))
        self.device = np.zeros(n, DEVICE_DTYPE)
        self._track = np.zeros(n, TRACK_DTYPE)
        self._slot_energy = np.zeros((n, slots))
        self.work = np.zeros(n, WORK_DTYPE)
        self.gpu = np.zeros(n, GPU_DTYPE)
        self.raw = np.zeros(n, RAW_DTYPE)
        self.histogram = np.zeros((n, HISTOGRAM_BINS), np.int64)
        self.terms = np.zeros((n, len(REWARD_TERMS)))
        self.cost = np.zeros((n, len(COST_NAMES)))
        self.index = np.tile(np.array(problem.knobs.default_index, np.int64), (n, 1))
        self._observation = np.zeros((n, len(FIELDS)), np.float32)
        self._reward = np.zeros(n)
        self._tripped = np.zeros(n, np.bool_)
        self._seeds = np.zeros(n, np.int64)
        self._episodes = np.zeros(n, np.int64)
        self._default_level = knob_level(problem, np.array(problem.knobs.default_index))

    def reset(self, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
        """Start episode 0 of each seed; returns the observations, float32 [n, fields]."""
        if len(seeds) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need as many seeds, got {len(seeds)}")
        self._seeds[:] = seeds
        self._episodes[:] = 0
        for i in range(self.num_envs):
            self._start(i)
        return self._observation.copy()

    def step(self, index: np.ndarray) -> BatchStep:
        """Play one interval in every environment.

        Args:
            index: int64 [n, knobs], level of every knob (`KnobTable.indices`).
        """
        self.index[:] = index
        for array in (self.work, self.histogram, self._slot_energy):
            array.view(np.uint8)[:] = 0
        _step_all(
            self._tables, self._service, self._rules, self._prices, self._levels, self.index,
            knob_level(self.problem, self.index), self._arrivals, self._shift, self._budget, self._drift,
            self._next_request, self._head_slot, self._server, self._weights, self.device, self._track,
            self.work, self.gpu, self.raw, self.raw.view(np.float64).reshape(self.num_envs, -1),
            self.histogram, self._slot_energy, self.terms, self.cost, self._observation, self._reward,
            self._tripped,
        )  # fmt: skip
        terminated = self._tripped.copy()
        truncated = (self._track["step"] >= self.problem.scenario.steps) & ~terminated
        final = self._observation.copy()
        for i in np.flatnonzero(terminated | truncated):
            self._episodes[i] += 1
            self._start(int(i))
        return BatchStep(self._observation.copy(), self._reward.copy(), terminated, truncated, final)

    def _start(self, i: int) -> None:
        """Begin the next episode of environment `i` and write its first observation."""
        problem, seed = self.problem, episode_seed(int(self._seeds[i]), int(self._episodes[i]))
        stream = draw_episode_stream(problem, seed)
        self._arrivals[i], self._shift[i] = stream.arrivals, stream.shift_id
        self._drift[i] = start_device(problem, seed, self.device[i])
        scenario = problem.scenario
        self._budget[i] = draw_power_budget(scenario.power_budget, seed, scenario.steps, scenario.interval_s)
        self._next_request[i] = self._head_slot[i] = 0
        start_server(self._server[i], self._weights[i])
        gpu, raw = np.zeros(1, GPU_DTYPE), np.zeros(1, RAW_DTYPE)
        idle_reading(self.device[i], gpu[0])
        self._track[i] = np.zeros((), TRACK_DTYPE)
        begin(self._rules, self._track[i], gpu[0], self._budget[i], self._default_level, raw[0])
        encode_row(raw.view(np.float64), self._observation[i])
