"""Validation tells the deterministic policy from the sampled one, and says when a policy serves nothing."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from agents.learning.config import TrainConfig
from agents.learning.interface import began_with
from agents.learning.models import ModelFileError
from agents.learning.training import build_model, train
from agents.learning.validation import VALIDATION_SEEDS, Validation, serves_nothing
from agents.learning.vec import TwinVecEnv
from tests.agents.conftest import ENVS, STEPS, UPDATE
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

NEW = {"best_return": None, "validated_at": 0}


@pytest.fixture(scope="module")
def problem(short_scenario: str) -> Problem:
    return Problem.of(load_scenario(short_scenario))


def untrained(config: TrainConfig, problem: Problem) -> Any:
    model = build_model(config, TwinVecEnv(problem, ENVS, action_mode=config.action_mode))
    model.set_logger(Logger(None, []))
    return model


def returns_of(model: PPO, problem: Problem, deterministic: bool) -> list[float]:
    """By Stable-Baselines3's own `predict`, an episode at a time."""
    found = []
    for seed in VALIDATION_SEEDS[:2]:
        env, total = TwinVecEnv(problem, 1, seed), 0.0
        observation = env.reset()
        for _ in range(STEPS):
            env.step_async(model.predict(observation, deterministic=deterministic)[0])
            observation, reward, _, _ = env.step_wait()
            total += reward[0]
        found.append(total)
    return found


def test_both_returns_are_of_the_same_episodes_and_draw_nothing_from_training(
    config: TrainConfig, problem: Problem, tmp_path: Path
) -> None:
    model = untrained(config, problem)
    validation = Validation(config, problem, tmp_path, NEW)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = validation(model)
    assert torch.equal(torch.rand(3), expected)
    assert found["deterministic"] == pytest.approx(np.mean(returns_of(model, problem, True)), rel=1e-5)
    sampled = [np.mean(returns_of(model, problem, False)) for _ in range(20)]
    assert min(sampled) - np.ptp(sampled) <= found["sampled"] <= max(sampled) + np.ptp(sampled)
    assert found["sampled"] != found["deterministic"]
    assert validation(model)["sampled"] == found["sampled"]  # the same draws in every validation


@pytest.mark.parametrize("algo", ["dqn", "sac"])
def test_off_policy_algorithms_have_one_return(
    algo: str, configs: dict[str, TrainConfig], problem: Problem, tmp_path: Path
) -> None:
    model = untrained(configs[algo], problem)
    assert set(Validation(configs[algo], problem, tmp_path, NEW)(model)) == {
        "deterministic",
        "best",
        "static",
    }


def test_what_serves_nothing_is_told_by_its_indicator() -> None:
    assert serves_nothing(0.9, 0.01) == serves_nothing(0.06, 0.49) == ""
    assert "eval/served_share is 1.00%" in serves_nothing(0.01, 0.0)
    assert "eval/served_share is 0.00%" in serves_nothing(0.0, float("nan"))
    assert "eval/late_fraction is 99.99%" in serves_nothing(0.3, 0.9999)


def test_a_policy_that_serves_nothing_is_warned_of_once_and_why_by_the_static_service(
    config: TrainConfig, problem: Problem, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = untrained(config, problem)
    monkeypatch.setattr(
        "agents.learning.validation.SERVED_SHARE_LOW", 2.0
    )  # whatever it serves is too little
    for static_late, remedy in ((0.0, "reward weights"), (0.5, "lower its traffic")):
        validation = Validation(config, problem, tmp_path, NEW)
        validation._static["late_fraction"] = static_late
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            validation(model)
            validation(model)
        assert len(caplog.records) == 1 and remedy in caplog.text
    validation = Validation(config, problem, tmp_path, NEW)
    assert 0.0 <= validation._static["served_share"] <= 1.0


def test_a_training_that_serves_nothing_says_so(
    config: TrainConfig, short_scenario: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At thirty times the load that the device carries, where static is late as well."""
    load = {"low_load": 30.0, "high_load": 30.0}
    said = {"name": "flood", "base": short_scenario, "traffic": load, "episode_s": 60}
    (tmp_path / "flood.yaml").write_text(yaml.safe_dump(said))
    flood = replace(config, scenario=str(tmp_path / "flood.yaml"), total_timesteps=1)
    with caplog.at_level(logging.WARNING):
        train(flood, tmp_path / "run", progress=False)
    assert "eval/served_share is 0." in caplog.text and "the scenario asks for more" in caplog.text


def test_a_new_run_begins_with_the_weights_of_a_trained_one(
    config: TrainConfig, configs: dict[str, TrainConfig], tmp_path: Path
) -> None:
    short = replace(config, total_timesteps=UPDATE)
    trained = train(short, tmp_path / "trained", progress=False)
    again = replace(short, trained_agent=str(trained), tensorboard_log=str(tmp_path / "events"))
    began: list[float] = []
    rounds = replace(again, eval_freq=10 * UPDATE, settings=replace(again.settings, learning_rate=1e-12))
    run = train(rounds, tmp_path / "again", progress=False, watch=lambda _, value: began.append(value))
    kept = PPO.load(trained / "best_model.zip", device="cpu").policy.state_dict()
    for name, value in PPO.load(run / "last_model.zip", device="cpu").policy.state_dict().items():
        torch.testing.assert_close(value, kept[name], atol=1e-8, rtol=0.0)
    digest = hashlib.sha256((trained / "best_model.zip").read_bytes()).hexdigest()
    assert (began_with(run), began_with(trained)) == (digest, None)
    assert len(began) == 1 and list((tmp_path / "events" / "again").glob("events*"))
    with pytest.raises(ModelFileError, match=r"best_model\.zip does not fit this run.*same algorithm"):
        train(replace(configs["sac"], trained_agent=str(trained)), tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()
