"""`DataCollector(env, record_infos=True)`: what is stored is the plain environment's, infos too."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import gymnasium
import minari
import numpy as np

from benchmarks.clients.plain import ID, replay

SEEDS = (5, 6)


def rows(values: list[Any]) -> Any:
    """Values of the steps as Minari stores them: arrays over the steps by name, a tuple's by number."""
    first = values[0]
    if isinstance(first, tuple):
        return {f"_index_{i}": rows([value[i] for value in values]) for i in range(len(first))}
    if isinstance(first, dict):
        return {key: rows([value[key] for value in values]) for key in first}
    return np.array(values)


def same(stored: Any, expected: Any) -> bool:
    """Whether two trees of arrays are equal; Minari stores text as bytes."""
    if isinstance(expected, dict):
        return stored.keys() == expected.keys() and all(same(stored[k], expected[k]) for k in expected)
    stored, expected = np.asarray(stored), np.asarray(expected)
    if expected.dtype.kind == "U":
        stored = np.array([text.decode() if isinstance(text, bytes) else text for text in stored.tolist()])
    return np.array_equal(stored, expected)


def collect() -> None:
    """Record, read back, compare."""
    env = minari.DataCollector(gymnasium.make(ID, max_episode_steps=40), record_infos=True)
    for seed in SEEDS:
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended = terminated or truncated
    env.create_dataset("thermalmoe/smoke-v0", algorithm_name="random", author="nobody")
    dataset = minari.load_dataset("thermalmoe/smoke-v0")
    assert dataset.total_episodes == len(SEEDS) and dataset.total_steps == 80
    made = dataset.recover_environment()
    assert made.observation_space == env.observation_space and made.action_space == env.action_space
    for seed, episode in zip(SEEDS, dataset.iterate_episodes(), strict=True):
        plain = replay(seed, episode.actions, max_episode_steps=40)
        assert np.array_equal(episode.observations, plain.observations)
        assert np.array_equal(episode.rewards, plain.rewards)
        assert np.array_equal(episode.terminations | episode.truncations, plain.ended)
        assert same(episode.infos, rows(plain.infos))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        collect()
