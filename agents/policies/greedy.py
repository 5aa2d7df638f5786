"""Greedy: each interval the action whose next interval promises the best reward, by the profile alone.

What an action costs in a steady flow follows from the profile: how full its batches get, how long and at what
energy they run, and who is answered late. The load is that of the last seconds, the queue and the budget are
those observed; nothing is remembered and nothing planned. So it never adapts the model of its own accord: in
one interval a step only costs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moe.compiled import jit
from moe.service.batching import NEVER_S, trigger_period
from thermoe_env.device.physics import capped_power_w, clock_power_factor, idle_reference_w
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.mdp.interval import prices_of
from thermoe_env.mdp.reward import REWARD_TERMS, reward_terms
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.score import batch_cost, terms_of

_FIXED_POINT_STEPS = 12
_SEEN = (
    "rate_0", "rate_1", "queue_0", "queue_1", "oldest_0", "oldest_1", "clock", "power_w", "price",
    "over_c", "shift", "duty",
)  # fmt: skip
_SEEN_DTYPE = np.dtype([(name, np.float64) for name in _SEEN])
"""What a prediction goes by: arrivals per second, waiting requests and the oldest's age per class; clock
fraction that throttling leaves, power now, price of energy, degrees above the limit to keep, input shift, and
the duty that limits leave where requests are begun."""
_DEVICE = ("idle_w", "low_clock_w", "low_clock", "cap_w", "r_die_c_per_w", "interval_s")
_DEVICE_DTYPE = np.dtype([(name, np.float64) for name in _DEVICE])
"""All devices together: idle power at full and at the low clock, that clock's fraction, power cap."""


@dataclass(frozen=True, kw_only=True)
class GreedyConfig:
    """Margins of the prediction."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    load_margin: float = 1.0
    """Load to expect, over its 5 s average."""
    budget_margin_w: float = 0.0
    """Power to keep free of the budget."""
    heat_margin_c: float = 0.5
    """Degrees to keep free of the limit."""

    def __post_init__(self) -> None:
        if not self.load_margin > 0.0:
            raise ValueError(f"load_margin must be above 0, got {self.load_margin}")


@jit
def _share_above(first, last, limit):
    """Share of what goes evenly from `first` to `last` that lies above `limit`."""
    low, high = min(first, last), max(first, last)
    if high <= limit:
        return 0.0
    return 1.0 if low >= limit else (high - limit) / (high - low)


@jit
def _steady_batch(cost, rates, batch_size, ttt_steps, slower, terms):
    """(mean requests of a batch, time between launches) of a service that keeps up with its arrivals.

    A batch is due when it is full or someone has waited, but not before the device is free; how long it
    takes depends on how full it is, so the answer is a fixed point.
    """
    rate = rates[0] + rates[1]
    due = trigger_period(batch_size, rates, terms.max_wait_s)
    if due == NEVER_S:  # irregular: no later than this
        due = min(batch_size / rate, terms.max_wait_s[0] if rates[0] > 0.0 else terms.max_wait_s[1])
    period = due
    for _ in range(_FIXED_POINT_STEPS):
        size = min(max(1.0, rate * period), 1.0 * batch_size)
        unit = batch_cost(cost, size)
        period = max(due, (unit.latency_s + ttt_steps * unit.ttt_latency_s) * slower)
    return min(max(1.0, rate * period), 1.0 * batch_size), period


@jit
def _predict(cost, knobs, accuracy, floor, seen, device, terms, prices, reward):
    """Reward of the next interval under one action.

    Args:
        cost: float [M, 4], `Tables.cost` under the action.
        knobs: record of `VALUE_DTYPE`, the action.
        accuracy: of the answers.
        floor: least quality.
        seen: record of `_SEEN_DTYPE`.
        device: record of `_DEVICE_DTYPE`.
        terms: `Terms` of service.
        prices: `Prices`.
        reward: float [5], filled with the reward's terms.

    Returns:
        (the reward, were nothing left of what promises allow; mean power in W)
    """
    batch_size, ttt_steps = int(knobs.batch_size), int(knobs.ttt_steps)
    clock = min(seen.clock, knobs.sm_clock)
    slower = 1.0 / (clock * min(knobs.pace, seen.duty))
    rates, left_s = (seen.rate_0, seen.rate_1), device.interval_s
    rate = rates[0] + rates[1]
    latency, joules, ttt_latency, ttt_joules = batch_cost(cost, batch_size)
    period = (latency + ttt_steps * ttt_latency) * slower
    most = batch_size / period  # requests per second of full batches
    served, late, waiting_late, energy = 0.0, 0.0, 0.0, 0.0
    queue = seen.queue_0 + seen.queue_1
    if queue >= batch_size or rate >= most:
        drain_s = left_s if rate >= most else min(left_s, queue / (most - rate))
        served = min(most * drain_s, queue + rate * drain_s)
        energy = served / batch_size * (joules + ttt_steps * ttt_joules)
        # Interactive requests go first. Ages run from the oldest's to that of who came since the last launch.
        due_0, due_1 = terms.deadline_s[0] - latency / clock, terms.deadline_s[1] - latency / clock
        came_0, came_1 = seen.queue_0 + seen.rate_0 * drain_s, seen.queue_1 + seen.rate_1 * drain_s
        served_0 = min(served, came_0)
        age_0 = (came_0 - served_0) / seen.rate_0 if seen.rate_0 > 0.0 else 0.0
        late = served_0 * _share_above(seen.oldest_0, max(period, age_0), due_0)
        late += (served - served_0) * _share_above(seen.oldest_1, period, due_1)
        # Who is late already while waiting counts now: else an idle service would look best.
        waiting_late = (came_0 - served_0) * _share_above(0.0, age_0, due_0)
        left_1 = came_1 - (served - served_0)
        waiting_late += left_1 * _share_above(0.0, seen.oldest_1 + drain_s, due_1)
        left_s -= drain_s
    if left_s > 0.0 and rate > 0.0:
        size, period = _steady_batch(cost, rates, batch_size, ttt_steps, slower, terms)
        latency, joules, ttt_latency, ttt_joules = batch_cost(cost, size)
        energy += rate * left_s / size * (joules + ttt_steps * ttt_joules)
        wait = size / rate if seen.rate_0 > 0.0 else period
        late += seen.rate_0 * left_s * _share_above(0.0, wait, terms.deadline_s[0] - latency / clock)
        late += seen.rate_1 * left_s * _share_above(0.0, wait, terms.deadline_s[1] - latency / clock)
        served += rate * left_s
    dynamic_w = energy * clock_power_factor(clock) / clock / device.interval_s
    idle_w = idle_reference_w(device.idle_w, device.low_clock_w, clock, device.low_clock)
    power_w = capped_power_w(idle_w, dynamic_w, device.cap_w)
    over_c = seen.over_c + device.r_die_c_per_w * (power_w - seen.power_w)  # the die follows at once
    return reward_terms(
        prices, accuracy * (served - late), seen.price * power_w * device.interval_s, late + waiting_late,
        device.interval_s if over_c > 0.0 else 0.0, served * max(0.0, floor - accuracy), reward,
    ), power_w  # fmt: skip


@jit
def _predict_all(tables, state, knobs, index, floor, seen, device, terms, prices, reward, power_w):
    """Fill `reward` and `power_w`, [n, actions] each.

    Args: as in `_predict`; `knobs` and `index` are records of the actions [actions], `seen` [n]; `state` [S]
    is the model's under each shift.
    """
    terms_row = np.empty(len(REWARD_TERMS))
    for i in range(seen.shape[0]):
        shift = int(seen[i].shift)
        for a in range(index.shape[0]):
            experts, bias = index[a].expert_count, index[a].routing_bias
            reward[i, a], power_w[i, a] = _predict(
                tables.cost[experts, bias], knobs[a],
                tables.answer_pure[shift, state[shift], experts, bias, 0], floor[shift], seen[i], device[0],
                terms[0], prices[0], terms_row,
            )  # fmt: skip


class Greedy:
    """The best next interval. No memory."""

    def __init__(self, problem: Problem, config: GreedyConfig) -> None:
        """Take the profile's tables and all actions of the problem."""
        self._problem, self._config, self._ranges = problem, config, ranges_of(problem)
        nvec = problem.knobs.nvec.tolist()
        static = problem.knobs.action()
        ranges = [
            (int(static[c]),) if name == "ttt_steps" else range(nvec[c])
            for c, name in enumerate(problem.knobs.controlled)
        ]
        self.actions = np.array(list(itertools.product(*ranges)), np.int64)  # [actions, controlled]
        self._index, self._values = problem.knobs.records(
            problem.knobs.indices(self.actions, "multi_discrete")
        )
        self._tables = problem.tables
        self._terms, self._prices = terms_of(problem), prices_of(problem)
        devices, twin = len(problem.scenario.devices), problem.twin
        self._device = np.array(
            [
                (
                    devices * twin.idle_power_w, devices * twin.low_clock_power_w,
                    twin.low_clock_mhz / twin.max_clock_mhz, devices * twin.power_cap_w,
                    twin.r_die_c_per_w / devices, problem.scenario.interval_s,
                )
            ],
            _DEVICE_DTYPE,
        )  # fmt: skip
        shifts = np.arange(len(problem.profile.shifts))
        self._state = shifts + 1 if problem.scenario.static.ttt_steps else 0 * shifts  # of the model

    def predicted(self, observation: np.ndarray) -> np.ndarray:
        """Reward of the next interval under each of `actions`, float [n, actions]."""
        observed = self._ranges.decode(observation)
        seen, problem = self._seen(observed), self._problem
        reward, power_w = np.empty((2, len(seen), len(self._index)))
        _predict_all(
            self._tables, self._state, self._values, self._index, problem.quality_floor, seen,
            self._device, self._terms, self._prices, reward, power_w,
        )  # fmt: skip
        brake = problem.scenario.power_budget.brake
        if brake is not None:  # what its hold takes from a service that earns what its load is worth
            load = observed["load_fast"][:, None]
            budget_w = observed["budget_w"][:, None] - self._config.budget_margin_w
            bears_j = brake.bears_s * budget_w
            over_j = (power_w - budget_w) * problem.scenario.interval_s
            engages = over_j > bears_j * (1.0 - observed["overload_share"][:, None])
            reward -= engages * (observed["duty"][:, None] == 1.0) * (1.0 - brake.duty) * brake.hold_s * load
        return reward

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions by prediction; see `Policy.predict`."""
        return self.actions[self.predicted(observation).argmax(axis=1)], state

    def _seen(self, o: dict[str, np.ndarray]) -> np.ndarray:
        """Observed values as `_SEEN_DTYPE` [n]."""
        problem, config = self._problem, self._config
        seen = np.zeros(len(o["load"]), _SEEN_DTYPE)
        begun = o["duty"] > 0.0  # else the node drains
        rate = o["load_fast"] * config.load_margin * problem.capacity_rps
        seen["duty"] = np.where(begun, o["duty"], 1.0)
        seen["rate_0"] = np.where(begun, rate * o["interactive_share"], 0.0)
        seen["rate_1"] = np.where(begun, rate * (1.0 - o["interactive_share"]), 0.0)
        seen["queue_0"] = np.where(begun, o["queue_interactive_s"] * problem.capacity_rps, 0.0)
        seen["queue_1"] = np.where(begun, o["queue_deferrable_s"] * problem.capacity_rps, 0.0)
        seen["oldest_0"], seen["oldest_1"] = o["oldest_interactive_s"], o["oldest_deferrable_s"]
        seen["clock"], seen["power_w"] = o["sm_clock_share"], o["power_w"]
        seen["price"] = o["price"]
        seen["over_c"] = config.heat_margin_c - o["margin_c"]
        seen["shift"] = self._likeliest_shift(o)
        return seen

    def _likeliest_shift(self, o: dict[str, np.ndarray]) -> np.ndarray:
        """Input shift whose measured confidence and entropy are nearest to the observed ones, int [n]."""
        knobs, shifts = self._problem.knobs, np.array(self._problem.scenario.traffic.shifts)
        level = {}
        for name in ("expert_count", "routing_bias"):
            highest = max(1, len(knobs.levels[name]) - 1)
            level[name] = np.rint(o[f"{name}_level"] * highest).astype(np.int64)  # [n]
        measured = self._tables.answer_pure[
            shifts[:, None], self._state[shifts][:, None], level["expert_count"], level["routing_bias"]
        ]  # [shifts, n, 3]
        off = np.abs(measured[..., 1] - o["confidence"]) + np.abs(measured[..., 2] - o["entropy"])
        return shifts[off.argmin(axis=0)]
