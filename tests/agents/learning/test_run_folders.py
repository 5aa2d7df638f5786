"""What a run was trained on is what it continues on, and one process at a time writes into its folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from agents.files import LOCK_FILE, FolderInUseError, locked
from agents.learning.checkpoints import CheckpointError
from agents.learning.config import TrainConfig
from agents.learning.interface import InterfaceError, began_with, changed_inputs
from agents.learning.seeds import train_seeds
from agents.learning.training import resume, train
from agents.learning.tuning import tune
from agents.load import load_policy
from moe.profiles import save_profile
from tests.agents.conftest import STEPS, UPDATE
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scenario whose profile, twin, request trace and inlet are files of the user's."""
    folder = tmp_path_factory.mktemp("world")
    save_profile(make_profile(), folder / "profile.json")
    shutil.copy(config_path("twin", "h100", ".yaml"), folder / "twin.yaml")
    shutil.copy(config_path("traces/requests", "azure-conv-2023", ".csv"), folder / "trace.csv")
    (folder / "aisle.csv").write_text("t_s,offset_c\n0,0.5\n100,1.5\n")
    said = {
        "name": "mine", "base": "vision", "profile": "profile.json", "twin": "twin.yaml", "episode_s": STEPS,
        "traffic": {"kind": "trace", "trace": "trace.csv"},
        "inlet": {"kind": "trace", "trace": "aisle.csv"},
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(said))
    return folder


@pytest.fixture(scope="module")
def world_and_run(world: Path, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that world, with a run in it that has a round to go."""
    folder = tmp_path_factory.mktemp("begun") / "world"
    shutil.copytree(world, folder)
    short = replace(config, scenario=str(folder / "mine.yaml"), total_timesteps=UPDATE)
    run = train(short, folder / "run", progress=False)
    replaced(run / "config.yaml", f"total_timesteps: {UPDATE}", f"total_timesteps: {2 * UPDATE}")
    return folder


@pytest.fixture
def stopped(world_and_run: Path, tmp_path: Path) -> Path:
    """That run in a copy of its own, which reads the files of the copy."""
    shutil.copytree(world_and_run, tmp_path / "world")
    run = tmp_path / "world" / "run"
    for name in ("config.yaml", "scenario.yaml"):
        text = (run / name).read_text()
        assert str(world_and_run) in text
        (run / name).write_text(text.replace(str(world_and_run), str(tmp_path / "world")))
    return run


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


CHANGES = {
    "the twin": ("twin.yaml", "r_sink_c_per_w: 0.02", "r_sink_c_per_w: 0.03"),
    "the profile": ("profile.json", "{", "{ "),
    "the trace": ("trace.csv", "18:44:00", "18:44:01"),
    "the inlet": ("aisle.csv", "0,0.5", "0,0.6"),
    "the scenario": ("run/scenario.yaml", "heat: 5.0", "heat: 2.0"),
}
"""What is said to have changed: file, old and new text."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_continue_in_another_world(stopped: Path, name: str) -> None:
    file, old, new = CHANGES[name]
    replaced(stopped.parent / file, old, new)
    said = name if name == "the scenario" else f"{name} {stopped.parent / file}"
    before = (stopped / "best_model.zip").read_bytes()
    with pytest.raises(CheckpointError, match=rf"contents of {said}: put back what was there"):
        resume(stopped, progress=False)
    assert (stopped / "best_model.zip").read_bytes() == before


def test_a_run_continues_where_its_files_were_moved(stopped: Path) -> None:
    """Contents count, not where they lie."""
    (stopped.parent / "twin.yaml").rename(stopped.parent / "calibrated.yaml")
    replaced(stopped / "scenario.yaml", "/twin.yaml", "/calibrated.yaml")
    resume(stopped, progress=False)


def test_a_run_is_evaluated_elsewhere_and_what_differs_is_told(stopped: Path) -> None:
    elsewhere = Problem.of(load_scenario(stopped / "scenario.yaml", limits={"temperature_c": 60.0}))
    assert load_policy(stopped, elsewhere)
    assert changed_inputs(stopped, elsewhere) == ["the scenario"]
    assert changed_inputs(stopped, Problem.of(load_scenario(stopped / "scenario.yaml"))) == []


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"trained_on": 3}'])
def test_a_run_without_a_whole_interface_is_neither_continued_nor_played(
    stopped: Path, content: str | None
) -> None:
    problem, file = Problem.of(load_scenario(stopped / "scenario.yaml")), stopped / "interface.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    said = f"{file} is {'missing' if content is None else 'damaged'}.*train again"
    with pytest.raises(InterfaceError, match=said):
        resume(stopped, progress=False)
    with pytest.raises(InterfaceError, match=said):
        load_policy(stopped, problem)


def test_a_run_without_digests_is_not_continued(stopped: Path) -> None:
    file = stopped / "interface.json"
    kept = json.loads(file.read_text())
    del kept["trained_on"]
    file.write_text(json.dumps(kept))
    with pytest.raises(InterfaceError, match=r"damaged.*trained_on"):
        resume(stopped, progress=False)


def test_seeds_and_searches_do_not_go_on_in_another_world(
    world: Path, config: TrainConfig, tmp_path: Path
) -> None:
    shutil.copytree(world, tmp_path / "world")
    short = replace(config, scenario=str(tmp_path / "world" / "mine.yaml"), total_timesteps=UPDATE)
    train_seeds(short, (0,), tmp_path / "seeds", progress=False)
    tune(short, 1, tmp_path / "search", progress=False)
    replaced(tmp_path / "world" / "twin.yaml", *CHANGES["the twin"][1:])
    with pytest.raises(CheckpointError, match="seed-0 was begun with other contents of the twin"):
        train_seeds(short, (0, 1), tmp_path / "seeds", progress=False)
    with pytest.raises(CheckpointError, match="search was begun with other contents of the twin"):
        tune(short, 2, tmp_path / "search", progress=False)


def test_what_a_run_began_with_is_kept_and_not_needed_any_more(
    world: Path, config: TrainConfig, tmp_path: Path
) -> None:
    short = replace(config, scenario=str(world / "mine.yaml"), total_timesteps=UPDATE)
    first, other = (
        train(replace(short, seed=seed), tmp_path / f"first-{seed}", progress=False) / "best_model.zip"
        for seed in (0, 1)
    )
    whole, start = first.read_bytes(), tmp_path / "first-0"
    digest = hashlib.sha256(whole).hexdigest()
    again = replace(short, trained_agent=str(start))
    train_seeds(again, (0,), tmp_path / "seeds", progress=False)
    run = tmp_path / "seeds" / "seed-0"
    assert json.loads((run / "interface.json").read_text())["began_with"] == digest
    shutil.copy(other, first)
    with pytest.raises(CheckpointError, match=r"seed-0 began with another model than .*first-0/best_model"):
        train_seeds(again, (0, 1), tmp_path / "seeds", progress=False)
    shutil.rmtree(start)
    replaced(run / "config.yaml", f"total_timesteps: {UPDATE}", f"total_timesteps: {2 * UPDATE}")
    resume(run, progress=False)
    assert began_with(run) == digest


HOLD = """
import sys, time
from pathlib import Path
from agents.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_trains_in_a_folder(stopped: Path, config: TrainConfig, tmp_path: Path) -> None:
    """Another process holds them, and the system frees them when it is killed."""
    short = replace(config, total_timesteps=UPDATE)
    train_seeds(short, (0,), tmp_path / "seeds", progress=False)
    tune(short, 1, tmp_path / "search", progress=False)
    again: dict[Path, Callable[[], object]] = {
        stopped: lambda: resume(stopped, progress=False),
        tmp_path / "seeds": lambda: train_seeds(short, (0, 1), tmp_path / "seeds", progress=False),
        tmp_path / "search": lambda: tune(short, 2, tmp_path / "search", progress=False),
    }
    for folder, go_on in again.items():
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} is training in {folder}: wait"):
            go_on()
        holder.kill()
        holder.communicate()
        go_on()


def test_a_lock_names_its_holder_and_refuses_a_second_one(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), locked(tmp_path):
            raise AssertionError("held twice")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 2000])
def test_a_damaged_search_is_named(content: bytes, config: TrainConfig, tmp_path: Path) -> None:
    short = replace(config, total_timesteps=UPDATE)
    tune(short, 1, tmp_path / "search", progress=False)
    (tmp_path / "search" / "study.db").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"study\.db is no database of a search.*whole copy"):
        tune(short, 2, tmp_path / "search", progress=False)
