"""The batched core: many twin environments advanced by one compiled call.

Every environment runs the same scalar functions as the single one (`fill_stream`, `start_devices`, `serve`,
`heat_devices`, `settle`, `encode_row`, ...), so results depend neither on the number of environments nor on
threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from moe.compiled import copy_row, fill, jit
from moe.randomness import derive
from moe.service.queueing import SLOT_S
from moe.service.traffic import fill_stream, traffic_of
from moe.workload import KNOB_NAMES
from thermoe_env.mdp.fields import FIELDS, RAW_DTYPE, encode_row
from thermoe_env.mdp.interval import COST_NAMES, TRACK_DTYPE, begin, prices_of, rules_of, settle
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import budget_terms, fill_power_budget
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.heat import (
    DEVICE_DTYPE,
    GPU_DTYPE,
    heat_devices,
    nominal_devices,
    slowest_clock,
    spread_of,
    start_devices,
)
from thermoe_env.twin.score import (
    HISTOGRAM_BINS,
    SERVER_DTYPE,
    WORK_DTYPE,
    serve,
    start_service,
    terms_of,
)

# Threads of GNU OpenMP spin while they wait for each other, which costs most of the speed wherever another
# process wants the cores as well. It reads this when numba starts its threads; the user's own choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_EXPERT_COUNT, _ROUTING_BIAS = KNOB_NAMES.index("expert_count"), KNOB_NAMES.index("routing_bias")


@jit
def _start(
    rules, traffic, budget, spread, nominal, default_index, fresh_purse, seed, arrivals, shift, budget_w,
    drift_c, weights, purse, server, devices, track, track_row, gpu, raw, raw_row, observation,
):  # fmt: skip
    """Begin the episode of `seed` in one environment and write its first observation.

    Arguments are rows of the arrays of `TwinBatch`.
    """
    fill_stream(traffic, seed, arrivals, shift)
    fill_power_budget(budget, seed, budget_w)
    start_service(weights, purse, fresh_purse, server)
    start_devices(spread, seed, nominal, devices, drift_c, gpu)
    fill(track_row, 0.0)
    fill(raw_row, 0.0)
    begin(rules[0], track, gpu, budget_w, default_index, raw)
    encode_row(raw_row, observation)


@numba.njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _advance_all(
    begin_all, tables, device_share, terms, levels, prices, quality_floor, steps,  # the service
    rules, traffic, budget, spread, nominal, default_index, fresh_purse,  # what is drawn from
    seeds, episodes, arrivals, shift, budget_w, drift_c, weights, purse, server, devices, track, track_rows,
    first_gpu, first_raw, first_raw_rows,  # the state
    index, work, gpu, raw, raw_rows, histogram, slot_energy, reward_terms, cost,  # the interval
    observation, final, reward, terminated, truncated,  # the result
):  # fmt: skip
    """One interval of every environment, and the next episode's beginning where one ended.

    With `begin_all` no interval is played: all begin the episode that is set for them.
    """
    for i in numba.prange(index.shape[0]):
        ended = begin_all
        if not begin_all:
            second = int(track[i].step * rules[0].interval_s)
            own = devices[i]
            fill(histogram[i], 0)
            serve(
                tables, terms[0], levels, index[i], arrivals[i], shift[i, second],
                slowest_clock(own),
                track[i].stage < rules[0].deferrable_below, weights[i], purse[i], server[i], work[i],
                histogram[i], slot_energy[i],
            )  # fmt: skip
            terminated[i] = heat_devices(
                own, device_share[index[i, _EXPERT_COUNT], index[i, _ROUTING_BIAS]], slot_energy[i],
                work[i].sm_clock, drift_c[i, second], gpu[i],
            )  # fmt: skip
            reward[i] = settle(
                rules[0], prices[0], quality_floor, track[i], work[i], gpu[i], budget_w[i], index[i], raw[i],
                reward_terms[i], cost[i],
            )  # fmt: skip
            encode_row(raw_rows[i], observation[i])
            truncated[i] = not terminated[i] and track[i].step >= steps
            ended = terminated[i] or truncated[i]
            if ended:
                copy_row(final[i], observation[i])
                episodes[i] += np.uint64(1)
        if ended:
            _start(
                rules, traffic, budget, spread, nominal, default_index, fresh_purse,
                derive(seeds[i], episodes[i]), arrivals[i], shift[i], budget_w[i], drift_c[i], weights[i],
                purse[i], server[i], devices[i], track[i], track_rows[i], first_gpu[i],
                first_raw[i], first_raw_rows[i], observation[i],
            )  # fmt: skip


def _with_rows(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Records of float64 fields [n], and the same memory as [n, fields]."""
    return records, records.view(np.float64).reshape(len(records), -1)


@dataclass(frozen=True)
class BatchStep:
    """What one step of all environments returned. The arrays are the caller's, `final_observation` aside."""

    observation: np.ndarray
    """float32 [n, fields]; of a finished environment: the first of its next episode."""
    reward: np.ndarray
    """float64 [n]."""
    terminated: np.ndarray
    """bool [n]: a device shut itself down."""
    truncated: np.ndarray
    """bool [n]: the episode's time is over."""
    final_observation: np.ndarray
    """float32 [n, fields], the core's own: in a finished environment's row, the last one of its episode;
    the other rows mean nothing."""


class BatchState(NamedTuple):
    """What environments [n] are between two intervals. Rows of arrays that a twin may be forked from."""

    seeds: np.ndarray
    """uint64 [n]."""
    episodes: np.ndarray
    """uint64 [n]: number of the episode of the seed."""
    arrivals: np.ndarray
    """int32 [n, 2, slots + 1], as in `moe.service.traffic.RequestStream`."""
    shift: np.ndarray
    """int64 [n, seconds]: input shift in force."""
    budget_w: np.ndarray
    """float64 [n, steps + notice + 1]."""
    drift_c: np.ndarray
    """float64 [n, seconds]: offset of the inlet."""
    weights: np.ndarray
    """float64 [n, shifts + 1]: the adaptation."""
    purse: np.ndarray
    """float64 [n, ...]: what it may spend, see `moe.service.budget`."""
    server: np.ndarray
    """Records of `SERVER_DTYPE` [n]."""
    devices: np.ndarray
    """Records of `DEVICE_DTYPE` [n, D]."""
    track: np.ndarray
    """Records of `TRACK_DTYPE` [n]."""
    track_rows: np.ndarray
    """Their memory, float64 [n, fields]."""
    first_gpu: np.ndarray
    """Records of `GPU_DTYPE` [n]: first reading of the episode."""
    first_raw: np.ndarray
    """Records of `RAW_DTYPE` [n]: its first observation."""
    first_raw_rows: np.ndarray
    """Their memory, float64 [n, fields]."""


class TwinBatch:
    """`num_envs` twin environments with same-step autoreset.

    After `step` the attributes `work`, `gpu`, `raw` (structured, [n]), `terms` [n, 6], `cost` [n, 3],
    `histogram` [n, bins], `index` [n, knobs] hold the interval just played, also where an episode ended.
    """

    def __init__(
        self, problem: Problem, num_envs: int, *, latencies: bool = False, max_steps: int | None = None
    ) -> None:
        """Build the environments; `reset` starts them.

        Args:
            problem: what to play.
            num_envs: how many at once.
            latencies: whether to record latencies in `histogram`, which costs time; it has no bins otherwise.
            max_steps: intervals after which an episode is truncated; the scenario's at most.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.problem, self.num_envs = problem, num_envs
        scenario, n, rules = problem.scenario, num_envs, rules_of(problem)
        notice = int(rules[0]["notice"])
        seconds = scenario.episode_s + 1
        terms = terms_of(problem)
        self._service = (
            problem.tables,
            problem.device_share,
            terms,
            problem.knobs.level_table,
            prices_of(problem),
            problem.quality_floor,
        )
        self._steps = min(scenario.steps, max_steps or scenario.steps)
        self._draws = (
            rules,
            traffic_of(scenario.traffic, seconds, problem.capacity_rps),
            budget_terms(scenario.power_budget, scenario.interval_s),
            spread_of(problem),
            nominal_devices(problem),
            np.array(problem.knobs.default_index, np.int64),
            problem.purse,
        )
        self.devices = np.zeros((n, len(scenario.devices)), DEVICE_DTYPE)
        """Records of `DEVICE_DTYPE`, [n, D]."""
        self._seeds, self._episodes = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        self.state = BatchState(
            self._seeds,
            self._episodes,
            np.zeros((n, 2, round(seconds / SLOT_S) + 1), np.int32),  # arrivals
            np.zeros((n, seconds), np.int64),  # shift
            np.zeros((n, scenario.steps + notice + 1)),  # budget
            np.zeros((n, seconds)),  # drift of the inlet
            np.zeros((n, len(problem.profile.shifts) + 1)),  # adaptation
            np.zeros((n, len(problem.purse))),  # what it may spend
            np.zeros(n, SERVER_DTYPE),
            self.devices,
            *_with_rows(np.zeros(n, TRACK_DTYPE)),
            np.zeros(n, GPU_DTYPE),  # at an episode's beginning
            *_with_rows(np.zeros(n, RAW_DTYPE)),  # likewise
        )
        self.index = np.zeros((n, len(KNOB_NAMES)), np.int64)
        self.work, self.gpu, self.raw = (
            np.zeros(n, WORK_DTYPE),
            np.zeros(n, GPU_DTYPE),
            np.zeros(n, RAW_DTYPE),
        )
        self.histogram = np.zeros((n, HISTOGRAM_BINS if latencies else 0), np.int64)
        self.terms, self.cost = np.zeros((n, len(REWARD_TERMS))), np.zeros((n, len(COST_NAMES)))
        self._slot_energy = np.zeros((n, int(terms[0]["slots"])))
        self._final = np.zeros((n, len(FIELDS)), np.float32)

    def reset(self, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
        """Start episode 0 of each seed; returns the observations, float32 [n, fields]."""
        if len(seeds) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need as many seeds, got {len(seeds)}")
        self._seeds[:] = seeds
        self._episodes[:] = 0
        return self._advance(begin_all=True).observation

    def reset_to_next(self) -> np.ndarray:
        """Start the next episode of every environment's seed; returns the observations."""
        self._episodes += np.uint64(1)
        return self._advance(begin_all=True).observation

    def fork(self, source: BatchState, row: int) -> None:
        """Set every environment to what environment `row` of another batch of the same problem is now."""
        for mine, theirs in zip(self.state, source, strict=True):
            mine[:] = theirs[row]

    def step(self, index: np.ndarray) -> BatchStep:
        """Play one interval in every environment.

        Args:
            index: int64 [n, knobs], level of every knob (`KnobTable.indices`).
        """
        self.index[:] = index
        return self._advance(begin_all=False)

    def _advance(self, begin_all: bool) -> BatchStep:
        n = self.num_envs
        observation = np.empty((n, len(FIELDS)), np.float32)
        reward, terminated, truncated = np.empty(n), np.empty(n, np.bool_), np.empty(n, np.bool_)
        _advance_all(
            begin_all, *self._service, self._steps, *self._draws, *self.state, self.index, self.work,
            self.gpu, *_with_rows(self.raw), self.histogram, self._slot_energy, self.terms, self.cost,
            observation, self._final, reward, terminated, truncated,
        )  # fmt: skip
        return BatchStep(observation, reward, terminated, truncated, self._final)
