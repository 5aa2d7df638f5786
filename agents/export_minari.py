"""Episodes of policies as a Minari dataset: `python -m agents.export_minari --policy NAME --dataset ID`.

The policies play the same episodes in the twin. Observations and infos begin with those of the reset; infos
are the constraint costs and the reward's terms, zero there. As the twin is deterministic, a stored episode's
seed and actions give its observations again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import gymnasium
import numpy as np
import tyro

import thermoe_env  # noqa: F401  (registers the ids)
from agents.evaluation.command import held_out_seeds
from agents.load import load_policy, policy_label
from agents.play.rollout import Recording, play_twin
from moe.errors import one_line_errors
from moe.workload import KNOB_NAMES
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

if TYPE_CHECKING:
    from minari import MinariDataset
    from minari.data_collector.episode_buffer import EpisodeBuffer

FIRST_SEED = 700_000
"""Far from the seeds that evaluation plays by default and from those that choose models and settings."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Export episodes of policies as a Minari dataset; simulated, in the twin."""

    dataset: str
    """Its id, namespace/name-v0. It goes to ~/.minari/datasets, or where MINARI_DATASETS_PATH says."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ("rule_based",)
    """Names, or folders of training runs."""
    episodes: int = 50
    """Per policy."""
    seed: int = FIRST_SEED
    """First seed; episode i has seed + i, for every policy."""
    scenario: str = "default"
    """Name in configs/scenarios or path of a YAML file."""
    author: str | None = None
    author_email: str | None = None
    code_permalink: str | None = None


def export(options: Options) -> MinariDataset:
    """Play and store.

    Raises:
        ValueError: seeds that choose models; an unknown policy; a dataset of this id exists.
        ImportError: Minari or its storage is missing; the message names the extra.
    """
    try:
        import_module("h5py")  # Minari's storage, which it does not require itself
        import minari
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'thermalmoe[ecosystem]'") from error

    seeds = held_out_seeds(options.seed, options.episodes)
    if options.dataset in minari.list_local_datasets():
        raise ValueError(f"a dataset {options.dataset!r} exists: choose another name or version")
    scenario = load_scenario(options.scenario)
    problem = Problem.of(scenario)
    env = gymnasium.make(
        "ThermalMoETwin-v0", scenario=options.scenario, max_episode_steps=scenario.steps
    )  # what recover_environment() makes again
    policies = [load_policy(name, problem) for name in options.policy]
    first = [env.reset(seed=seed)[0] for seed in seeds]
    buffers: list[EpisodeBuffer] = []
    labels = [policy_label(name) for name in options.policy]
    for label, policy in zip(labels, policies, strict=True):
        buffers += episodes(play_twin(problem, policy, seeds, label), problem, first)
    dataset = minari.create_dataset_from_buffers(
        options.dataset, buffers, env, eval_env=env, algorithm_name=", ".join(labels),
        author=options.author, author_email=options.author_email, code_permalink=options.code_permalink,
        description=(
            f"Simulated: scenario {scenario.name} in the twin of a {problem.twin.gpu}, "
            f"{options.episodes} episodes of each policy on the same seeds from {options.seed} on."
        ),
        requirements=["thermalmoe"],
    )  # fmt: skip
    played_by = [{"policy": label} for label in labels for _ in seeds]
    dataset.storage.update_episode_metadata(played_by)
    return dataset


def episodes(recording: Recording, problem: Problem, first: list[np.ndarray]) -> Iterator[EpisodeBuffer]:
    """The episodes of a recording as Minari has them.

    Args:
        recording: of one policy.
        problem: what was played.
        first: the observation of each reset, float32 [fields].
    """
    from minari.data_collector.episode_buffer import EpisodeBuffer

    controlled = [KNOB_NAMES.index(name) for name in problem.knobs.controlled]
    for i, seed in enumerate(recording.seeds):
        one = recording.episode(i)
        last = np.arange(len(one.reward)) == len(one.reward) - 1
        yield EpisodeBuffer(
            seed=int(seed),
            observations=[first[i], *one.observation[:, 0]],
            actions=list(one.index[:, 0, controlled]),
            rewards=one.reward[:, 0].tolist(),
            terminations=(last & one.shut_down[0]).tolist(),
            truncations=(last & ~one.shut_down[0]).tolist(),
            infos={
                "cost": _columns(COST_NAMES, one.cost[:, 0]),
                "reward_terms": _columns(REWARD_TERMS, one.terms[:, 0]),
            },
        )


def _columns(names: tuple[str, ...], values: np.ndarray) -> dict[str, Any]:
    """Columns of [T, names] by name, after a zero for the reset."""
    return dict(zip(names, np.vstack([np.zeros(len(names)), values]).T, strict=True))


def main(options: Options) -> None:
    """Export and say where the dataset is."""
    dataset = export(options)
    print(
        f"results in {dataset.spec.data_path}: {dataset.total_episodes} episodes, {dataset.total_steps} "
        f"steps; load with minari.load_dataset({options.dataset!r})"
    )


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
