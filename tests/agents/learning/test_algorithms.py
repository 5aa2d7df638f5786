"""Settings of trainings and of the command, and that every algorithm is played as it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from agents.files import write_origin
from agents.learning import command
from agents.learning.algorithms import ALGORITHMS
from agents.learning.checkpoints import save_model
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.interface import INTERFACE_FILE, interface_of
from agents.learning.training import build_model
from agents.learning.vec import TwinVecEnv
from agents.load import load_policy
from tests.agents.conftest import ENVS, STEPS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


def test_settings_are_strict() -> None:
    shipped = load_train_config("ppo")
    assert shipped.algo == "ppo"
    with pytest.raises(ValueError, match=r"unknown algo 'ddpg'.*dqn.*ppo"):
        load_train_config("ddpg")
    with pytest.raises(ValueError, match=r"maskable_ppo.*every level is always allowed; use ppo"):
        load_train_config("maskable_ppo")
    with pytest.raises(ValueError, match="'sac' is set by SACSettings, got PPOSettings"):
        replace(shipped, algo="sac")
    with pytest.raises(ValueError, match=r"lerning_rate(.|\n)*known keys.*learning_rate"):
        load_train_config(lerning_rate=1.0)
    with pytest.raises(ValueError, match=r"clip_range(.|\n)*known keys.*buffer_size"):
        load_train_config("dqn", clip_range=0.2)
    with pytest.raises(ValueError, match="n_envs must be at least 1, got 0"):
        replace(shipped, n_envs=0)
    with pytest.raises(ValueError, match="n_epochs must be at least 1, got 0"):
        load_train_config(n_epochs=0)
    with pytest.raises(ValueError, match="learning_rate"):
        load_train_config(learning_rate=0.0)


def test_an_action_mode_must_fit() -> None:
    assert load_train_config("ppo", action_mode="box").action_mode == "box"
    with pytest.raises(ValueError, match=r"dqn acts by discrete, not by 'box'.*sac"):
        load_train_config("dqn", action_mode="box")
    with pytest.raises(ValueError, match=r"sac acts by box, not by 'multi_discrete'.*ppo"):
        load_train_config("sac", action_mode="multi_discrete")


def test_updates_must_fit_into_episodes_and_minibatches_into_updates(configs: dict[str, TrainConfig]) -> None:
    env = TwinVecEnv(Problem.of(load_scenario(configs["ppo"].scenario)), ENVS)
    with pytest.raises(ValueError, match="divisor of 36"):
        build_model(changed(configs["ppo"], n_minibatches=5), env)
    with pytest.raises(ValueError, match="5 steps between updates do not divide an episode of 12"):
        build_model(changed(configs["dqn"], train_freq=5), env)


def changed(config: TrainConfig, **settings: Any) -> TrainConfig:
    """The configuration with other settings of its algorithm."""
    return replace(config, settings=replace(config.settings, **settings))


@pytest.mark.parametrize("mode", ["multi_discrete", "discrete"])
def test_static_bias_starts_at_the_static_service(config: TrainConfig, mode: str) -> None:
    problem = Problem.of(load_scenario(config.scenario))
    env = TwinVecEnv(problem, ENVS, action_mode=mode)
    leaning = replace(changed(config, static_bias=5.0), action_mode=mode)
    action, _ = build_model(leaning, env).predict(env.reset(), deterministic=True)
    index = problem.knobs.indices(action, mode)
    np.testing.assert_array_equal(index, np.tile(problem.knobs.default_index, (ENVS, 1)))
    with pytest.raises(ValueError, match="box actions have none"):
        build_model(replace(leaning, action_mode="box"), TwinVecEnv(problem, ENVS, action_mode="box"))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_is_played_as_it_was_trained(
    algo: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shipped settings build, and what is read back, without unpickling, answers as the model does."""
    shipped = load_train_config(algo, scenario=config.scenario, n_envs=ENVS)
    small = {"train_freq": 1, "n_steps": STEPS // 2, "n_minibatches": 2, "buffer_size": 90}
    own = {name: value for name, value in small.items() if hasattr(shipped.settings, name)}
    problem = Problem.of(load_scenario(config.scenario))
    env = TwinVecEnv(problem, ENVS, action_mode=shipped.action_mode)
    model = build_model(changed(shipped, **own), env)
    with torch.no_grad():  # away from the even choices that networks begin with
        for parameter in model.policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    save_model(model, tmp_path / "best_model.zip")
    write_origin(tmp_path, shipped.flat())
    (tmp_path / INTERFACE_FILE).write_text(interface_of(problem))

    def refuse(*_: Any) -> Any:
        raise AssertionError("unpickled")

    policy = load_policy(tmp_path, problem, trust_pickle=True)
    monkeypatch.setattr(cloudpickle, "loads", refuse)
    careful = load_policy(tmp_path, problem)
    observation, start = env.reset(), np.ones(ENVS, bool)
    states: list[Any] = [None, None, None]
    for _ in range(4):
        (wanted, states[0]) = model.predict(observation, states[0], start, deterministic=True)
        index = problem.knobs.indices(wanted, shipped.action_mode)
        for k, read in enumerate((policy, careful), 1):
            levels, states[k] = read.predict(observation, states[k], start)
            assert levels.shape == (ENVS, len(problem.knobs.controlled))
            np.testing.assert_array_equal(problem.knobs.indices(levels, "multi_discrete"), index)
        env.step_async(wanted)
        observation, start = env.step_wait()[0].copy(), np.zeros(ENVS, bool)
    assert (states[2] is None) == (algo != "recurrent_ppo")


def test_the_command_passes_its_flags_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def called(*args: Any, **shown: bool) -> Path:
        calls.append((*args, shown))
        return tmp_path

    write_origin(tmp_path, load_train_config("ppo").flat())
    monkeypatch.setattr(command, "train", called)
    monkeypatch.setattr(command, "resume", called)
    monkeypatch.setattr(command, "train_seeds", called)
    quiet, plain = {"progress": False, "verbose": True}, {"progress": True, "verbose": False}
    for line in (
        f"-n 1e6 --seed 3 --n-envs 4 --eval-freq 5 -f {tmp_path} --env ThermalMoETwin-v0 --device cpu",
        f"--algo a2c -tb {tmp_path} -i {tmp_path} --no-progress --verbose 1",
        f"--resume {tmp_path} --no-progress --verbose 1",
        "--algo sac --seeds 1 2 -P",
    ):
        monkeypatch.setattr("sys.argv", ["train_agent.py", *line.split()])
        command.main()
    ppo, a2c = load_train_config("ppo"), load_train_config("a2c")
    assert calls == [
        (replace(ppo, total_timesteps=1_000_000, seed=3, n_envs=4, eval_freq=5), tmp_path, plain),
        (replace(a2c, tensorboard_log=str(tmp_path), trained_agent=str(tmp_path)), None, quiet),
        (tmp_path, quiet),
        (load_train_config("sac"), (1, 2), None, plain),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-n 0", "--n-timesteps 0: total_timesteps must be at least 1, got 0"),
        ("-n 7.5", "--n-timesteps must be a whole number, got 7.5"),
        ("--n-envs 0", "--n-envs 0: n_envs must be at least 1, got 0"),
        ("--eval-freq -1", "--eval-freq -1: eval_freq must be at least 1"),
        ("--seed -1", "--seed -1: seed must be at least 0"),
        ("--algo dqn --action-mode box", "--action-mode box: dqn acts by discrete"),
        ("--seed 1 --seeds 1 2", "--seeds goes neither with --seed"),
        ("--resume run --seed 1", "no other flag"),
        ("--live", "real time"),
        ("--env ThermalMoELive-v0", "--env ThermalMoELive-v0: training is in the twin"),
        ("--device cuda", "--device cuda: training is on the CPU"),
        ("--verbose 2", "--verbose must be 0 or 1"),
        ("-i nothing", "there is no model .*nothing"),
        ("--algo nope", "unknown algo 'nope'"),
    ],
)
def test_what_a_flag_breaks_is_blamed_on_the_flag(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train_agent.py", *line.split()])
    with pytest.raises(SystemExit, match=said) as end:
        command.main()
    assert ".yaml" not in str(end.value.code) or "nope" in line


def test_help_shows_the_values_of_the_algorithm_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for algo in ("ppo", "sac"):
        monkeypatch.setattr("sys.argv", ["train_agent.py", "--algo", algo, "--help"])
        with pytest.raises(SystemExit):
            command.main()
        shown = capsys.readouterr().out
        config = load_train_config(algo)
        for value in (config.total_timesteps, config.n_envs, config.eval_freq, config.action_mode):
            assert f"(default: {value})" in shown
