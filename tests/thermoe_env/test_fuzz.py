"""Whatever a scenario or a calibration says ends in an error that names the key, or in a sound episode."""

from __future__ import annotations

import faulthandler
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gymnasium
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

import thermoe_env  # noqa: F401  (registers)
from thermoe_env.configs import configs_dir, merged
from thermoe_env.device.parameters import TwinParams
from thermoe_env.problem.scenario import Scenario, StepBudgetConfig, load_scenario
from thermoe_env.render import STAGES

COUNTS = ("arrived", "answered", "expired", "late", "waiting")
STEPS = 10
LIMIT_S = 60.0
"""After it a case counts as endless and ends the whole process: compiled code cannot be interrupted."""
NASTY = (
    math.nan, math.inf, -math.inf, 0, 0.0, -0.0, -1, -1.5, 1, 2, 1e-300, 5e-324, 1e300, 1e-12, 1e6, 2**31,
    10**30, 10**400, True, False, None, "", "1", "nan", "\0", "x" * 5000, "../..", [], [1], [0, 0],
    [math.nan, 1.0], [1e-300, 1e-300], [1e-300, 1e300], [3, 2, 1, 0], [[1]], ["a"], [None], {}, {"a": 1},
    {"a": {"b": math.nan}},
)  # fmt: skip
WORDS = (
    "poisson", "bursts", "diurnal", "trace", "azure-conv-2023", "vision", "language", "h100", "h100-vision",
    "h100-language", "tent", "eata", "norms", "router", "batch_size", "sm_clock",
)  # fmt: skip
Path_ = tuple[str, ...]


def keys_of(kind: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every key of a dataclass and of the sections in it, sections included."""
    if is_dataclass(kind):
        for name, hint in get_type_hints(kind).items():
            yield (*at, name)
            yield from keys_of(hint, (*at, name))
    else:
        for inner in get_args(kind):
            yield from keys_of(inner, at)


def stated(key: Path_, value: Any) -> dict[str, Any]:
    """Overrides that give a key a value; the devices are a list of sections."""
    for name in reversed(key):
        value = {name: value}
    return value


DEFAULTS = asdict(load_scenario("default"))
DEFAULTS["adaptation"]["budget"] = asdict(StepBudgetConfig())
DEFAULTS["devices"] = DEFAULTS["devices"][0]
KEYS = tuple(dict.fromkeys(keys_of(Scenario)))
TWIN = yaml.safe_load((configs_dir() / "twin" / "h100.yaml").read_text())
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
    if isinstance(value, (list, tuple)):
        return [near(inner, rng) for inner in value] + rng.choice(([], [], [*value[:1]]))
    return value


def cases(keys: tuple[Path_, ...], defaults: dict[str, Any], count: int) -> list[dict[Path_, Any]]:
    """Values for one or two keys each; every key takes its turn."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        chosen = [keys[number % len(keys)], *rng.sample(keys, rng.choice((0, 1)))]
        case = {}
        for key in chosen:
            default: Any = defaults
            for name in key:
                default = default[name]
            case[key] = rng.choice(NASTY) if rng.random() < 0.6 else near(default, rng)
        made.append(case)
    return made


CASES = cases(KEYS, DEFAULTS, 1000)
TWIN_CASES = cases(TWIN_KEYS, TWIN, 200)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The compiled code, made before the clock runs."""
    play({"episode_s": STEPS})
    play({"episode_s": STEPS, "adaptation": {"budget": {}}})


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


def play(overrides: dict[str, Any]) -> None:
    """Play up to `STEPS` intervals and check that all of them are sound."""
    env = gymnasium.make("ThermalMoETwin-v0", overrides=overrides)
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    waiting = np.zeros(2)
    for step in range(STEPS):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation) and math.isfinite(float(reward))
        assert info["stage"] in STAGES
        numbers = [*info["reward_terms"].values(), *info["cost"].values(), *info["reading"].values()]
        assert np.all(np.isfinite(numbers)), info
        reading, work = info["reading"], info["work"]
        assert reading["power_w"] > 1.0 and reading["energy_j"] > 0.0, reading
        assert all(-200.0 < reading[name] < 2000.0 for name in ("temp_c", "mem_temp_c")), reading
        counts = {
            name: np.array(work[name]) for name in ("arrived", "answered", "expired", "late", "waiting")
        }
        assert all(np.all(count >= 0.0) for count in counts.values()), counts
        assert np.all(counts["late"] <= counts["answered"]), counts
        gone = counts["answered"] + counts["expired"]
        assert np.array_equal(counts["arrived"], gone + counts["waiting"] - waiting), counts
        waiting = counts["waiting"]
        if terminated or truncated:
            assert terminated or step + 1 == STEPS or info["world"] == "twin"
            break
    env.close()


def outcome(overrides: dict[str, Any], case: dict[Path_, Any]) -> str:
    """`sound` or `refused`; fails where it is neither."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        play(overrides)
    except ValueError as error:
        assert not isinstance(error, ValidationError), f"{case}: {error}"
        assert any(name in str(error) for key in case for name in key[-1:]), f"{case}: {error}"
        return "refused"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "sound"


def overrides_of(case: dict[Path_, Any]) -> dict[str, Any]:
    """A short default scenario with the values of a case."""
    overrides: dict[str, Any] = {"episode_s": STEPS}
    for key, value in case.items():
        overrides = merged(overrides, stated(key, value))
    if any(key[0] == "devices" and len(key) > 1 for key in case):
        overrides["devices"] = [overrides["devices"]]
    return overrides


@pytest.mark.parametrize("first", range(0, len(CASES), 100))
def test_any_scenario_is_refused_by_the_key_s_name_or_plays_soundly(first: int) -> None:
    found = [outcome(overrides_of(case), case) for case in CASES[first : first + 100]]
    assert 10 <= found.count("sound") <= 90


@pytest.mark.parametrize("first", range(0, len(TWIN_CASES), 50))
def test_any_calibration_is_refused_by_the_key_s_name_or_plays_soundly(first: int, tmp_path: Path) -> None:
    for number, case in enumerate(TWIN_CASES[first : first + 50]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({**TWIN, **{key[0]: value for key, value in case.items()}}))
        outcome({"twin": str(path), "episode_s": STEPS}, case)


def test_every_key_is_reached() -> None:
    assert {key for case in CASES for key in case} == set(KEYS) >= {(f.name,) for f in fields(Scenario)}
    assert {("traffic", "dwell_s"), ("devices", "experts"), ("adaptation", "budget", "window_s")} <= set(KEYS)
    assert {key for case in TWIN_CASES for key in case} == set(TWIN_KEYS)
