"""Training runs at small scale: what they write, and that stopping them changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.results_plotter import X_TIMESTEPS, ts2xy
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from agents.files import LOCK_FILE, RunFolderError
from agents.learning.algorithms import OnPolicySettings
from agents.learning.checkpoints import CheckpointError
from agents.learning.config import TrainConfig, load_train_config
from agents.learning.models import ModelFileError
from agents.learning.training import resume, train
from agents.learning.validation import COMPARED, VALIDATION_SEEDS
from agents.load import load_policy
from agents.play.rollout import play_twin
from tests.agents.conftest import ENVS, STEPS, TINY, UPDATE, UPDATES, stop_after
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


@pytest.fixture(scope="module")
def finished_runs(
    configs: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs that were never stopped, by algorithm.

    Before the first, another is made: the first of a process loads and compiles on the way.
    """
    folder = tmp_path_factory.mktemp("run")
    train(replace(configs["ppo"], total_timesteps=2 * UPDATE), folder / "first", progress=False)

    def finished(algo: str) -> Path:
        if not (folder / algo).exists():
            train(configs[algo], folder / algo, progress=False)
        return folder / algo

    return finished


@pytest.fixture(scope="module")
def finished(finished_runs: Callable[[str], Path]) -> Path:
    return finished_runs("ppo")


def contents(path: Path) -> dict[str, Any]:
    """All tensors (parameters, optimizers), replayed steps and the training state of a zip."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        found: dict[str, Any] = {
            name: torch.load(archive.open(name), weights_only=True) for name in names if name.endswith(".pth")
        }
        found |= {name: np.load(archive.open(name)) for name in names if name.startswith("replay/")}
        if "training_state.json" in names:
            found["state"] = json.loads(archive.read("training_state.json"))
        return found


def assert_equal(one: Any, other: Any) -> None:
    """Equal bit for bit, through nested containers."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"differ by up to {(one.double() - other.double()).abs().max():.3g}"
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_a_run_holds_all_files_and_tags(finished: Path, config: TrainConfig) -> None:
    names = {path.name for path in finished.iterdir()}
    files = {
        "config.yaml",
        "scenario.yaml",
        "interface.json",
        LOCK_FILE,
        "command.txt",
        "versions.json",
        "best_model.zip",
        "last_model.zip",
        "evaluations.npz",
        "monitor.csv",
    }
    assert names == files | {"tb"}  # and no half-written file
    assert load_train_config(finished / "config.yaml") == config
    assert load_scenario(finished / "scenario.yaml") == load_scenario(config.scenario)

    events = EventAccumulator(str(finished / "tb"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    scalars = {
        *(f"reward/{name}" for name in REWARD_TERMS), *(f"stage/{name}" for name in STAGES),
        "gpu/temp_c", "gpu/peak_c", "gpu/power_w", "cost/above_limit_s", "cost/over_budget_j",
        "service/quality", "service/late_fraction", "service/j_per_good", "eval/mean_reward",
        "eval/j_per_good", "eval/mean_reward_static", "eval/mean_reward_sampled", "eval/mean_ep_length",
        "eval/served_share", "rollout/ep_rew_mean", "train/value_loss", "time/fps",
    }  # fmt: skip
    assert scalars <= set(tags["scalars"])
    knobs = load_scenario(config.scenario).knobs
    assert {f"knob/{name}" for name in knobs} == set(tags["histograms"])
    assert tags["images"] == ["eval/expert_share"]
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [
        2 * UPDATE,
        4 * UPDATE,
        5 * UPDATE,
    ]
    # What the rollouts add up to, against what Stable-Baselines3 took from the episode records.
    for k, mean in enumerate(events.Scalars("rollout/ep_rew_mean")):
        terms = sum(events.Scalars(f"reward/{name}")[k].value for name in REWARD_TERMS)
        assert terms == pytest.approx(mean.value, rel=1e-4)
    assert sum(events.Scalars(f"stage/{name}")[-1].value for name in STAGES) == pytest.approx(1.0)


@pytest.mark.parametrize("algo", TINY)
def test_every_kind_logs_whole_rounds_and_its_hyper_parameters(
    algo: str, finished_runs: Callable[[str], Path], configs: dict[str, TrainConfig]
) -> None:
    events = EventAccumulator(str(finished_runs(algo) / "tb")).Reload()
    assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [
        UPDATE * (k + 1) for k in range(UPDATES)
    ]
    for k, mean in enumerate(events.Scalars("rollout/ep_rew_mean")):
        terms = sum(events.Scalars(f"reward/{name}")[k].value for name in REWARD_TERMS)
        assert terms == pytest.approx(mean.value, rel=1e-4)
    written = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    plugin: Any = plugin_data_pb2
    shown = plugin.HParamsPluginData.FromString(written).session_start_info.hparams
    assert shown["algo"].string_value == algo and shown["n_envs"].number_value == ENVS
    assert shown["learning_rate"].number_value == configs[algo].settings.learning_rate


def test_the_tab_of_hyper_parameters_compares_runs(
    configs: dict[str, TrainConfig], finished_runs: Callable[[str], Path]
) -> None:
    """What TensorBoard's own plugin answers for a folder of two runs, against configurations and scalars."""
    runs = {algo: finished_runs(algo) for algo in ("ppo", "sac")}
    events = EventMultiplexer().AddRunsFromDirectory(str(runs["ppo"].parent)).Reload()
    provider = MultiplexerDataProvider(events, str(runs["ppo"].parent))
    api: Any = api_pb2
    request = api.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=[0, 1, 2, 3])
    tab = Context(TBContext(data_provider=provider))
    shown = {group.name: group for group in Handler(RequestContext(), tab, "", request).run().session_groups}
    for algo, run in runs.items():
        group = shown[f"{algo}/tb"]
        assert group.hparams["algo"].string_value == algo
        assert group.hparams["gamma"].number_value == configs[algo].settings.gamma
        scalars = EventAccumulator(str(run / "tb")).Reload()
        values = {metric.name.tag: metric.value for metric in group.metric_values}
        assert set(values) == {f"eval/{name}" for name in COMPARED}
        assert values == {tag: scalars.Scalars(tag)[-1].value for tag in values}
        assert values["eval/mean_reward_best"] == max(
            event.value for event in scalars.Scalars("eval/mean_reward")
        )


def test_the_best_model_is_the_one_that_validated_best(finished: Path) -> None:
    problem = Problem.of(load_scenario(finished / "scenario.yaml"))
    seen = EventAccumulator(str(finished / "tb")).Reload().Scalars("eval/mean_reward")
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


@pytest.mark.parametrize(
    ("algo", "stop"),
    [
        ("ppo", STEPS // 2), ("ppo", 2 * STEPS + STEPS // 3), ("ppo", 4 * STEPS),
        ("recurrent_ppo", 2 * STEPS + STEPS // 3), ("dqn", 3 * STEPS + 1), ("sac", 3 * STEPS + 1),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(
    algo: str,
    stop: int,
    configs: dict[str, TrainConfig],
    finished_runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the first episodes, amid later ones, and between two rounds."""
    folder, finished = tmp_path / "stopped", finished_runs(algo)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"--resume {folder}"):
        stop_after(patch, stop)
        train(configs[algo], folder, progress=False)
    kept = contents(folder / "last_model.zip")["state"]["num_timesteps"]
    assert kept == stop // STEPS * UPDATE
    torch.manual_seed(99)  # a process of its own would start with other generators
    np.random.seed(99)  # noqa: NPY002
    resume(folder, progress=False)
    for name in ("last_model.zip", "best_model.zip"):
        assert_equal(contents(folder / name), contents(finished / name))
    assert (folder / "evaluations.npz").read_bytes() == (finished / "evaluations.npz").read_bytes()
    played = load_results(str(folder))
    for column in ("r", "l"):
        assert played[column].tolist() == load_results(str(finished))[column].tolist()
    assert played.t.is_monotonic_increasing


def test_stable_baselines3_reads_the_logs_of_a_run(
    finished_runs: Callable[[str], Path], configs: dict[str, TrainConfig]
) -> None:
    """Its own readers, against TensorBoard's scalars."""
    for algo in TINY:
        run = finished_runs(algo)
        events = EventAccumulator(str(run / "tb")).Reload()
        played = load_results(str(run))
        assert len(played) == UPDATES * ENVS and set(played.l) == {STEPS}
        means = played.r.to_numpy().reshape(UPDATES, ENVS).mean(1)
        assert means == pytest.approx([e.value for e in events.Scalars("rollout/ep_rew_mean")], rel=1e-4)
        assert ts2xy(played, X_TIMESTEPS)[0][-1] == UPDATES * UPDATE
        with np.load(run / "evaluations.npz") as kept:
            assert kept["timesteps"].tolist() == [2 * UPDATE, 4 * UPDATE, 5 * UPDATE]
            assert kept["results"].shape == kept["ep_lengths"].shape == (3, 2)
            assert kept["results"].mean(1) == pytest.approx(
                [event.value for event in events.Scalars("eval/mean_reward")], rel=1e-5
            )
        sampled = isinstance(configs[algo].settings, OnPolicySettings)
        assert ("eval/mean_reward_sampled" in events.Tags()["scalars"]) == sampled


def test_a_run_that_lost_its_logs_is_not_continued(config: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(config, total_timesteps=UPDATE), tmp_path / "run", progress=False)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace(f"total_timesteps: {UPDATE}", f"total_timesteps: {2 * UPDATE}")
    )
    for name, damage in (("monitor.csv", b"#{}"), ("evaluations.npz", b"PK")):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(damage)
        with pytest.raises(CheckpointError, match=f"{name} lacks.*whole copy"):
            resume(run, progress=False)
        (run / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} lacks.*No such file"):
            resume(run, progress=False)
        (run / name).write_bytes(whole)
    resume(run, progress=False)


def test_a_checkpoint_holds_the_whole_replay_buffer(finished_runs: Callable[[str], Path]) -> None:
    kept = contents(finished_runs("sac") / "last_model.zip")
    assert len(kept["replay/rewards.npy"]) == UPDATES * STEPS  # all steps that were played
    assert kept["replay/timeouts.npy"].sum() == UPDATES * ENVS  # every episode's end
    assert len(contents(finished_runs("dqn") / "last_model.zip")["replay/rewards.npy"]) == 90 // ENVS
    assert not any("replay" in name for name in contents(finished_runs("sac") / "best_model.zip"))


def test_checkpoints_keep_to_save_freq(
    configs: dict[str, TrainConfig],
    finished_runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match=f"{2 * UPDATE} steps are kept"),
    ):
        stop_after(patch, 3 * STEPS + 1)
        train(replace(configs["dqn"], save_freq=UPDATE + 1), tmp_path / "stopped", progress=False)
    resume(tmp_path / "stopped", progress=False)
    assert_equal(
        contents(tmp_path / "stopped" / "last_model.zip"), contents(finished_runs("dqn") / "last_model.zip")
    )


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


def test_a_run_of_another_field_table_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(finished, folder)
    table = json.loads((folder / "interface.json").read_text())
    table["fields"]["humidity"] = table["fields"].pop("temp_c")
    (folder / "interface.json").write_text(json.dumps(table))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        text.replace(f"total_timesteps: {UPDATES * UPDATE}", "total_timesteps: 9999")
    )
    with pytest.raises(CheckpointError, match=r"only there: \['humidity'\].*only here: \['temp_c'\]"):
        resume(folder, progress=False)


def test_a_model_of_other_ranges_is_refused_by_the_fields(finished: Path, config: TrainConfig) -> None:
    granted = Problem.of(load_scenario(config.scenario, power_budget={"normal_w": 900.0}))
    powers = r"\['budget_ahead_w', 'budget_w', 'power_slow_w', 'power_w'\]"
    with pytest.raises(ModelFileError, match=f"of other units or ranges: {powers}"):
        load_policy(finished, granted)


def test_a_model_for_other_knobs_is_refused_by_what_differs(finished: Path, config: TrainConfig) -> None:
    fewer = Problem.of(load_scenario(config.scenario, knobs=["batch_size", "expert_count"]))
    with pytest.raises(
        ModelFileError, match=r"knobs \(and how many levels\) .*'routing_bias'.* there, .* here"
    ):
        load_policy(finished, fewer)
    # Levels of the same number may stand for other values: they are another card's.
    assert load_policy(finished, Problem.of(load_scenario(config.scenario)))
