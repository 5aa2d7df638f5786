"""The live id under the same checkers. Apart from the others: it serves in real time."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env as gym_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import thermoe_env  # noqa: F401  (registers the ids)
from moe import ttt
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.knobs import ACTION_MODES
from thermoe_env.problem.problem import Problem
from thermoe_env.worlds import warn_of_another_card


@pytest.mark.parametrize("mode", ACTION_MODES)
def test_checkers_accept_the_live_id_on_a_cpu(mode: str) -> None:
    env = gymnasium.make(
        "ThermalMoELive-v0", action_mode=mode, overrides={"interval_s": 0.5}, disable_env_checker=True
    )
    gym_check(env.unwrapped, skip_render_check=True)  # it would build two worlds more; see test_render.py
    sb3_check(env.unwrapped)
    assert isinstance(env.unwrapped, ThermalMoEEnv)
    assert env.unwrapped.world in ("live", "live-cpu")
    env.close()
    env.close()


def test_the_scenario_s_adaptation_reaches_the_live_service() -> None:
    """A budget that pays for nothing, charged with the power profile's energies where there is no meter."""
    adaptation = {"method": "batch_statistics", "guard": False}
    env = ThermalMoEEnv(world="live", overrides={"interval_s": 0.5, "adaptation": adaptation})
    runner = env._world.workload
    runner = getattr(runner, "_workload", runner).runner  # pyright: ignore[reportAttributeAccessIssue]
    assert runner.adapter.settings == ttt.BatchStatistics() and runner.adapter.guard is None
    env.close()
    poor = {"budget": {"fraction": 1e-9}}
    env = ThermalMoEEnv(world="live", overrides={"interval_s": 0.5, "adaptation": poor})
    env.reset(seed=1)
    *_, info = env.step(env.problem.knobs.action(ttt_steps=2, batch_size=64))
    env.close()
    work = info["work"]
    assert work["ttt_refused"] == 2 * work["batches"] > 0 and work["ttt_steps"] == 0
    assert 0.0 < work["budget_share"] < 1.0


def test_a_calibration_of_another_card_is_named(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_another_card("NVIDIA A100-SXM4-80GB", problem)
    twin, profile = (record.getMessage() for record in caplog.records)
    assert "twin" in twin and problem.twin.gpu in twin and "A100" in twin
    assert "profile" in profile and problem.profile.device in profile
    caplog.clear()
    own = replace(problem, profile=replace(problem.profile, device=problem.twin.gpu))
    warn_of_another_card(problem.twin.gpu, own)
    assert not caplog.records
