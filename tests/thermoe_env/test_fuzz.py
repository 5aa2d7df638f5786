"""Whatever a scenario or a calibration says ends in an error that names the key, or in a sound episode."""

from __future__ import annotations

import copy
import math
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import settings

from tests.thermoe_env.playing import Outcome, Player
from tests.thermoe_env.soundness import LAWS, Episode, broken, play
from thermoe_env.configs import configs_dir, merged, validated
from thermoe_env.device.parameters import TwinParams
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.announced import PriceEvents, StrictHours
from thermoe_env.problem.inlet import InletConfig
from thermoe_env.problem.limits import Alarm, PowerBrake, Slowdown
from thermoe_env.problem.scenario import (
    ExchangeConfig,
    GenerateConfig,
    Scenario,
    StepBudgetConfig,
    load_scenario,
)

NASTY = (
    math.nan, math.inf, -math.inf, 0, 0.0, -0.0, -1, -1.5, 1, 2, 1e-300, 5e-324, 1e300, 1e-12, 1e6, 2**31,
    10**30, 10**400, True, False, None, "", "1", "nan", "\0", "x" * 5000, "../..", [], [1], [0, 0],
    [math.nan, 1.0], [1e-300, 1e-300], [1e-300, 1e300], [3, 2, 1, 0], [[1]], ["a"], [None], {}, {"a": 1},
    {"a": {"b": math.nan}}, {1: 2},
    {"a": [[math.nan] * 5]}, {"a": [[-1.0] * 5]},
)  # fmt: skip
WORDS = (
    "poisson", "bursts", "diurnal", "trace", "azure-conv-2023", "vision", "language", "h100", "h100-vision",
    "h100-language", "constant", "step", "ramp", "tent", "eata", "norms", "router", "batch_size", "sm_clock",
)  # fmt: skip
Key = tuple[str, ...]
Case = dict[Key, Any]


def keys_of(kind: Any, at: Key = ()) -> Iterator[Key]:
    """Every key of a dataclass and of the sections in it, sections included."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        for field in fields(kind):
            yield (*at, field.name)
            yield from keys_of(hints[field.name], (*at, field.name))
    else:
        for inner in get_args(kind):
            yield from keys_of(inner, at)


DEFAULTS = asdict(load_scenario("vision", episode_s=20))
DEFAULTS["adaptation"]["budget"] = asdict(StepBudgetConfig())
DEFAULTS["generate"] = asdict(
    GenerateConfig(lengths="azure-conv-2023", strict=StrictHours(tpot_s=(0.001, 0.002)))
)
DEFAULTS["price"] = asdict(PriceEvents(times=(0.5, 2.0)))
DEFAULTS["exchange"] = asdict(ExchangeConfig())
DEFAULTS["power_budget"]["brake"] = asdict(PowerBrake())
DEFAULTS["limits"] |= {"slowdown": asdict(Slowdown()), "alarm": asdict(Alarm())}
DEFAULTS["inlet"] = asdict(
    InletConfig(kind="ramp", by_c=6.0, from_s=2.0, to_s=8.0, back_from_s=9.0, back_to_s=15.0)
)
DEFAULTS["inlet"] |= {"at_s": 5.0, "trace": "trace"}
DEFAULTS["devices"] = {**DEFAULTS["devices"][0], "experts": tuple(range(8))}
KEYS = tuple(dict.fromkeys(keys_of(Scenario)))
TWIN = yaml.safe_load((configs_dir() / "twin" / "h100.yaml").read_text())
TWIN |= {"loads": {name: rows[:1] for name, rows in TWIN["loads"].items()}, "provenance": {}}  # quick to read
TWIN_KEYS = tuple((field.name,) for field in fields(TwinParams))


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None))
    if isinstance(value, str):
        return rng.choice(WORDS)
    if isinstance(value, int):
        return max(0, value + rng.choice((-2, -1, 1, 2, 100)))
    if isinstance(value, float):
        return value * rng.choice((0.01, 0.5, 0.9, 1.1, 2.0, 10.0)) or rng.random()
    if isinstance(value, dict):
        return {name: near(inner, rng) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [near(inner, rng) for inner in value] + rng.choice(([], [], [*value[:1]]))
    return value


def cases(keys: tuple[Key, ...], defaults: dict[str, Any], count: int) -> list[Case]:
    """Values for one to three keys each; every key takes its turn. The same in every run, but for
    `--hypothesis-profile=search`."""
    rng = random.Random(0 if settings().derandomize else secrets.randbits(64))
    made = []
    for number in range(count):
        chosen = [keys[number % len(keys)], *rng.sample(keys, rng.choice((0, 0, 1, 2)))]
        case = {}
        for key in chosen:
            nasty = rng.random() < 0.4
            case[key] = rng.choice(NASTY) if nasty else near(reduce(getitem, key, defaults), rng)
        made.append(case)
    return made


CASES = cases(KEYS, DEFAULTS, 1000)
TWIN_CASES = cases(TWIN_KEYS, TWIN, 200)


def overrides_of(case: Case) -> dict[str, Any]:
    """A short default scenario with the values of a case."""
    overrides: dict[str, Any] = {"episode_s": DEFAULTS["episode_s"]}
    for key, value in case.items():
        for name in reversed(key):
            value = {name: value}
        overrides = merged(overrides, value)
    if any(key[0] == "devices" and len(key) > 1 for key in case):
        overrides["devices"] = [overrides["devices"]]
    return overrides


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    player = Player()
    yield player
    player.close()


def judge(found: list[Outcome], cases: list[Case]) -> None:
    """Fail with the first case that is neither sound nor refused by the name of one of its keys."""
    for case, (kind, text) in zip(cases, found, strict=True):
        assert kind in ("sound", "refused"), f"{kind}: {case}: {text}"
        named = any(re.search(rf"\b{re.escape(key[-1])}\b", text) for key in case)
        assert kind == "sound" or named, f"refused, but no key is named: {case}: {text}"
    assert 0.1 < sum(kind == "sound" for kind, _ in found) / len(found) < 0.9


PARTS = range(0, len(CASES), 200)
"""Each takes every key in its turn, twice."""


@pytest.mark.parametrize("first", [*PARTS[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in PARTS[2:])])
def test_any_scenario_is_refused_by_the_key_s_name_or_plays_soundly(first: int, player: Player) -> None:
    some = CASES[first : first + 200]
    judge([player.outcome(overrides_of(case)) for case in some], some)


def test_any_calibration_is_refused_by_the_key_s_name_or_plays_soundly(
    tmp_path: Path, player: Player
) -> None:
    found = []
    for number, case in enumerate(TWIN_CASES):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({**TWIN, **{key[0]: value for key, value in case.items()}}))
        found.append(player.outcome({"twin": str(path), "episode_s": DEFAULTS["episode_s"]}))
    judge(found, TWIN_CASES)


def test_every_key_is_reached() -> None:
    assert {key for case in CASES for key in case} == set(KEYS) >= {(f.name,) for f in fields(Scenario)}
    assert {
        ("traffic", "dwell_s"),
        ("devices", "experts"),
        ("exchange", "latency_s"),
        ("adaptation", "budget", "window_s"),
    } <= set(KEYS)
    assert {key for case in TWIN_CASES for key in case} == set(TWIN_KEYS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, -(10**400)])
def test_no_number_is_without_a_range(value: float) -> None:
    def spoilt(default: Any) -> Any:
        """With every number replaced; None where there is none."""
        if isinstance(default, (list, tuple)):
            return [*map(spoilt, default)] if spoilt(default[0]) is not None else None
        return value if isinstance(default, (int, float)) and not isinstance(default, bool) else None

    numbers = {key: spoilt(reduce(getitem, key, DEFAULTS)) for key in KEYS}
    twin_numbers = {key: spoilt(TWIN[key[0]]) for key in TWIN_KEYS}
    assert sum(value is not None for value in (*numbers.values(), *twin_numbers.values())) > 70
    for key, bad in numbers.items():
        if bad is not None:
            with pytest.raises(ScenarioError, match=re.escape(key[-1])):
                load_scenario(**overrides_of({key: bad}))
    for (key,), bad in twin_numbers.items():
        if bad is not None:
            with pytest.raises(ScenarioError, match=re.escape(key)):
                validated(TwinParams, {**TWIN, key: bad}, "a twin")


def section(name: str, **values: Any) -> Callable[[Episode], Any]:
    """Spoils an episode: other values in a section of the third step's `info`."""
    return lambda e: e.infos[2][name].update(values)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return play({"episode_s": 10})


@pytest.mark.parametrize(
    ("law", "spoil"),
    [
        ("all_numbers_are_finite", section("cost", missed=math.nan)),
        ("all_numbers_are_finite", lambda e: e.rewards.__setitem__(0, math.inf)),
        ("all_numbers_are_finite", section("work", oldest_s=(0.0, math.inf))),
        ("observations_lie_in_the_space", lambda e: e.observations.__setitem__((3, 5), 1.5)),
        ("observations_lie_in_the_space", lambda e: e.observations.__setitem__((0, 0), math.nan)),
        ("it_ends_when_its_time_is_over", lambda e: e.truncated.__setitem__(-1, False)),
        ("it_ends_when_its_time_is_over", lambda e: e.truncated.__setitem__(4, True)),
        ("only_heat_shuts_the_device_down", lambda e: e.terminated.__setitem__(-1, True)),
        ("only_heat_shuts_the_device_down", section("reading", temp_c=96.0)),
        ("energy_is_power_that_the_devices_can_draw", section("reading", power_w=-1.0, energy_j=-1.0)),
        ("energy_is_power_that_the_devices_can_draw", section("reading", power_w=50.0, energy_j=50.0)),
        ("energy_is_power_that_the_devices_can_draw", section("reading", power_w=701.0, energy_j=701.0)),
        ("energy_is_power_that_the_devices_can_draw", section("reading", energy_j=100.0)),
        ("temperatures_are_what_power_can_reach", section("reading", temp_c=85.0)),
        ("temperatures_are_what_power_can_reach", section("reading", mem_temp_c=5.0)),
        ("temperatures_are_what_power_can_reach", section("reading", temp_mean_c=80.0)),
        ("the_clock_is_the_card_s", section("reading", sm_clock_mhz=1981.0)),
        ("the_clock_is_the_card_s", section("reading", thermal_throttle_s=1.1)),
        ("no_request_is_lost", section("work", expired=(1.0, 1e6))),
        ("no_request_is_lost", section("work", waiting=(-1.0, 0.0))),
        ("as_many_arrive_as_the_load_says", section("work", arrived=(1e6, 0.0))),
        ("answers_are_counted_once", section("work", late=(1e6, 0.0))),
        ("answers_are_counted_once", section("work", good=1e6)),
        ("answers_are_counted_once", lambda e: e.infos[2]["latency_histogram"].__iadd__(1)),
        ("every_layer_routes_every_answer", lambda e: e.infos[2]["tokens_per_expert"].__imul__(2.0)),
        ("nobody_waits_past_expiry", section("work", oldest_s=(4.0, 0.0), waiting=(1.0, 0.0))),
        ("nobody_waits_past_expiry", section("work", oldest_s=(0.0, 1.0), waiting=(0.0, 0.0))),
        ("shares_are_shares", section("work", batch_fill=1.1)),
        ("shares_are_shares", section("work", ttt_busy_s=2.0)),
        ("shares_are_shares", section("work", shift_id=9.0)),
        ("budgets_are_the_normal_one_or_an_event_s", lambda e: e.infos[2].update(budget_w=100.0)),
        ("rewards_and_costs_add_up", lambda e: e.rewards.__setitem__(2, 99.0)),
        ("rewards_and_costs_add_up", section("cost", above_limit_s=-1.0)),
        ("rewards_and_costs_add_up", section("cost", over_budget_j=-1.0)),
    ],
)  # fmt: skip
def test_each_law_can_be_broken(law: str, spoil: Callable[[Episode], Any], episode: Episode) -> None:
    assert not broken(episode)
    spoilt = copy.deepcopy(episode)
    spoil(spoilt)
    assert law in broken(spoilt)


def test_no_law_is_left_untried() -> None:
    (parameters,) = test_each_law_can_be_broken.pytestmark  # pyright: ignore[reportFunctionMemberAccess]
    assert {law for law, _ in parameters.args[1]} == {law.__name__ for law in LAWS}


class Deed:
    """Done by whoever receives it."""

    def __init__(self, deed: Callable[[int], Any]) -> None:
        self.deed = deed

    def __reduce__(self) -> tuple[Callable[[int], Any], tuple[int]]:
        return self.deed, (3600,)


def test_what_hangs_or_dies_is_named_and_the_next_case_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    player = Player()
    assert player.outcome({"episode_s": 10}) == Outcome("sound")
    assert player.outcome({"episode_s": Deed(os._exit)}).kind == "died"
    assert player.outcome({"episode_s": 5}).kind == "refused"
    monkeypatch.setattr("tests.thermoe_env.playing.LIMIT_S", 0.2)
    assert player.outcome({"episode_s": Deed(time.sleep)}).kind == "endless"
    player.close()
