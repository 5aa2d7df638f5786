"""The live id under the same checkers. Apart from the others: it serves in real time."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gym_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import thermoe_env  # noqa: F401  (registers the ids)
from moe import ttt
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.knobs import ACTION_MODES
from thermoe_env.problem.problem import Problem
from thermoe_env.worlds import warn_of_another_card

CAPTURED = {"captured": True}  # the provenance of a profile


@pytest.mark.parametrize(
    "mode",  # the twin's checkers hold every one
    [ACTION_MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in ACTION_MODES[1:])],
)
def test_checkers_accept_the_live_id_on_a_cpu(mode: str) -> None:
    env = gymnasium.make(
        "ThermalMoELive-v0",
        scenario="vision",
        action_mode=mode,
        overrides={"interval_s": 0.5},
        disable_env_checker=True,
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
    env = ThermalMoEEnv("vision", world="live", overrides={"interval_s": 0.5, "adaptation": adaptation})
    runner = env._world.workload
    runner = getattr(runner, "_workload", runner).runner  # pyright: ignore[reportAttributeAccessIssue]
    assert runner.adapter.settings == ttt.BatchStatistics() and runner.adapter.guard is None
    env.close()
    poor = {"budget": {"fraction": 1e-9}}
    env = ThermalMoEEnv("vision", world="live", overrides={"interval_s": 0.5, "adaptation": poor})
    env.reset(seed=1)
    *_, info = env.step(env.problem.knobs.action(ttt_steps=2, batch_size=64))
    env.close()
    work = info["work"]
    assert work["ttt_refused"] == 2 * work["batches"] > 0 and work["ttt_steps"] == 0
    assert 0.0 < work["budget_share"] < 1.0


def test_limits_act_on_a_live_service() -> None:
    """A real model at full load under a budget that it breaks at once: busy for no more than the duty."""
    tight = {
        "normal_w": 150.0, "event_w": [150.0, 150.0],
        "brake": {"grace_s": 0.0, "duty": 0.3, "hold_s": 3.0},
    }  # fmt: skip
    full = {"kind": "poisson", "low_load": 2.0, "high_load": 2.0}
    overrides = {"interval_s": 0.5, "traffic": full, "power_budget": tight, "episode_s": 12}
    env = ThermalMoEEnv("vision", world="live", overrides=overrides)
    env.reset(seed=1)
    held, busy_s, over = [], [], False
    while not over:
        *_, over, info = env.step(env.problem.knobs.action())
        assert info["limits"]["duty"] == (0.3 if info["limits"]["why"] == "brake" else 1.0)
        assert info["knobs"]["pace"] == 1.0
        held.append(info["limits"]["why"] == "brake")
        busy_s.append(info["work"]["busy_s"])
    env.close()
    assert sum(held) >= 12
    # What runs when the brake engages goes on, and an interval waits for its last batch.
    settled = [busy for busy, now, before in zip(busy_s[1:], held[1:], held, strict=False) if now and before]
    assert sum(settled) <= 0.3 * 0.5 * len(settled) + 0.1
    assert sum(settled) > 0.15 * 0.5 * len(settled)
    assert busy_s[0] > 0.3


def test_a_live_service_drains_at_its_limit() -> None:
    limits = {"temperature_c": 40.0, "alarm": {"drain_s": 2.0}}
    full = {"kind": "poisson", "low_load": 2.0, "high_load": 2.0}
    overrides = {"interval_s": 0.5, "traffic": full, "limits": limits, "episode_s": 12}
    env = ThermalMoEEnv("vision", world="live", overrides=overrides)
    if env.world != "live-cpu":
        env.close()
        pytest.skip("a card's temperature is its own")
    env.reset(seed=1)
    waiting, why, over = np.zeros(2), [], False
    while not over:
        *_, over, info = env.step(env.problem.knobs.action())
        work, drained = info["work"], info["limits"]["why"] == "alarm"
        why.append(drained)
        arrived, answered, expired = (np.array(work[name]) for name in ("arrived", "answered", "expired"))
        np.testing.assert_array_equal(arrived + waiting, answered + expired + np.array(work["waiting"]))
        waiting = np.array(work["waiting"])
        if drained and why[-2]:  # what ran has come back
            assert not answered.any() and work["busy_s"] == 0.0
    env.close()
    change = np.diff(np.array(why, int))
    begins, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    assert len(ends) >= 1 and (ends - begins[: len(ends)] == 4).all()


def test_a_calibration_of_another_card_is_named(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_another_card("NVIDIA A100-SXM4-80GB", problem)
    twin, profile, _ = (record.getMessage() for record in caplog.records)
    assert "twin" in twin and problem.twin.gpu in twin and "A100" in twin
    assert "profile" in profile and problem.profile.device in profile
    caplog.clear()
    own = replace(problem, profile=replace(problem.profile, device=problem.twin.gpu, provenance=CAPTURED))
    warn_of_another_card(problem.twin.gpu, own)
    assert not caplog.records


@pytest.mark.parametrize("provenance", [{"note": "older"}, {"captured": False}])
def test_a_profile_of_a_service_without_graphs_is_named_once(
    problem: Problem, caplog: pytest.LogCaptureFixture, provenance: dict[str, object]
) -> None:
    card = problem.twin.gpu
    warn_of_another_card(
        card, replace(problem, profile=replace(problem.profile, device=card, provenance=provenance))
    )
    [record] = caplog.records
    assert "without CUDA graphs" in record.getMessage() and "moe.profiling" in record.getMessage()
    caplog.clear()
    for free in ({"task": "generate"}, {"provenance": {**provenance, "checkpoint": "folder"}}):
        profile = replace(problem.profile, **{"device": card, "provenance": provenance} | free)
        warn_of_another_card(card, replace(problem, profile=profile))
    assert not caplog.records
