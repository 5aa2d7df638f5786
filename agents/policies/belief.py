"""What can be known of a running service from its observations, as the state of a twin.

A twin of the calibrated device is played along with the actions in force, once under every input shift that
may hold, and set right by what is observed: the queue by its length, the shift by confidence and entropy, the
device by the observer's filter, the budget by what is announced. Requests to come are a forecast from the
loads observed. Nothing of the true future is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from agents.policies.planner import PlanConfig
from moe.service.queueing import SLOT_S
from moe.workload import KNOB_NAMES
from thermoe_env.device.observer import Observer
from thermoe_env.mdp.fields import FIELD_NAMES, ranges_of
from thermoe_env.mdp.signals import announced_terms
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Randomize
from thermoe_env.twin.core import TwinBatch

_ANNOUNCED_FIELDS = (
    ("budget_w", "budget_ahead_w", "budget_change_s"),
    ("price", "price_ahead", "price_change_s"),
    ("promised_tpot_s", "promised_tpot_ahead_s", "promised_tpot_change_s"),
)
"""What says how each of `ANNOUNCED` stands, the hardest value ahead, and when it changes."""
_SAME = 1e-3
"""Two values are the same that differ by less of themselves: observations are of single precision."""


@dataclass(frozen=True, kw_only=True)
class MpcConfig(PlanConfig):
    """How to plan, how observations are trusted, and how the load is expected to go on."""

    load_memory_s: float = 15.0
    """Time constant with which the load is expected to return to its 30 s average."""
    answer_noise: float = 0.004
    """Standard deviation of observed confidence and entropy about the profile's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.load_memory_s, self.answer_noise) <= 0.0:
            raise ValueError(
                "load_memory_s and answer_noise must be above 0, got "
                f"{self.load_memory_s} and {self.answer_noise}"
            )


def without_luck(problem: Problem) -> Problem:
    """The problem with every device as calibrated, and with the energies that its twin needs."""
    spread = Randomize(resistance=0.0, time_constant=0.0, leakage=0.0, energy=0.0, inlet_c=0.0)
    scenario = replace(problem.scenario, randomize=spread)
    return replace(problem, scenario=scenario, profile=problem.metered_profile)


def levels_in_force(problem: Problem, o: dict[str, np.ndarray]) -> np.ndarray:
    """Level of every knob in the interval that was observed, int64 [..., knobs], from decoded fields."""
    highest = [max(1, len(problem.knobs.levels[name]) - 1) for name in KNOB_NAMES]
    share = np.stack([o[f"{name}_level"] for name in KNOB_NAMES], axis=-1)
    return np.rint(share * highest).astype(np.int64)


class Belief:
    """The state of one service, followed from observation to observation from an episode's beginning on.

    Where a scenario has several devices, all are taken to be as hot as the hottest and to draw alike.
    """

    def __init__(self, problem: Problem, config: MpcConfig, first: np.ndarray) -> None:
        """Begin an episode.

        Args:
            problem: what is served, `without_luck`.
            config: trust and forecast.
            first: float32 [fields], the first observation.
        """
        self._problem, self._config, self._ranges = problem, config, ranges_of(problem)
        self._high = dict(zip(FIELD_NAMES, self._ranges.high.tolist(), strict=True))
        scenario = problem.scenario
        self._shifts = np.unique(scenario.traffic.shifts)  # [S]
        self._log_odds = np.zeros(len(self._shifts))
        self.twins = TwinBatch(problem, len(self._shifts))
        """Rows alike [S]; `agents.policies.planner` plans for any of them."""
        self.twins.reset(np.zeros(len(self._shifts), np.uint64))
        o = self._ranges.decode(first)
        self._observer = Observer(problem.twin, self._device_power_w(o), scenario.interval_s)
        self.state = self.twins.state
        self.state.arrivals[:], self.state.drift_c[:] = 0, 0.0
        self.state.devices["shutdown_c"] = np.inf  # a belief must not end the episode
        traffic = scenario.traffic
        middle = 0.5 * (traffic.low_load + traffic.high_load)
        self._expect_requests(middle, middle, traffic.interactive_share)
        self._expect_announced(o)

    def follow(self, observation: np.ndarray) -> None:
        """Take in the observation after an interval, float32 [fields]."""
        problem, state, o = self._problem, self.state, self._ranges.decode(observation)
        state.shift[:, self._second :] = self._shifts[:, None]
        load = float(o["load"])
        slots = round(problem.scenario.interval_s / SLOT_S)
        self._fill_arrivals(np.full(slots, load), float(o["interactive_share"]))
        at_limit = state.track["at_limit"].copy()
        step = self.twins.step(np.tile(levels_in_force(problem, o), (len(self._shifts), 1)))
        likeliest = self._likeliest(self._ranges.decode(step.observation), o)
        self.twins.fork(self.twins, likeliest)
        self._set_queue(o)
        self._set_device(o)
        state.track["stage"], state.track["temp_c"] = o["stage"], o["temp_c"]
        self._set_limits(o, at_limit)
        self._expect_requests(load, float(o["load_slow"]), float(o["interactive_share"]))
        self._expect_announced(o)

    @property
    def shift(self) -> int:
        """The input shift that is believed to be in force."""
        return int(self._shifts[self._log_odds.argmax()])

    @property
    def _step(self) -> int:
        return int(self.state.track["step"][0])

    @property
    def _second(self) -> int:
        return int(self._step * self._problem.scenario.interval_s)

    @property
    def _slot(self) -> int:
        return round(self._step * self._problem.scenario.interval_s / SLOT_S)

    def _device_power_w(self, o: dict[str, np.ndarray]) -> float:
        return float(o["power_w"]) / len(self._problem.scenario.devices)

    def _likeliest(self, twins: dict[str, np.ndarray], o: dict[str, np.ndarray]) -> int:
        """Weigh the shifts by how well their twins explain the answers (Bayes); the likeliest one's row."""
        prior = np.exp(self._log_odds - self._log_odds.max())
        prior /= prior.sum()
        change = self._problem.scenario.interval_s / self._problem.scenario.traffic.shift_dwell_s
        prior += min(change, 1.0) * (1.0 / len(prior) - prior)
        off = [(twins[name] - o[name]) / self._config.answer_noise for name in ("confidence", "entropy")]
        self._log_odds = np.log(prior) - 0.5 * (off[0] ** 2 + off[1] ** 2)
        return int(self._log_odds.argmax())

    def _set_queue(self, o: dict[str, np.ndarray]) -> None:
        """As many waiting as observed; at the end of the field's range what the twin has, if that is more."""
        server, arrivals = self.twins.servers.server, self.state.arrivals[0]
        for number, name in enumerate(("queue_interactive_s", "queue_deferrable_s")):
            arrived = int(arrivals[number, self._slot])
            waiting = round(float(o[name]) * self._problem.capacity_rps)
            if o[name] >= self._high[name]:
                waiting = max(waiting, arrived - int(server["next"][0, number]))
            first = max(0, arrived - waiting)
            server["next"][:, number] = first
            within = np.searchsorted(arrivals[number, : self._slot + 1], first, side="right") - 1
            server["head"][:, number] = within

    def _set_device(self, o: dict[str, np.ndarray]) -> None:
        """The device as the filter sees it. What power does not explain of die and memory stays as it is."""
        twin, devices = self._problem.twin, self.state.devices
        bare = "mem_temp_c" in twin.provenance.get(
            "missing", ()
        )  # then the field holds the die's temperature
        memory_c = math.nan if bare else float(o["mem_temp_c"])
        self._observer.update(self._device_power_w(o), float(o["temp_c"]), memory_c)
        seen = self._observer.state
        for node in ("spreader", "sink", "fan", "memory"):
            devices[f"{node}_c"] = seen[node]
        devices["inlet_c"] = twin.inlet_c + seen["inlet_offset"]
        devices["r_die_c_per_w"] = twin.r_die_c_per_w * (1.0 + seen["die_gain"])
        devices["mem_offset_c"] = twin.mem_offset_c + seen["mem_drift"]
        devices["die_c"], devices["mem_c"], devices["clock"] = (
            o["temp_c"],
            o["mem_temp_c"],
            o["sm_clock_share"],
        )
        drift = self.state.drift_c[:, self._second :]
        fading = np.exp(-np.arange(drift.shape[1]) / twin.inlet_drift_tau_s)
        drift[:] = seen["inlet_drift"] * fading[:, None]

    def _set_limits(self, o: dict[str, np.ndarray], at_limit: np.ndarray) -> None:
        """What limits that act hold down, as observed; `at_limit` [S] is of before the interval."""
        track, slowdown = self.state.track, self._problem.scenario.limits.slowdown
        interval_s, drained = self._problem.scenario.interval_s, o["duty"] == 0.0
        left_s = np.rint(o["release_s"] / interval_s) * interval_s
        track["brake_left_s"] = 0.0 if drained else left_s
        track["drain_left_s"] = left_s if drained else 0.0
        brake = self._problem.scenario.power_budget.brake
        if brake is not None:
            budget_w = self.state.announced[0, 0, int(track["step"][0]) - 1]  # of the interval before
            track["over_budget_j"] = o["overload_share"] * brake.bears_s * budget_w
        track["duty"] = 1.0 if drained else o["duty"]
        margin_c = np.round(o["margin_c"], 3)  # an observation is of single precision
        left = margin_c >= (0.0 if slowdown is None else slowdown.recover_c)
        track["at_limit"] = np.where(margin_c <= 0.0, 1.0, np.where(left, 0.0, at_limit))

    def _fill_arrivals(self, load: np.ndarray, interactive: float) -> None:
        """Let requests arrive from now on: load per slot, float [slots], and the interactive share."""
        arrivals, first = self.state.arrivals, self._slot + 1
        total = (load * self._problem.capacity_rps * SLOT_S).cumsum()
        for number, share in enumerate((interactive, 1.0 - interactive)):
            so_far = arrivals[0, number, first - 1]
            arrivals[:, number, first : first + len(load)] = so_far + np.rint(total * share)

    def _expect_requests(self, load: float, average: float, interactive: float) -> None:
        """Let the load go back to its average."""
        left = self.state.arrivals.shape[2] - 1 - self._slot
        ahead_s = (np.arange(left) + 0.5) * SLOT_S
        fading = np.exp(-ahead_s / self._config.load_memory_s)
        self._fill_arrivals(average + (load - average) * fading, interactive)

    def _expect_announced(self, o: dict[str, np.ndarray]) -> None:
        """Budget, price and promise as announced; where a change is not to a harder value, to the usual."""
        scenario, begin = self._problem.scenario, self._step
        notice = round(scenario.power_budget.notice_s / scenario.interval_s)
        usual = announced_terms(scenario)["normal"]
        for row, names in enumerate(_ANNOUNCED_FIELDS):
            now, ahead, change_s = (float(o[name]) for name in names)
            change, then = round(change_s / scenario.interval_s), now
            if abs(ahead - now) > _SAME * abs(now):
                then = ahead
            elif change < notice:
                then = usual[row]
            series = self.state.announced[:, row]
            series[:, begin : begin + change] = now
            series[:, begin + change :] = then
