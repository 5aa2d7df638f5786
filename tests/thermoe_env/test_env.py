"""The Gymnasium and Stable-Baselines3 contracts, and the environment's errors."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gym_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import thermoe_env  # noqa: F401  (registers the ids)
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import GpuLostError, ScenarioError
from thermoe_env.mdp.fields import FIELD_NAMES, ranges_of
from thermoe_env.problem.knobs import ACTION_MODES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.telemetry import TwinTelemetry


@pytest.mark.parametrize("mode", ACTION_MODES)
@pytest.mark.parametrize("env_id", ["ThermalMoETwin-v0", "ThermalMoE-v0"])
def test_checkers_accept_the_twin_and_the_auto_id(env_id: str, mode: str, problem: Problem) -> None:
    env = gymnasium.make(env_id, scenario=problem.scenario, action_mode=mode, disable_env_checker=True)
    assert env.spec is not None and env.spec.max_episode_steps is None  # the scenario's length rules
    gym_check(env.unwrapped)
    sb3_check(env.unwrapped)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ([("episode_s", 20)], r"overrides must be a mapping .* got \[\('episode_s', 20\)\]"),
        ([], r"overrides must be a mapping .* got \[\]"),
        ("episode_s", "overrides must be a mapping .* got 'episode_s'"),
        ({1: 2}, r"overrides must be a mapping of scenario keys, .* got \{1: 2\}"),
        ({"traffic": {1: 2}}, "traffic.1: .*should be strings"),
        ({"scenario": "default"}, "scenario: is not known; known keys: .*episode_s"),
        ({"self": 1}, "self: is not known; known keys: .*episode_s"),
    ],
)
def test_overrides_that_are_none_are_refused(overrides: object, match: str, many: bool) -> None:
    with pytest.raises(ScenarioError, match=match):
        if many:
            gymnasium.make_vec("ThermalMoETwin-v0", num_envs=2, overrides=overrides)
        else:
            gymnasium.make("ThermalMoETwin-v0", overrides=overrides)


def test_every_observed_field_is_written(problem: Problem) -> None:
    """Fields left at zero by mistake would show as constants over an episode of chance."""
    env = ThermalMoEEnv(problem.scenario, world="twin", overrides={"limits": {"temperature_c": 62.0}})
    env.action_space.seed(0)
    rows = [env.reset(seed=0)[0]]
    for _ in range(problem.scenario.steps):
        rows.append(env.step(env.action_space.sample())[0])
    values = ranges_of(problem).decode(np.array(rows))
    still = {name for name in FIELD_NAMES if np.ptp(values[name]) == 0.0}
    # The default scenario controls neither of these, its one device is never throttled, its traffic is even,
    # its adaptation is unlimited, its limits do not act, one price holds for energy, no tokens are promised.
    assert still <= {
        "price",
        "price_ahead",
        "price_change_s",
        "promised_tpot_s",
        "promised_tpot_ahead_s",
        "promised_tpot_change_s",
        "tpot_share",
        "pace_level",
        "sm_clock_level",
        "admission_level",
        "sm_clock_share",
        "power_capped_s",
        "thermal_throttle_s",
        "load_imbalance",
        "temp_spread_c",
        "ttt_budget",
        "ttt_refused_share",
        "duty",
        "release_s",
        "overload_share",
    }


@pytest.mark.parametrize(
    ("mode", "action"),
    [
        ("multi_discrete", [0, 0, 99, 0]),
        ("multi_discrete", [0, 0, -1, 0]),
        ("multi_discrete", [0, 0]),
        ("multi_discrete", [0.0, np.nan, 0.0, 0.0]),
        ("discrete", 10**6),
        ("box", [0.0, np.nan, 0.0, 0.0]),
        ("box", [0.0, 2.0, 0.0, 0.0]),
    ],
)
def test_actions_outside_the_space_are_refused(problem: Problem, mode: str, action) -> None:
    env = ThermalMoEEnv(problem.scenario, world="twin", action_mode=mode)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="must"):
        env.step(action)
    env.step(env.action_space.sample())  # a refused action costs nothing: the episode goes on


def test_action_modes_reach_the_same_knobs(problem: Problem) -> None:
    table = problem.knobs
    for flat in range(0, int(table.nvec.prod()), 7):
        levels = np.unravel_index(flat, tuple(table.nvec))
        box = (np.array(levels) + 0.5) / table.nvec * 2.0 - 1.0
        expected = table.indices(np.array([levels]), "multi_discrete")
        assert np.array_equal(table.indices(np.array([flat]), "discrete"), expected)
        assert np.array_equal(table.indices(box[None], "box"), expected)


def test_step_needs_a_reset(problem: Problem) -> None:
    env = ThermalMoEEnv(problem.scenario, world="twin")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())


class _FailingTelemetry:
    """Telemetry whose device is gone at the n-th reading."""

    simulated = False
    tripped = False
    missing: tuple[str, ...] = ("mem_temp_c",)

    def __init__(self, inner, n: int) -> None:
        self._inner, self._left = inner, n

    def reset(self, seed: int):
        return self._inner.reset(seed)

    def read(self, work, duration_s):
        self._left -= 1
        if self._left == 0:
            raise GpuLostError("the GPU stopped answering; reset the device and start a new episode")
        return self._inner.read(work, duration_s)

    def per_device(self, reading):
        return self._inner.per_device(reading)

    def close(self) -> None:
        self._inner.close()


def test_a_lost_gpu_ends_the_episode_with_a_named_error(problem: Problem) -> None:
    env = ThermalMoEEnv(problem.scenario, world="twin")
    env._world.telemetry = _FailingTelemetry(env._world.telemetry, 4)
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())
    with pytest.raises(GpuLostError, match="stopped answering"):
        env.step(env.action_space.sample())
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())


def test_what_a_device_cannot_say_is_in_every_info(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwinTelemetry, "missing", ("mem_temp_c", "energy_j"))
    env = ThermalMoEEnv(problem.scenario, world="twin")
    _, at_reset = env.reset(seed=0)
    info = env.step(env.action_space.sample())[4]
    assert at_reset["missing"] == info["missing"] == "mem_temp_c, energy_j"


def test_infos_have_the_same_keys_and_types_at_reset_and_at_every_step(problem: Problem) -> None:
    """As recorders need that make columns of them."""

    def form(value) -> object:
        if isinstance(value, dict):
            return {key: form(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(form, value))
        return (value.dtype, value.shape) if isinstance(value, np.ndarray) else type(value)

    env = ThermalMoEEnv(problem.scenario, world="twin")
    _, first = env.reset(seed=0)
    assert first["knobs"] == vars(problem.knobs.knobs(np.array(problem.knobs.default_index)))
    for empty in (first["reward_terms"], first["cost"]):
        assert not any(empty.values())
    assert first["work"]["arrived"] == (0.0, 0.0) and first["reason"] == ""
    env.step(env.action_space.sample())
    assert isinstance(env._world.telemetry, TwinTelemetry)
    env._world.telemetry._devices["inlet_c"] = 120.0
    *_, terminated, _, info = env.step(env.action_space.sample())
    assert terminated and form(info) == form(first)
    assert env.reset()[1]["reason"] == "" and form(env.reset()[1]) == form(first)


def test_an_overheated_device_ends_the_episode(problem: Problem) -> None:
    env = ThermalMoEEnv(problem.scenario, world="twin")
    env.reset(seed=0)
    assert isinstance(env._world.telemetry, TwinTelemetry)
    env._world.telemetry._devices["inlet_c"] = 120.0
    *_, terminated, truncated, info = env.step(env.action_space.sample())
    assert terminated and not truncated and "shutdown" in info["reason"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epsiode_s": 3}, "epsiode_s.*known keys.*episode_s"),
        ({"limits": {"temprature_c": 60}}, "known keys.*temperature_c"),
        ({"knobs": ["fan_speed"]}, "routing_bias"),
        ({"interval_s": 0.1}, "0.5 or 1.0"),
        ({"static": {"batch_size": 0}}, "batch_size"),
        ({"profile": "no-such"}, "no profiles 'no-such'"),
        ({"twin": "no-such"}, "no twin 'no-such'"),
        ({"task": "language"}, "task"),
        ({"traffic": {"shifts": [0, 99]}}, "shifts"),
    ],
)
def test_bad_scenarios_are_refused(profile_path, overrides, message) -> None:
    base = {"profile": str(profile_path)}
    with pytest.raises(ScenarioError, match=f"(?s){message}"):
        Problem.of(load_scenario("vision", **{**base, **overrides}))


def test_an_unmeasured_level_is_refused(profile_path) -> None:
    with pytest.raises(ValueError, match="expert_count"):
        Problem.of(load_scenario("vision", profile=str(profile_path), static={"expert_count": 3}))


def test_unknown_world_and_mode_name_the_known_ones(problem: Problem) -> None:
    with pytest.raises(ValueError, match="twin"):
        ThermalMoEEnv(problem.scenario, world="mars")
    with pytest.raises(ValueError, match="multi_discrete"):
        ThermalMoEEnv(problem.scenario, world="twin", action_mode="knob")
