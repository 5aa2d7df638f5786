"""What holds in every episode of the twin, whatever the scenario: laws that need none of its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np

import thermoe_env  # noqa: F401  (registers)
from moe.service.queueing import SLOT_S
from thermoe_env.device.physics import MIN_CLOCK
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import observation_space, ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario

MOST_STEPS = 200
"""A longer episode is played up to here."""
SIGMAS = 10.0
ROUNDING = 1e-9
HALF_DEGREE_C = 0.5
"""Sensors say whole degrees."""


class Episode(NamedTuple):
    """What an environment said."""

    problem: Problem
    observations: np.ndarray
    """[steps + 1, fields], the first at reset."""
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: list[dict[str, Any]]

    @property
    def scenario(self) -> Scenario:
        """What was played."""
        return self.problem.scenario

    def all(self, section: str, name: str) -> np.ndarray:
        """[steps, ...] of one number of `info`."""
        return np.array([info[section][name] for info in self.infos])


def play(overrides: dict[str, Any], seed: int = 0) -> Episode:
    """Play the default scenario with overrides and random actions."""
    env = gymnasium.make("ThermalMoETwin-v0", scenario="vision", overrides=overrides)
    env.action_space.seed(seed)
    plain = env.unwrapped
    assert isinstance(plain, ThermalMoEEnv)
    observation, _ = env.reset(seed=seed)
    observations, steps, ended = [observation], [], False
    while not ended and len(steps) < MOST_STEPS:
        observation, *step = env.step(env.action_space.sample())
        observations.append(observation)
        steps.append(step)
        ended = step[1] or step[2]
    env.close()
    rewards, terminated, truncated, infos = zip(*steps, strict=True)
    return Episode(
        plain.problem, np.array(observations), np.array(rewards), np.array(terminated), np.array(truncated),
        list(infos),
    )  # fmt: skip


class Reach(NamedTuple):
    """(lowest, highest) that a device of a problem can come to."""

    power_w: tuple[float, float]
    die_c: tuple[float, float]
    memory_c: tuple[float, float]


def reach(problem: Problem) -> Reach:
    """Extremes of the device that randomising makes of the calibration, never idle below its lowest clock's
    power, never busy above its cap but for idle power that its own heat raises."""
    twin, spread = problem.twin, problem.scenario.randomize
    offsets_c = [device.inlet_offset_c for device in problem.scenario.devices]
    drift_c = twin.inlet_drift_c + max(device.drift_c for device in problem.scenario.devices)
    wander_c = spread.inlet_c + 6.0 * drift_c
    inlet = problem.scenario.inlet
    warmer_c = 0.0 if inlet is None or inlet.by_c is None else inlet.by_c
    cold_c, hot_c = (
        twin.inlet_c + min(offsets_c) + min(0.0, warmer_c) - wander_c,
        twin.inlet_c + max(offsets_c) + max(0.0, warmer_c) + wander_c,
    )
    grown = 1.0 + spread.resistance
    rise = grown * (twin.r_die_c_per_w + twin.r_spreader_c_per_w + twin.r_sink_c_per_w)
    memory_rise = twin.r_stack_c_per_w + grown * (twin.r_mem_c_per_w + twin.r_sink_c_per_w)
    least_leak, most_leak = (twin.leakage_per_c * (1.0 + sign * spread.leakage) for sign in (-1.0, 1.0))
    # Idle power p = idle * (1 + leak * (hot + rise * p - reference)), solved for p.
    warmed_w = twin.idle_power_w * (1.0 + most_leak * (hot_c - twin.idle_reference_c))
    most_w = max(twin.power_cap_w, warmed_w / (1.0 - twin.idle_power_w * most_leak * rise))
    blown_c = grown * twin.r_fan_c_per_w * most_w  # fans that still turn after the heat is gone
    cooler_c = twin.idle_reference_c - (cold_c + blown_c)
    least_w = twin.low_clock_power_w * (1.0 - (most_leak if cooler_c > 0.0 else least_leak) * cooler_c)
    return Reach(
        (least_w, most_w),
        (cold_c + blown_c, hot_c + rise * most_w),
        (cold_c + blown_c + twin.mem_offset_c, hot_c + memory_rise * most_w + twin.mem_offset_c),
    )


def _within(values: np.ndarray, ends: tuple[float, float], slack: float = 0.0) -> bool:
    low, high = ends
    slack += ROUNDING * max(abs(low), abs(high))
    return bool(np.all((low - slack <= values) & (values <= high + slack)))


def all_numbers_are_finite(e: Episode) -> bool:
    """Rewards, and `info` in every section."""
    sections = [info[name] for info in e.infos for name in ("work", "reading", "reward_terms", "cost")]
    numbers = [e.rewards, *(value for section in sections for value in section.values())]
    return all(np.all(np.isfinite(value)) for value in numbers)


def observations_lie_in_the_space(e: Episode) -> bool:
    """Scaled from ranges that are ranges."""
    space, ranges = observation_space(), ranges_of(e.problem)
    return all(space.contains(o) for o in e.observations) and bool(
        np.all(np.isfinite(ranges.low) & (ranges.scale > 0.0) & np.isfinite(ranges.scale))
    )


def it_ends_when_its_time_is_over(e: Episode) -> bool:
    """Or with the device; never otherwise."""
    elapsed_s = np.arange(1, len(e.infos) + 1) * e.scenario.interval_s
    over = elapsed_s >= e.scenario.episode_s
    whole = bool(e.terminated[-1]) or bool(over[-1]) or len(e.infos) == MOST_STEPS
    return whole and np.array_equal(e.truncated, over & ~e.terminated)


def only_heat_shuts_the_device_down(e: Episode) -> bool:
    """A die above its shutdown temperature ends the episode, and nothing else does."""
    twin = e.problem.twin
    shut = e.all("reading", "temp_c") > twin.shutdown_c + HALF_DEGREE_C
    can = reach(e.problem).die_c[1] >= twin.shutdown_c
    named = np.array([bool(info["reason"]) for info in e.infos])
    return bool(np.all(e.terminated[shut]) and np.all(named == e.terminated) and (can or not named.any()))


def energy_is_power_that_the_devices_can_draw(e: Episode) -> bool:
    """Between idle at the lowest clock and the cap, of all devices."""
    low_w, high_w = (len(e.scenario.devices) * end_w for end_w in reach(e.problem).power_w)
    power_w, energy_j = e.all("reading", "power_w"), e.all("reading", "energy_j")
    return (
        0.0 < low_w
        and _within(power_w, (low_w, high_w))
        and np.allclose(energy_j, power_w * e.scenario.interval_s)
    )


def temperatures_are_what_power_can_reach(e: Episode) -> bool:
    """From the inlet up, by what the resistances make of the most power; the hottest above the mean."""
    extremes, hottest_c = reach(e.problem), e.all("reading", "temp_c")
    mean_c, spread_c = e.all("reading", "temp_mean_c"), e.all("reading", "temp_spread_c")
    return (
        _within(hottest_c, extremes.die_c, HALF_DEGREE_C)
        and _within(e.all("reading", "mem_temp_c"), extremes.memory_c, HALF_DEGREE_C)
        and bool(np.all((hottest_c - spread_c <= mean_c + ROUNDING) & (mean_c <= hottest_c + ROUNDING)))
    )


def the_clock_is_the_card_s(e: Episode) -> bool:
    """And is held down for no longer than there is time."""
    most_mhz, interval_s = e.problem.twin.max_clock_mhz, e.scenario.interval_s
    held = (e.all("reading", name) for name in ("power_capped_s", "thermal_throttle_s"))
    return _within(e.all("reading", "sm_clock_mhz"), (MIN_CLOCK * most_mhz, most_mhz)) and all(
        _within(seconds, (0.0, interval_s)) for seconds in held
    )


def no_request_is_lost(e: Episode) -> bool:
    """Arrived = answered + expired + what the queue has grown by, whole and per class."""
    arrived, answered, expired, waiting = (
        e.all("work", name) for name in ("arrived", "answered", "expired", "waiting")
    )
    counts = np.stack([arrived, answered, expired, waiting])
    grown = np.diff(waiting, axis=0, prepend=0.0)
    whole = bool(np.all((counts >= 0.0) & (counts == np.floor(counts))))
    return whole and np.array_equal(arrived, answered + expired + grown)


def as_many_arrive_as_the_load_says(e: Episode) -> bool:
    """Per class, between the least and the most load all the time; of a trace neither is known."""
    traffic, seconds = e.scenario.traffic, len(e.infos) * e.scenario.interval_s
    if traffic.kind == "trace":
        return True
    for c, share in enumerate((traffic.interactive_share, 1.0 - traffic.interactive_share)):
        least, most = (
            load * e.problem.capacity_rps * share * seconds for load in (traffic.low_load, traffic.high_load)
        )
        chance = SIGMAS * np.sqrt(most) + SIGMAS
        if not _within(e.all("work", "arrived")[:, c].sum(), (least, most), chance):
            return False
    return True


def answers_are_counted_once(e: Episode) -> bool:
    """In the histogram of latencies, and at most once as late, as correct and as good."""
    answered, late = e.all("work", "answered"), e.all("work", "late")
    seen = np.array([info["latency_histogram"].sum() for info in e.infos])
    total, slack = answered.sum(axis=1), 1.0 + ROUNDING
    return (
        np.array_equal(seen, total)
        and bool(np.all((0.0 <= late) & (late <= answered)))
        and bool(np.all(e.all("work", "correct") <= total * slack))
        and bool(np.all(e.all("work", "good") <= (answered - late).sum(axis=1) * slack))
    )


def every_layer_routes_every_answer(e: Episode) -> bool:
    """Tokens of a layer's experts are the answers times the experts per token."""
    routed = np.array([info["tokens_per_expert"].sum(axis=1) for info in e.infos])  # [steps, layers]
    wanted = e.all("work", "answered").sum(axis=1) * e.all("knobs", "expert_count")
    return np.allclose(routed, wanted[:, None])


def nobody_waits_past_expiry(e: Episode) -> bool:
    """The oldest waits since before now, and for no longer than its class may, looked at once per slot."""
    oldest_s, waiting = e.all("work", "oldest_s"), e.all("work", "waiting")
    most_s = np.array(e.scenario.service.expire_after_s) + SLOT_S
    return bool(np.all((0.0 <= oldest_s) & (oldest_s <= most_s)) and not np.any(oldest_s[waiting == 0.0]))


def shares_are_shares(e: Episode) -> bool:
    """And busy time is no longer than time, adapting no longer than busy."""
    busy_s, adapting_s = e.all("work", "busy_s"), e.all("work", "ttt_busy_s")
    names = ("batch_fill", "confidence", "entropy", "budget_share")
    return (
        all(_within(e.all("work", name), (0.0, 1.0)) for name in names)
        and bool(np.all((0.0 <= adapting_s) & (adapting_s <= busy_s + ROUNDING)))
        and bool(np.all(np.isin(e.all("work", "shift_id"), e.scenario.traffic.shifts)))
    )


def budgets_are_the_normal_one_or_an_event_s(e: Episode) -> bool:
    """In every interval."""
    budget_w, terms = np.array([info["budget_w"] for info in e.infos]), e.scenario.power_budget
    low_w, high_w = terms.event_w
    return bool(np.all((budget_w == terms.normal_w) | ((low_w <= budget_w) & (budget_w <= high_w))))


def rewards_and_costs_add_up(e: Episode) -> bool:
    """The reward from its terms; the costs from what was read, and none is negative."""
    terms = np.array([list(info["reward_terms"].values()) for info in e.infos])
    budget_w = np.array([info["budget_w"] for info in e.infos])
    hot = e.all("reading", "temp_c") > e.scenario.limits.temperature_c
    missed = (e.all("work", "late") + e.all("work", "expired")).sum(axis=1)
    over_j = np.maximum(0.0, e.all("reading", "power_w") - budget_w) * e.scenario.interval_s
    costs = {"above_limit_s": hot * e.scenario.interval_s, "missed": missed, "over_budget_j": over_j}
    return np.allclose(e.rewards, terms.sum(axis=1), atol=1e-6 * np.abs(terms).max()) and all(
        np.allclose(e.all("cost", name), wanted) for name, wanted in costs.items()
    )


LAWS: tuple[Callable[[Episode], bool], ...] = (
    all_numbers_are_finite,
    observations_lie_in_the_space,
    it_ends_when_its_time_is_over,
    only_heat_shuts_the_device_down,
    energy_is_power_that_the_devices_can_draw,
    temperatures_are_what_power_can_reach,
    the_clock_is_the_card_s,
    no_request_is_lost,
    as_many_arrive_as_the_load_says,
    answers_are_counted_once,
    every_layer_routes_every_answer,
    nobody_waits_past_expiry,
    shares_are_shares,
    budgets_are_the_normal_one_or_an_event_s,
    rewards_and_costs_add_up,
)


def broken(episode: Episode) -> list[str]:
    """Names of the laws that an episode breaks; the others say nothing of what is no number."""
    if not all_numbers_are_finite(episode):
        return [all_numbers_are_finite.__name__]
    return [law.__name__ for law in LAWS if not law(episode)]
