"""Rollouts: the batch against the single environment, what survives a failure, and what must add up."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agents.play.rollout import Recording, play_live, play_twin
from agents.policies.policy import ConstantPolicy, Policy, RandomPolicy
from agents.policies.rules import RuleBased, RuleConfig
from moe.profiles import save_profile
from moe.workload import KNOB_NAMES
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import config_path
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import GpuLostError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario

SEEDS = [3, 11, 2**40]
STEPS = 25


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "made-up.json"
    save_profile(make_profile(), path)
    return str(path)


@pytest.fixture(scope="module")
def scenario(profile: str) -> Scenario:
    return load_scenario("vision", profile=profile, episode_s=STEPS)


def assert_same(one: Recording, other: Recording) -> None:
    for item in fields(Recording):
        np.testing.assert_array_equal(getattr(one, item.name), getattr(other, item.name), item.name)


class Mixed:
    """Actions that depend on the observation and on memory, so that a slip in either shows."""

    def __init__(self, problem: Problem) -> None:
        self._nvec = problem.knobs.nvec

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> Any:
        count = np.zeros(len(observation)) if state is None else state
        count = np.where(episode_start, 0.0, count) + 1.0
        seen = np.floor(1e4 * np.abs(observation).sum(1)) + count
        return (seen[:, None] // (1 + np.arange(len(self._nvec)))).astype(np.int64) % self._nvec, count


@pytest.mark.parametrize("kind", ["mixed", "rules", "constant"])
def test_twin_batch_equals_single_environment(scenario: Scenario, kind: str) -> None:
    problem = Problem.of(scenario)
    policies: dict[str, Policy] = {
        "mixed": Mixed(problem),
        "rules": RuleBased(problem, RuleConfig()),
        "constant": ConstantPolicy(problem.knobs.action(batch_size=512, expert_count=2)),
    }
    together = play_twin(problem, policies[kind], SEEDS, kind)
    env = ThermalMoEEnv(scenario, "twin")
    for i, seed in enumerate(SEEDS):
        assert_same(together.episode(i), play_live(env, policies[kind], seed, kind))


def test_episode_ended_by_the_device(scenario: Scenario, tmp_path: Path) -> None:
    """After a shutdown nothing of the environment's next episode is recorded."""
    hot = yaml.safe_load(config_path("twin", "h100", ".yaml").read_text())
    hot |= dict.fromkeys(("slowdown_c", "hw_slowdown_c", "shutdown_c"), hot["inlet_c"] + 14.0)
    (tmp_path / "hot.yaml").write_text(yaml.safe_dump(hot))
    scenario = replace(scenario, twin=str(tmp_path / "hot.yaml"))
    problem = Problem.of(scenario)
    policy = ConstantPolicy(problem.knobs.action())
    together = play_twin(problem, policy, range(8))
    assert together.shut_down.any() and (together.length[together.shut_down] < STEPS).all()
    assert (together.length[~together.shut_down] == STEPS).all()
    for name in ("reward", "budget_w", "histogram", "tokens_per_expert", "observation"):
        assert not getattr(together, name)[~together.played].any()
    env = ThermalMoEEnv(scenario, "twin")
    for i in range(8):
        assert_same(together.episode(i), play_live(env, policy, i))


def test_requests_and_tokens_add_up(scenario: Scenario) -> None:
    problem = Problem.of(scenario)
    recording = play_twin(problem, RandomPolicy(problem.knobs.nvec), SEEDS)
    work = recording.work
    left = work["arrived"] - work["answered"] - work["expired"]  # [T, n, classes]
    np.testing.assert_array_equal(left.cumsum(0), work["waiting"])
    answered = work["answered"].sum(axis=-1)
    np.testing.assert_array_equal(recording.histogram.sum(-1), answered)
    count = np.array(problem.knobs.levels["expert_count"])[
        recording.index[..., KNOB_NAMES.index("expert_count")]
    ]
    np.testing.assert_allclose(
        recording.tokens_per_expert.sum(-1), (answered * count)[..., None].repeat(2, -1)
    )
    np.testing.assert_allclose(recording.terms.sum(-1), recording.reward)


@pytest.mark.parametrize(
    "stop", [GpuLostError("off the bus"), RuntimeError("CUDA error"), KeyboardInterrupt()]
)
def test_live_keeps_what_was_recorded(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    env = ThermalMoEEnv(scenario, "twin")
    policy = ConstantPolicy(env.problem.knobs.action())
    whole, step, played = play_live(env, policy, 5), env.step, 0

    def failing(action: Any) -> Any:
        nonlocal played
        played += 1
        if played > 7:
            raise stop
        return step(action)

    monkeypatch.setattr(env, "step", failing)
    cut = play_live(env, policy, 5)
    assert cut.error is stop and cut.length.tolist() == [7]
    np.testing.assert_array_equal(cut.reward, whole.reward[:7])
    np.testing.assert_array_equal(cut.gpu, whole.gpu[:7])


def test_interval_without_answers_routes_no_tokens(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live workload that answered nothing has no load to tell of; the environment tells of none routed."""
    env = ThermalMoEEnv(scenario, "twin")
    run = env._world.workload.run
    monkeypatch.setattr(
        env._world.workload, "run", lambda *arguments: replace(run(*arguments), tokens_per_expert=None)
    )
    recording = play_live(env, ConstantPolicy(env.problem.knobs.action()), 5)
    assert recording.error is None and not recording.tokens_per_expert.any()


def test_live_reports_every_step(scenario: Scenario) -> None:
    env, seen = ThermalMoEEnv(scenario, "twin"), []
    recording = play_live(
        env,
        ConstantPolicy(env.problem.knobs.action()),
        5,
        on_step=lambda t, info: seen.append((t, info["budget_w"])),
    )
    assert seen == list(enumerate(recording.budget_w[:, 0]))


def test_other_action_mode_is_refused(scenario: Scenario) -> None:
    env = ThermalMoEEnv(scenario, "twin", "box")
    with pytest.raises(ValueError, match="multi_discrete"):
        play_live(env, ConstantPolicy(env.problem.knobs.action()), 0)


def test_episodes_of_tokens_are_recorded_with_the_latencies_of_whole_answers() -> None:
    problem = Problem.of(load_scenario("default", episode_s=12))
    recording = play_twin(problem, RandomPolicy(problem.knobs.nvec), [1, 2])
    answered = recording.work["answered"].sum(axis=(0, -1))
    counted = recording.histogram.sum(axis=(0, -1))
    assert (recording.length == 12).all() and (answered > 0).all()
    running = recording.work["waiting"][-1].sum(axis=-1)  # recorded where a request is let run
    assert (np.abs(counted - answered) <= running + 1).all()
