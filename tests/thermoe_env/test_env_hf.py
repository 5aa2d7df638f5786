"""A user's own checkpoint in the live world: measured, served, and refused where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import thermoe_env  # noqa: F401  (registers the ids)
from agents.evaluation.command import EvaluateConfig, _named
from moe.profiles import Profile, ProfileError, save_profile
from moe.profiling.command import Options, measure
from tests.moe.hf.hf_models import save_checkpoint
from thermoe_env.configs import config_path
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.worlds import Checkpoint, build_world

SHORT = {"interval_s": 0.5, "episode_s": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "mixtral", "mixtral", num_experts_per_tok=2
    )


@pytest.fixture(scope="module")
def measured(folder: Path) -> Profile:
    return measure(
        Options(
            task="language", model=folder, device="cpu", out=Path("unused"), batch_sizes=(1, 4, 16),
            window_s=0.01, within_s=0.1, samples=50,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile(measured: Profile, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profiles") / "mine.json"
    # Untrained, it may have nothing right, by the text of this Python: then nothing has a price.
    save_profile(replace(measured, accuracy=np.maximum(measured.accuracy, 0.01)), path)
    return str(path)


def with_energies(profile: Profile) -> Profile:
    """As a card with a meter would have measured it."""
    return replace(
        profile, energy_j=profile.latency_s * 300.0, energy_spread=profile.latency_spread,
        start_temperature_c=np.full(profile.latency_s.shape, 40.0), idle_power_w=70.0,
        expert_energy_j=profile.expert_latency_s * 300.0,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profile is of a CPU")
def test_a_checkpoint_is_played_live(folder: Path, profile: str) -> None:
    env = gymnasium.make(
        "ThermalMoELive-v0", scenario="language", overrides=SHORT, model=str(folder), profile=profile
    )
    problem = env.unwrapped.problem  # pyright: ignore[reportAttributeAccessIssue]
    assert problem.knobs.levels["expert_count"] == (1.0, 2.0)
    assert problem.scenario.static.expert_count == 2 and problem.scenario.static.batch_size == 4
    env.reset(seed=0)
    for _ in range(2):
        observation, _, terminated, truncated, info = env.step(problem.knobs.action(expert_count=1))
        assert env.observation_space.contains(observation) and not terminated and not truncated
        answered = sum(info["work"]["answered"])
        assert info["world"] == "live-cpu" and info["tokens_per_expert"].shape == (2, 8)
        assert info["tokens_per_expert"].sum(axis=1).tolist() == [answered * 64] * 2
    env.close()


def test_a_model_that_has_nothing_right_is_refused_by_name(measured: Profile) -> None:
    nothing = replace(with_energies(measured), accuracy=np.zeros_like(measured.accuracy))
    problem = Problem.of(load_scenario("language", static={"expert_count": 2}), nothing)
    with pytest.raises(
        ProfileError, match=r"answers nothing right .*measure its profile with more --samples"
    ):
        _ = problem.reference_good_rps


def test_only_the_live_world_serves_a_checkpoint_and_only_with_its_profile(
    folder: Path, profile: str
) -> None:
    scenario, both = load_scenario("language"), Checkpoint(str(folder), profile)
    for world in ("twin", "auto"):
        with pytest.raises(ValueError, match=f"not in world '{world}': make ThermalMoELive-v0"):
            build_world(scenario, world, both)
    halves: list[dict[str, Any]] = [{"model": str(folder)}, {"profile": profile}]
    for half in halves:
        with pytest.raises(ValueError, match="model and profile go together"):
            gymnasium.make("ThermalMoELive-v0", scenario="language", **half)
        with pytest.raises(ValueError, match="a checkpoint is served live: add --live"):
            EvaluateConfig(**half)
    shipped = str(config_path("profiles", "cpu-language", ".json"))
    with pytest.raises(ProfileError, match=rf"the model language-tiny, {folder} is the checkpoint mixtral"):
        build_world(scenario, "live", Checkpoint(str(folder), shipped))
    with pytest.raises(ScenarioError, match="is of task 'language', not 'vision'"):
        build_world(load_scenario("vision"), "live", both)


def test_power_is_that_of_the_checkpoints_own_profile_where_it_has_energies(measured: Profile) -> None:
    scenario = load_scenario("language", static={"expert_count": 2})
    card, bare = Problem.of(scenario, with_energies(measured)), Problem.of(scenario, measured)
    assert card.power_profile is card.profile and card.batch_scale == 1.0
    assert card.reference_power_w == pytest.approx(70.0 + 300.0)
    assert bare.power_profile.device != bare.profile.device
    assert card.tables.cost[..., 1] == pytest.approx(card.tables.cost[..., 0] * 300.0)


def test_the_best_constant_needs_a_twin_of_the_checkpoint(measured: Profile) -> None:
    config = EvaluateConfig(live=True, model="x", profile="y")
    scenario = load_scenario("language", static={"expert_count": 2})
    for profile, labels in (
        (measured, ["static", "rule_based"]),
        (with_energies(measured), ["static", "best_constant", "rule_based"]),
    ):
        problem = Problem.of(scenario, profile)
        assert list(_named(config, problem)) == labels
