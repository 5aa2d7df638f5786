"""Limits that act: when they hold, for how long, and what they leave, against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.thermoe_env.playing_loads import FULL, Load, play
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario


def budget(watts: float, **brake: float) -> dict[str, Any]:
    """The same power all the time, with a brake."""
    return {"normal_w": watts, "event_w": [watts, watts], "brake": brake}


BEARS_S = 0.2 * 2.0
"""Joules above the budget, over the budget, that a brake with a grace of 2 s bears."""


@pytest.mark.parametrize("interval_s", [1.0, 0.5])
@pytest.mark.parametrize("excess_w", [60.0, 224.0])
def test_the_brake_engages_when_it_has_borne_enough_holds_its_time_and_counts_anew(
    calm: Scenario, interval_s: float, excess_w: float
) -> None:
    """A load above the budget from second 5 on brakes in a period of what is borne and the hold."""
    hold_s, duty, idle_w = 6.0, 0.3, Problem.of(calm).twin.idle_power_w
    limits = {"grace_s": 2.0, "duty": duty, "hold_s": hold_s}
    scenario = load_scenario(calm, episode_s=60, interval_s=interval_s, power_budget=budget(500.0, **limits))
    t = np.arange(scenario.steps) * interval_s
    dynamic_w = np.where(t >= 5.0, 500.0 + excess_w - idle_w, 300.0)
    played = play(scenario, Load(lambda now: 500.0 + excess_w - idle_w if now >= 5.0 else 300.0))
    free_s = interval_s * (1.0 + np.floor(BEARS_S * 500.0 / (excess_w * interval_s)))
    into = np.where(t >= 5.0, (t - 5.0) % (free_s + hold_s), 0.0)
    braked = into >= free_s
    np.testing.assert_allclose(
        played.all("reading", "power_w"), idle_w + np.where(braked, duty, 1.0) * dynamic_w, rtol=1e-12
    )
    assert (played.all("limits", "why") == np.where(braked, "brake", "")).all()
    np.testing.assert_array_equal(played.all("limits", "duty"), np.where(braked, duty, 1.0))
    assert (played.all("knobs", "pace") == 1.0).all()  # those asked for
    np.testing.assert_allclose(played.seen["duty"][:-1], np.where(braked, duty, 1.0)[1:], atol=1e-6)
    left_s = np.where(braked, free_s + hold_s - into, 0.0)
    np.testing.assert_allclose(played.seen["release_s"][:-1], left_s[1:], atol=1e-5)
    borne_j = np.where((t >= 5.0) & ~braked, excess_w * into, 0.0)
    np.testing.assert_allclose(played.seen["overload_share"][:-1], borne_j[1:] / (BEARS_S * 500.0), atol=1e-6)


@pytest.mark.parametrize(("below_w", "brakes"), [(400.0, False), (460.0, True)])
def test_power_below_the_budget_makes_up_for_power_above_and_no_more(
    calm: Scenario, below_w: float, brakes: bool
) -> None:
    """Twice 40 W above, once below: what is not made up for adds up to a brake, however often it is below."""
    idle_w = Problem.of(calm).twin.idle_power_w
    scenario = load_scenario(calm, episode_s=60, power_budget=budget(500.0, grace_s=2.0))
    played = play(scenario, Load(lambda t: (below_w if t % 3.0 == 2.0 else 540.0) - idle_w))
    assert played.all("limits", "why").astype(bool).any() == brakes


def test_a_full_service_under_the_brake_draws_its_share_of_what_it_drew(calm: Scenario) -> None:
    """The twin's own service: idle + duty * dynamic, but for the batch that runs when the brake engages."""
    brake = {"grace_s": 16.0, "duty": 0.4, "hold_s": 20.0}
    scenario = load_scenario(calm, episode_s=60, traffic=FULL, power_budget=budget(300.0, **brake))
    played = play(scenario)
    power_w, busy_s = played.all("reading", "power_w"), played.all("work", "busy_s")
    braked = played.all("limits", "why") == "brake"
    first = int(np.argmax((power_w - 300.0).cumsum() > 0.2 * 16.0 * 300.0))
    assert np.flatnonzero(np.diff(braked.astype(int)) == 1)[0] == first
    assert np.flatnonzero(np.diff(braked.astype(int)) == -1)[0] == first + 20
    idle_w = Problem.of(calm).twin.idle_power_w
    settled = braked[:-1] & braked[1:]
    full_w = power_w[1 : first + 1].mean() - idle_w
    assert power_w[1:][settled].mean() - idle_w == pytest.approx(0.4 * full_w, rel=0.01)
    assert busy_s[1:][settled].mean() == pytest.approx(0.4, rel=0.01)


def phases(marks: np.ndarray) -> int:
    """How often a series of readings passes from -1 to 1; what lies between them is left out."""
    ends = marks[marks != 0]
    return int((np.diff(ends, prepend=-1) == 2).sum())


def test_a_slowdown_is_entered_and_left_once_per_crossing(calm: Scenario) -> None:
    """Two heavy phases, each too hot at full duty and inside the hysteresis at the duty that is left."""
    limits = {"temperature_c": 65.0, "slowdown": {"duty": 0.85, "recover_c": 6.0}}
    scenario = load_scenario(calm, episode_s=360, limits=limits)
    played = play(scenario, Load(lambda t: 500.0 if t % 180.0 < 120.0 else 0.0))
    temp_c, held = played.all("reading", "temp_c"), played.all("limits", "why") == "slowdown"
    change = np.diff(held.astype(int))
    entered, left = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    assert len(entered) == len(left) == 2
    for phase, (begin, end) in enumerate(zip(entered, left, strict=True)):
        assert temp_c[begin] >= 65.0 > temp_c[180 * phase : begin].max()
        assert end >= 180 * phase + 120 and temp_c[end] <= 59.0 < temp_c[begin:end].min()
    np.testing.assert_array_equal(played.all("limits", "duty"), np.where(held, 0.85, 1.0))


@pytest.mark.parametrize("seed", range(3))
def test_a_service_slows_down_as_often_as_its_die_crosses_the_band(problem: Problem, seed: int) -> None:
    limits = {"temperature_c": 52.0, "slowdown": {"duty": 0.4, "recover_c": 4.0}}
    played = play(load_scenario(problem.scenario, limits=limits, traffic=FULL), seed=seed, random=True)
    temp_c = played.all("reading", "temp_c")[:-1]  # the last one holds in no interval
    marks = np.where(temp_c >= 52.0, 1, np.where(temp_c <= 48.0, -1, 0))
    held = played.all("limits", "why") == "slowdown"
    assert (np.diff(held.astype(int)) == 1).sum() == phases(marks) > 3


def test_an_alarm_drains_for_its_time_and_loses_no_request(problem: Problem) -> None:
    scenario = load_scenario(
        problem.scenario,
        episode_s=120,
        traffic=FULL,
        limits={"temperature_c": 52.0, "alarm": {"drain_s": 20.0}},
        service={"expire_after_s": [2.0, 70.0]},
    )
    played = play(scenario)
    drained = played.all("limits", "why") == "alarm"
    change = np.diff(drained.astype(int))
    begins, ends = np.flatnonzero(change == 1) + 1, np.flatnonzero(change == -1) + 1
    assert len(ends) >= 2
    assert (ends - begins[: len(ends)] == 20).all()
    assert (played.all("reading", "temp_c")[begins - 1] >= 52.0).all()
    arrived, answered, expired, waiting = (
        played.all("work", name) for name in ("arrived", "answered", "expired", "waiting")
    )
    assert not answered[drained].any() and answered[ends].sum(axis=1).all()
    assert played.all("work", "busy_s")[begins + 1].max() == 0.0  # what ran has ended
    assert expired[drained].sum() > 0.0
    np.testing.assert_array_equal(arrived, answered + expired + np.diff(waiting, axis=0, prepend=0.0))
    np.testing.assert_array_equal(played.all("limits", "duty"), np.where(drained, 0.0, 1.0))
    np.testing.assert_allclose(
        played.seen["release_s"][begins[0] - 1 : begins[0] + 20], np.arange(20.0, -1.0, -1.0), atol=1e-4
    )


def test_a_node_that_stays_hot_drains_once_until_it_has_been_below_the_limit(calm: Scenario) -> None:
    """What runs goes on for 100 s, through the drain and above the limit; then it cools and heats again."""
    limits = {"temperature_c": 50.0, "alarm": {"drain_s": 15.0}}
    scenario = load_scenario(calm, episode_s=200, limits=limits)
    played = play(scenario, Load(lambda t: 0.0 if 100.0 <= t < 120.0 else 500.0, goes_on=True))
    drained, hot = played.all("limits", "why") == "alarm", played.all("reading", "temp_c") >= 50.0
    crossings = np.flatnonzero(np.diff(hot.astype(int), prepend=0) == 1)
    assert len(crossings) == 2 and hot[crossings[0] : 100].all()
    expected = np.zeros(200, bool)
    for crossing in crossings:
        expected[crossing + 1 : crossing + 16] = True
    np.testing.assert_array_equal(drained, expected)


def test_without_the_sections_nothing_ever_holds(problem: Problem) -> None:
    """Over budget and above the limit, as before."""
    scenario = load_scenario(problem.scenario, limits={"temperature_c": 45.0}, traffic=FULL)
    played = play(scenario)
    assert played.all("cost", "above_limit_s").any() and played.all("cost", "over_budget_j").any()
    assert (played.all("limits", "duty") == 1.0).all() and not played.all("limits", "why").astype(bool).any()
    np.testing.assert_array_equal(played.seen["duty"], 1.0)
    np.testing.assert_array_equal(played.seen["release_s"], 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"power_budget": {"event_w": [100.0, 340.0], "brake": {}}}, r"100 W .*draw 123\.76 W when idle"),
        (
            {"power_budget": {"event_w": [230.0, 340.0], "brake": {}}, "devices": "two"},
            r"230 W .*draw 247\.52 W when idle",
        ),
        ({"limits": {"temperature_c": 34.0, "slowdown": {"recover_c": 3.0}}}, "temperature_c 34 less"),
        ({"limits": {"temperature_c": 31.0, "alarm": {}}}, "must lie above the inlet.*31.222"),
        (
            {"limits": {"temperature_c": 45.0}, "inlet": {"kind": "step", "by_c": 20.0, "at_s": 9.0}},
            r"inlet, which comes to 51\.222",
        ),
        ({"limits": {"slowdown": {}, "alarm": {}}}, "exclude each other"),
        ({"power_budget": {"brake": {"duty": 0.0}}}, r"power_budget\.brake\.duty"),
        ({"limits": {"slowdown": {"duty": 1.5}}}, r"limits\.slowdown\.duty"),
        ({"limits": {"alarm": {"drain": 1.0}}}, r"limits\.alarm\.drain.*known keys: \['drain_s'\]"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_by_name(
    problem: Problem, overrides: dict[str, Any], message: str
) -> None:
    if overrides.get("devices") == "two":
        overrides = overrides | {"devices": [{"experts": list(range(8))}, {"experts": []}]}
    with pytest.raises(ValueError, match=message) as refused:
        Problem.of(load_scenario(problem.scenario, **overrides))
    assert type(refused.value).__name__ == "ScenarioError"


def test_a_low_limit_or_budget_that_is_only_priced_is_still_played(problem: Problem) -> None:
    Problem.of(
        load_scenario(problem.scenario, limits={"temperature_c": 20.0}, power_budget={"normal_w": 50.0})
    )
