"""Air that grows warmer: profiles over time, the device under them, and a limit that falls in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.thermoe_env.playing_loads import FULL, Load, play
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario
from thermoe_env.worlds import World, build_world

STEP = {"kind": "step", "by_c": 5.0, "at_s": 100.0}


def offsets_c(scenario: Scenario, inlet: dict[str, Any]) -> np.ndarray:
    return Problem.of(load_scenario(scenario, episode_s=60, inlet=inlet)).inlet_offset_c


def test_profiles_are_what_their_kinds_say(problem: Problem, tmp_path: Path) -> None:
    t, scenario = np.arange(61), problem.scenario
    np.testing.assert_array_equal(offsets_c(scenario, {"by_c": -3.0}), np.full(61, -3.0))
    step = {"kind": "step", "by_c": 4.0, "at_s": 20.0}
    np.testing.assert_array_equal(offsets_c(scenario, step), [0.0] * 20 + [4.0] * 41)
    ramp = {"kind": "ramp", "by_c": 6.0, "from_s": 10.0, "to_s": 22.0}
    np.testing.assert_allclose(offsets_c(scenario, ramp), 0.5 * np.clip(t - 10, 0, 12))
    back = ramp | {"back_from_s": 30.0, "back_to_s": 54.0}
    falls = 0.25 * np.clip(t - 30, 0, 24)
    np.testing.assert_allclose(offsets_c(scenario, back), 0.5 * np.clip(t - 10, 0, 12) - falls)
    trace = tmp_path / "aisle.csv"
    trace.write_text("t_s,offset_c\n10,1.0\n20,3.0\n40,-1.0\n")
    found = offsets_c(scenario, {"kind": "trace", "trace": str(trace)})
    assert [found[s] for s in (0, 10, 15, 20, 30, 40, 60)] == [1.0, 1.0, 2.0, 3.0, 1.0, -1.0, -1.0]


def test_a_trace_lies_beside_its_scenario(tmp_path: Path) -> None:
    (tmp_path / "aisle.csv").write_text("t_s,offset_c\n0,2.5\n")
    file = tmp_path / "warm.yaml"
    file.write_text("name: warm\nbase: vision\ninlet: {kind: trace, trace: aisle.csv}\n")
    scenario = load_scenario(file)
    assert scenario.inlet is not None and scenario.inlet.trace == str(tmp_path / "aisle.csv")
    np.testing.assert_array_equal(Problem.of(scenario).inlet_offset_c, 2.5)


@pytest.mark.parametrize(
    ("inlet", "message"),
    [
        ({"kind": "step", "by_c": 5.0}, r"inlet: .*'step' takes \('by_c', 'at_s'\)"),
        ({"kind": "constant", "by_c": 5.0, "at_s": 3.0}, "got .*at_s"),
        ({"kind": "ramp", "by_c": 5.0, "from_s": 9.0, "to_s": 9.0}, "from_s < to_s"),
        (
            {"kind": "ramp", "by_c": 5.0, "from_s": 1.0, "to_s": 9.0, "back_from_s": 8.0, "back_to_s": 20.0},
            "to_s <= back_from_s",
        ),
        ({"kind": "ramp", "by_c": 5.0, "from_s": 1.0, "to_s": 9.0, "back_from_s": 8.0}, "both or neither"),
        ({"kind": "constant", "by_c": 31.0}, "inlet.by_c"),
        ({"kind": "sine"}, "inlet.kind"),
        ({"kind": "trace", "trace": "nowhere.csv"}, "no traces/inlet 'nowhere.csv'"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(problem: Problem, inlet: dict, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        Problem.of(load_scenario(problem.scenario, inlet=inlet))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 lines"),
        ("seconds,offset_c\n0,1\n", "t_s,offset_c"),
        ("t_s,offset_c\n0,1\n5,warm\n", "line 3.*not two numbers"),
        ("t_s,offset_c\n0,1\n5,1,2\n", "line 3.*not two numbers"),
        ("t_s,offset_c\n5,1\n5,2\n", "line 3: t_s 5 does not rise"),
        ("t_s,offset_c\n5,nan\n", "line 2: offset_c must lie within 30"),
        ("t_s,offset_c\nnan,1\n", "line 2: t_s nan does not rise"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused_by_its_line(
    problem: Problem, tmp_path: Path, text: str, message: str
) -> None:
    trace = tmp_path / "aisle.csv"
    trace.write_text(text)
    with pytest.raises(ScenarioError, match=rf"aisle\.csv.*{message}"):
        Problem.of(load_scenario(problem.scenario, inlet={"kind": "trace", "trace": str(trace)}))


def test_a_step_of_the_inlet_moves_the_steady_die_by_exactly_the_step(calm: Scenario) -> None:
    """And memory and first readings likewise: all nodes are rises above the inlet."""
    constant = {"kind": "constant", "by_c": 5.0}
    still, stepped, warm = (
        play(load_scenario(calm, inlet=inlet), Load(lambda t: 300.0)) for inlet in (None, STEP, constant)
    )
    for name in ("temp_c", "mem_temp_c"):
        before, after, always = (played.all("reading", name) for played in (still, stepped, warm))
        np.testing.assert_array_equal(after - before, 5.0 * (np.arange(300) >= 100))
        np.testing.assert_array_equal(always - before, 5.0)
    np.testing.assert_array_equal(still.all("reading", "power_w"), stepped.all("reading", "power_w"))
    cold, hot = (
        ThermalMoEEnv(load_scenario(calm, inlet=inlet), world="twin").reset(seed=1)[1]["reading"]
        for inlet in (None, constant)
    )
    assert hot["temp_c"] - cold["temp_c"] == hot["mem_temp_c"] - cold["mem_temp_c"] == 5.0


class Metered:
    """Readings of a device whose air stays as it is, as a meter gives them."""

    simulated = False

    def __init__(self, scenario: Scenario) -> None:
        self._inner = build_world(replace(scenario, inlet=None), "twin").telemetry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("acts", [{"slowdown": {"duty": 0.5}}, {"alarm": {"drain_s": 8.0}}])
def test_where_no_air_can_be_warmed_the_limit_falls_as_far(
    calm: Scenario,
    monkeypatch: pytest.MonkeyPatch,
    acts: dict,
) -> None:
    """Margins, stages, charges and what limits do are those of a device in warmer air."""
    scenario = load_scenario(
        calm, inlet=STEP | {"at_s": 40.0}, traffic=FULL, limits={"temperature_c": 60.0, **acts}, episode_s=120
    )
    twin = play(scenario)

    def metered(scenario: Scenario, *_: Any) -> World:
        world: Any = build_world(scenario, "twin")
        return replace(world, telemetry=Metered(scenario))

    monkeypatch.setattr("thermoe_env.env.build_world", metered)
    live = play(scenario)
    fall_c = np.where(np.arange(120) >= 40, 5.0, 0.0)
    np.testing.assert_array_equal(live.all("limits", "temperature_c"), 60.0 - fall_c)
    np.testing.assert_array_equal(twin.all("limits", "temperature_c"), 60.0)
    np.testing.assert_array_equal(twin.all("reading", "temp_c") - live.all("reading", "temp_c"), fall_c)
    for keys in (
        ("stage",),
        ("limits", "why"),
        ("limits", "duty"),
        ("cost", "above_limit_s"),
        ("reward_terms", "heat"),
    ):
        np.testing.assert_array_equal(twin.all(*keys), live.all(*keys))
    np.testing.assert_array_equal(twin.seen["margin_c"], live.seen["margin_c"])
    assert live.all("limits", "why").astype(bool).any() and live.all("cost", "above_limit_s").any()
