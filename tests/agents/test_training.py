"""Training runs at small scale: what they write, and that stopping them changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_agent
from agents.callbacks import VALIDATION_SEEDS
from agents.checkpoints import CheckpointError
from agents.rollout import play_twin
from agents.runs import RunFolderError, load_policy
from agents.training import TrainConfig, build_model, load_train_config, resume, train
from agents.vec import TwinVecEnv
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.problem import Problem
from thermoe_env.reward import REWARD_TERMS
from thermoe_env.scenario import config_path, load_scenario
from thermoe_env.signals import STAGES

UPDATES, ENVS, STEPS = 5, 3, 12
UPDATE = ENVS * STEPS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "default", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "episode_s": STEPS}
    (folder / "short.yaml").write_text(yaml.safe_dump(raw))
    return load_train_config(
        scenario=str(folder / "short.yaml"),
        total_timesteps=UPDATES * UPDATE,
        n_envs=ENVS,
        n_minibatches=2,
        n_epochs=2,
        eval_freq=2 * UPDATE,
        eval_episodes=2,
        torch_threads=1,
    )


@pytest.fixture(scope="module")
def finished(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, and not the first of its process: that loads and compiles on the way."""
    folder = tmp_path_factory.mktemp("run")
    train(replace(config, total_timesteps=2 * UPDATE), folder / "first", progress=False)
    return train(config, folder / "finished", progress=False)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the user press Ctrl-C at the given step of the environments."""
    step_wait, played = TwinVecEnv.step_wait, 0

    def interrupted(self: TwinVecEnv) -> Any:
        nonlocal played
        played += 1
        if played > steps:
            raise KeyboardInterrupt
        return step_wait(self)

    monkeypatch.setattr(TwinVecEnv, "step_wait", interrupted)


def contents(path: Path) -> dict[str, Any]:
    """Parameters, optimizer and training state of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        tensors = {
            name: torch.load(archive.open(name), weights_only=True)
            for name in ("policy.pth", "policy.optimizer.pth")
        }
        return {**tensors, "state": json.loads(archive.read("training_state.json"))}


def assert_equal(one: Any, other: Any) -> None:
    """Equal bit for bit, through nested containers."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"differ by up to {(one.double() - other.double()).abs().max():.3g}"
    else:
        assert one == other


def test_a_run_holds_all_files_and_tags(finished: Path, config: TrainConfig) -> None:
    names = {path.name for path in finished.iterdir()}
    files = {
        "config.yaml",
        "scenario.yaml",
        "command.txt",
        "versions.json",
        "best_model.zip",
        "last_model.zip",
    }
    assert names == files | {"tb"}  # and no half-written file
    assert load_train_config(finished / "config.yaml") == config
    assert load_scenario(finished / "scenario.yaml") == load_scenario(config.scenario)

    events = EventAccumulator(str(finished / "tb"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    scalars = {
        *(f"reward/{name}" for name in REWARD_TERMS), *(f"stage/{name}" for name in STAGES),
        "gpu/temp_c", "gpu/peak_c", "gpu/power_w", "cost/above_limit_s", "cost/over_budget_j",
        "service/quality", "service/late_fraction", "service/j_per_good", "eval/return", "eval/j_per_good",
        "eval/return_static", "rollout/ep_rew_mean", "train/value_loss", "time/fps",
    }  # fmt: skip
    assert scalars <= set(tags["scalars"])
    knobs = load_scenario(config.scenario).knobs
    assert {f"knob/{name}" for name in knobs} == set(tags["histograms"])
    assert tags["images"] == ["eval/expert_share"]
    assert [event.step for event in events.Scalars("eval/return")] == [2 * UPDATE, 4 * UPDATE, 5 * UPDATE]
    # What the rollouts add up to, against what Stable-Baselines3 took from the episode records.
    for k, mean in enumerate(events.Scalars("rollout/ep_rew_mean")):
        terms = sum(events.Scalars(f"reward/{name}")[k].value for name in REWARD_TERMS)
        assert terms == pytest.approx(mean.value, rel=1e-4)
    assert sum(events.Scalars(f"stage/{name}")[-1].value for name in STAGES) == pytest.approx(1.0)


def test_the_best_model_is_the_one_that_validated_best(finished: Path) -> None:
    problem = Problem.of(load_scenario(finished / "scenario.yaml"))
    seen = EventAccumulator(str(finished / "tb")).Reload().Scalars("eval/return")
    state = contents(finished / "last_model.zip")["state"]
    assert state["best_return"] == pytest.approx(max(event.value for event in seen), rel=1e-5)
    seeds = VALIDATION_SEEDS[:2]
    returns = {
        name: play_twin(problem, model, seeds).reward.sum(0).mean()
        for name, model in (
            ("plain", PPO.load(finished / "best_model.zip", device="cpu")),
            ("by run folder", load_policy(finished, problem)),
        )
    }
    assert returns["plain"] == returns["by run folder"] == state["best_return"]


@pytest.mark.parametrize("stop", [STEPS // 2, 2 * STEPS + STEPS // 3, 4 * STEPS])
def test_a_resumed_run_equals_an_uninterrupted_one(
    stop: int, config: TrainConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first episodes, amid the third, and between two updates."""
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"--resume {folder}"):
        stop_after(patch, stop)
        train(config, folder, progress=False)
    kept = contents(folder / "last_model.zip")["state"]["num_timesteps"]
    assert kept == stop // STEPS * UPDATE
    torch.manual_seed(99)  # a process of its own would start with other generators
    np.random.seed(99)  # noqa: NPY002
    resume(folder, progress=False)
    assert_equal(contents(folder / "last_model.zip"), contents(finished / "last_model.zip"))
    for name in ("policy.pth",):
        with (
            zipfile.ZipFile(folder / "best_model.zip") as a,
            zipfile.ZipFile(finished / "best_model.zip") as b,
        ):
            one, other = (torch.load(z.open(name), weights_only=True) for z in (a, b))
            assert_equal(one, other)


def test_the_seed_decides_the_run(config: TrainConfig, finished: Path, tmp_path: Path) -> None:
    short = replace(config, total_timesteps=2 * UPDATE, eval_freq=10 * UPDATE)
    same = [train(short, tmp_path / name, progress=False) for name in ("a", "b")]
    other = train(replace(short, seed=1), tmp_path / "c", progress=False)
    a, b, c = (contents(folder / "last_model.zip")["policy.pth"] for folder in (*same, other))
    assert_equal(a, b)
    assert not torch.equal(a["action_net.bias"], c["action_net.bias"])


def test_a_cut_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(finished, folder)
    checkpoint = folder / "last_model.zip"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{checkpoint} is cut.*whole copy"):
        resume(folder, progress=False)
    damaged = bytearray(whole)
    damaged[whole.index(b"policy.pth") + 2000] ^= 0xFF
    checkpoint.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"last_model\.zip"):
        resume(folder, progress=False)
    shutil.copy(finished / "best_model.zip", checkpoint)
    with pytest.raises(CheckpointError, match="not the checkpoint of a run"):
        resume(folder, progress=False)
    checkpoint.unlink()
    with pytest.raises(CheckpointError, match=f"{checkpoint} is missing"):
        resume(folder, progress=False)


def test_refuses_what_cannot_be_resumed_or_begun(config: TrainConfig, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complete"):
        resume(finished, progress=False)
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        resume(tmp_path, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    with pytest.raises(RunFolderError, match="not empty"):
        train(config, finished, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    changed = tmp_path / "changed"
    shutil.copytree(finished, changed)
    text = (changed / "config.yaml").read_text().replace("- 64\n- 64", "- 8")
    (changed / "config.yaml").write_text(
        text.replace(f"total_timesteps: {UPDATES * UPDATE}", "total_timesteps: 9999")
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        resume(changed, progress=False)


def test_a_failed_write_keeps_the_old_checkpoint(
    config: TrainConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the third checkpoint leaves the second one, and the run continues from it."""
    replaced, write = 0, os.replace

    def full_disk(source: Any, target: Any) -> None:
        nonlocal replaced
        replaced += Path(target).name == "last_model.zip"
        if replaced > 3:
            raise OSError(28, "No space left on device")
        write(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full_disk)
        train(config, tmp_path / "full", progress=False)
    resume(tmp_path / "full", progress=False)
    assert_equal(contents(tmp_path / "full" / "last_model.zip"), contents(finished / "last_model.zip"))


def test_settings_are_strict() -> None:
    shipped = load_train_config("ppo")
    assert shipped.algo == "ppo"
    with pytest.raises(ValueError, match=r"unknown algo 'dqn'.*ppo"):
        load_train_config("dqn")
    with pytest.raises(ValueError, match="unknown algo 'sac'"):
        replace(shipped, algo="sac")
    with pytest.raises(ValueError, match=r"lerning_rate(.|\n)*known keys.*learning_rate"):
        load_train_config(lerning_rate=1.0)
    with pytest.raises(ValueError, match="n_envs must be at least 1, got 0"):
        replace(shipped, n_envs=0)
    with pytest.raises(ValueError, match="learning_rate"):
        replace(shipped, learning_rate=0.0)


def test_an_update_must_divide_into_minibatches(config: TrainConfig) -> None:
    env = TwinVecEnv(Problem.of(load_scenario(config.scenario)), ENVS)
    with pytest.raises(ValueError, match="divisor of 36"):
        build_model(replace(config, n_minibatches=5), env)


def test_static_bias_starts_at_the_static_service(config: TrainConfig) -> None:
    problem = Problem.of(load_scenario(config.scenario))
    env = TwinVecEnv(problem, ENVS)
    action, _ = build_model(replace(config, static_bias=5.0), env).predict(env.reset(), deterministic=True)
    np.testing.assert_array_equal(action, np.tile(problem.knobs.action(), (ENVS, 1)))


def test_the_command_passes_its_flags_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(train_agent, "train", lambda *args: calls.append(args))
    monkeypatch.setattr(train_agent, "resume", lambda *args: calls.append(args))
    train_agent.main(train_agent.Options(n_timesteps=7, seed=3, n_envs=4, eval_freq=5, log_folder=tmp_path))
    expected = replace(load_train_config("ppo"), total_timesteps=7, seed=3, n_envs=4, eval_freq=5)
    train_agent.main(train_agent.Options(resume=tmp_path))
    assert calls == [(expected, tmp_path), (tmp_path,)]
    with pytest.raises(ValueError, match="no other flag"):
        train_agent.main(train_agent.Options(resume=tmp_path, seed=1))
    with pytest.raises(ValueError, match="real time"):
        train_agent.main(train_agent.Options(live=True))
