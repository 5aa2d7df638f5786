"""Episodes as a Minari dataset: loaded, replayed, refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agents.export_minari import Options, export
from agents.learning.config import TrainConfig
from agents.learning.training import train
from tests.agents.conftest import STEPS
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS

minari: Any = pytest.importorskip("minari")
DATASET = "thermalmoe/short/mixed-v0"
WHO: dict[str, Any] = {
    "author": "someone",
    "author_email": "someone@example.org",
    "code_permalink": "https://example.org",
}


@pytest.fixture(scope="module")
def options(config: TrainConfig, short_scenario: str, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A rule, a gate and a trained run, three episodes each."""
    run = train(replace(config, total_timesteps=1), tmp_path_factory.mktemp("run") / "ppo", progress=False)
    return Options(
        dataset=DATASET,
        policy=("rule_based", "gate-change", str(run)),
        episodes=3,
        scenario=short_scenario,
        **WHO,
    )


@pytest.fixture(scope="module")
def dataset(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As a user loads it."""
    pytest.importorskip("h5py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("datasets")))
        export(options)
        yield minari.load_dataset(DATASET)


def test_the_stored_actions_give_the_stored_episodes_again_bit_for_bit(dataset: Any) -> None:
    env = dataset.recover_environment()
    assert env.spec.id == "ThermalMoETwin-v0" and env.spec.max_episode_steps == STEPS
    assert dataset.observation_space == env.observation_space and dataset.action_space == env.action_space
    assert dataset.total_episodes == 9 and dataset.total_steps == 9 * STEPS
    for episode, about in zip(
        dataset.iterate_episodes(), dataset.storage.get_episode_metadata(range(9)), strict=True
    ):
        observation, _ = env.reset(seed=about["seed"])
        np.testing.assert_array_equal(observation, episode.observations[0])
        assert episode.observations.dtype == np.float32 and len(episode.observations) == STEPS + 1
        for t in range(STEPS):
            observation, reward, terminated, truncated, info = env.step(episode.actions[t])
            np.testing.assert_array_equal(observation, episode.observations[t + 1])
            assert (reward, terminated, truncated) == (
                episode.rewards[t], episode.terminations[t], episode.truncations[t],
            )  # fmt: skip
            for key, names in (("cost", COST_NAMES), ("reward_terms", REWARD_TERMS)):
                assert info[key] == {name: episode.infos[key][name][t + 1] for name in names}
        assert truncated


def test_the_policies_play_the_same_episodes(dataset: Any) -> None:
    about = list(dataset.storage.get_episode_metadata(range(9)))
    assert [row["policy"] for row in about] == ["rule_based"] * 3 + ["gate-change"] * 3 + ["ppo"] * 3
    assert [row["seed"] for row in about] == [700_000, 700_001, 700_002] * 3
    rows = list(dataset.iterate_episodes())
    for first, second in zip(rows[:3], rows[3:6], strict=True):
        np.testing.assert_array_equal(first.observations[0], second.observations[0])
    # What is shown of it: where it comes from, and by whom it was played.
    metadata = dataset.storage.metadata
    assert metadata["description"].startswith("Simulated: ") and metadata["algorithm_name"].endswith(", ppo")


def test_an_existing_dataset_is_kept(dataset: Any, options: Options) -> None:
    with pytest.raises(ValueError, match="'thermalmoe/short/mixed-v0' exists"):
        export(options)
    assert minari.load_dataset(DATASET).total_episodes == 9


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py.*thermalmoe\[ecosystem\]"):
        export(options)
