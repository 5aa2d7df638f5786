"""The environment that serves tokens: priced by a profile of steps, live on a CPU with the shipped model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import thermoe_env  # noqa: F401
from moe.lm.weights import load_model
from moe.profiles import ProfileError
from moe.service.generate.lengths import token_lengths
from moe.token_profile import load_token_profile
from moe.training.checkpoint import WeightsError
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.problem.tokens import request_profile


def test_the_reference_load_is_what_steps_of_the_standard_service_answer() -> None:
    """Prompts and output tokens of a second at full load take a second, by the measured steps themselves."""
    problem = Problem.of(load_scenario("default"))
    lengths = token_lengths(problem.scenario.generate.lengths, 1024)  # type: ignore[union-attr]
    cells = load_token_profile(config_path("profiles", "h200-generate", ".json")).cost.cells
    step = {(c.decode_rows, c.prefill_rows, c.context): c for c in cells if (c.top_k, c.readable) == (8, 64)}
    running, most = 128, max(rows for n, rows, _ in step if n)
    decode, alone, beside = step[128, 0, 300], step[32, 0, 300], step[32, most, 256]
    prompt_s = (beside.step_s - alone.step_s) / most
    request_s = lengths.output.mean() * decode.step_s / running + lengths.prompt.mean() * prompt_s
    assert problem.capacity_rps * request_s == pytest.approx(1.0)
    assert beside.energy_j is not None and decode.energy_j is not None and alone.energy_j is not None
    prompt_j = (beside.energy_j - alone.energy_j) / most
    request_j = lengths.output.mean() * decode.energy_j / running + lengths.prompt.mean() * prompt_j
    assert problem.serving_power_w == pytest.approx(problem.capacity_rps * request_j)


def test_quality_and_energy_of_requests_fall_with_experts_and_bias() -> None:
    profile = Problem.of(load_scenario("default")).profile
    assert profile.shifts == ("prose", "python", "c", "logs", "tables")
    assert (np.diff(profile.accuracy[:3, 0, :, 0], axis=1) > 0).all()  # more experts per token, better
    assert profile.energy_j is not None
    at_32 = profile.energy_j[profile.batch_size.tolist().index(32)]
    assert (np.diff(at_32[:, 0]) > 0).all() and (np.diff(at_32[-1]) < 0).all()


def test_a_profile_without_the_cells_is_refused() -> None:
    measured = load_token_profile(config_path("profiles", "h200-generate", ".json"))
    lengths = token_lengths(config_path("traces/requests", "azure-code-2023", ".csv"), 1024)
    alone = tuple(cell for cell in measured.cost.cells if not (cell.prefill_rows and cell.decode_rows))
    with pytest.raises(ProfileError, match="lacks prompts beside answers"):
        request_profile(replace(measured, cost=replace(measured.cost, cells=alone)), lengths)


def test_the_twin_plays_the_same_scenario() -> None:
    env = gym.make("ThermalMoETwin-v0", scenario="default", overrides={"episode_s": 30})
    env.reset(seed=0)
    tokens, answered, over = 0.0, 0.0, False
    while not over:
        _, reward, _, over, info = env.step(env.action_space.sample())
        assert np.isfinite(float(reward))
        tokens += info["work"]["output_tokens"]
        answered += sum(info["work"]["answered"])
    lengths = token_lengths(config_path("traces/requests", "azure-conv-2023", ".csv"), 1024)
    assert tokens == pytest.approx(answered * lengths.output.mean(), rel=0.1)  # some are under way
    assert 80.0 < info["reading"]["power_w"] < 700.0 and info["tokens_per_expert"].shape == (8, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"generate": None}, "goes with task 'generate'"),
        ({"generate": {"lengths": "nope"}}, "no traces/requests 'nope'"),
        ({"generate": {"tpot_s": [0.0, 1.0]}}, "tpot_s"),
        ({"traffic": {"shifts": [0, 9]}}, "shifts"),
        ({"static": {"expert_count": 3}}, "expert_count"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem.of(load_scenario("default", **overrides))


def test_lengths_without_tokens_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "times.csv"
    trace.write_text("TIMESTAMP\n2026-01-01 00:00:00\n2026-01-01 00:00:01\n")
    with pytest.raises(ValueError, match="no columns of prompt and output tokens"):
        Problem.of(load_scenario("default", generate={"lengths": str(trace)}))


def test_weights_that_are_not_there_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"python -m moe\.lm --size base"):
        load_model("base", "cpu", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card the live world serves base")
def test_small_decodes_for_twenty_seconds_and_loses_nothing() -> None:
    """In real time; a slow machine serves fewer tokens, and conserves them as well."""
    env = gym.make("ThermalMoELive-v0", scenario="default", overrides={"episode_s": 20})
    assert env.unwrapped.world == "live-cpu"  # type: ignore[attr-defined]
    env.reset(seed=1)
    env.action_space.seed(1)
    waiting = np.zeros(2)
    tokens, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        over = terminated or truncated
        work = info["work"]
        arrived, answered, expired = (np.array(work[name]) for name in ("arrived", "answered", "expired"))
        np.testing.assert_array_equal(arrived + waiting, answered + expired + np.array(work["waiting"]))
        waiting = np.array(work["waiting"])
        assert np.isfinite(float(reward))
        assert work["right_tokens"] <= work["output_tokens"] and work["good"] <= work["correct"]
        assert 0.0 <= work["cache_share"] <= 1.0
        tokens += work["output_tokens"]
    assert tokens > 100
    env.close()
