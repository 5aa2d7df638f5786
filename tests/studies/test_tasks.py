"""Tasks of a study: their resumption, in this process and on Ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moe.errors import DataCorruptError
from studies.tasks import StudyError, load_results, read_table, run_tasks

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Count:
    """A task that counts how often it was run."""

    number: int
    ran: list[int] = field(default_factory=list)
    factor: int = 1
    fails: bool = False
    gpus: int = 0

    @property
    def name(self) -> str:
        return f"count-{self.number}"

    def settings(self) -> dict[str, Any]:
        return {"number": self.number, "factor": self.factor}

    def run(self) -> dict[str, Any]:
        if self.fails:
            raise ValueError("it fails")
        self.ran.append(self.number)
        return {"settings": self.settings(), "value": self.number * self.factor}


def test_only_missing_tasks_are_run(tmp_path: Path) -> None:
    ran: list[int] = []
    tasks = [Count(n, ran) for n in range(4)]
    run_tasks(tasks, tmp_path)
    assert ran == [0, 1, 2, 3] and [p.name for p in tmp_path.glob("*.part")] == []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "count-2.json").unlink()
    with pytest.raises(StudyError, match="lacks 1 results, count-2 first"):
        load_results(tasks, tmp_path)
    run_tasks(tasks, tmp_path)
    assert ran == [0, 1, 2, 3, 2]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [path.name for path in before if before[path] != after[path]] == ["count-2.json"]
    assert [result["value"] for result in load_results(tasks, tmp_path).values()] == [0, 1, 2, 3]


def test_a_failing_task_leaves_what_was_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it fails"):
        run_tasks([Count(0), Count(1, fails=True), Count(2)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["count-0.json"]


def test_results_of_other_settings_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    run_tasks([Count(1)], tmp_path)
    with pytest.raises(StudyError, match="other settings"):
        run_tasks([Count(1, factor=2)], tmp_path)
    for content, said in (("{", "is no JSON"), ("", "is no JSON"), ("[]", "an object"), ("{}", "'settings'")):
        (tmp_path / "count-1.json").write_text(content)
        with pytest.raises(DataCorruptError, match=rf"count-1\.json .*{said}.*remove it to run it again"):
            run_tasks([Count(1)], tmp_path)
    with pytest.raises(StudyError, match="different names"):
        run_tasks([Count(1), Count(1)], tmp_path)


def test_tables_of_another_study_are_whole_or_named(tmp_path: Path) -> None:
    file = tmp_path / "cells.csv"
    refused = {None: "holds no cells.csv", "": "is no table", "a\n1\n": r"lacks columns \['task'\]"}
    for content, said in refused.items():
        if content is not None:
            file.write_text(content)
        with pytest.raises(StudyError, match=rf"{said}.*give a folder of `python -m studies.routing`"):
            read_table(file, ("task",), "studies.routing")
    file.write_text("task,x\nvision,1\n")
    assert read_table(file, ("task",), "studies.routing").x.tolist() == [1]


LOST_WORKER = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path

import ray
from moe.errors import DataCorruptError
from studies.tasks import load_results, run_tasks

@dataclass(frozen=True)
class Fragile:
    number: int
    folder: str
    gpus: int = 0

    @property
    def name(self):
        return f"fragile-{self.number}"

    def settings(self):
        return {"number": self.number}

    def run(self):
        with open(Path(self.folder) / f"tries-{self.number}", "a") as file:
            file.write("x")
        tries = (Path(self.folder) / f"tries-{self.number}").stat().st_size
        if self.number == 1 and tries == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.number == 2:
            raise ValueError("two is refused")
        return {"settings": self.settings(), "value": self.number, "pid": os.getpid()}

folder = Path(sys.argv[1])
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
tasks = [Fragile(number, str(folder)) for number in range(2)]
run_tasks(tasks, folder / "tasks", "local")
results = load_results(tasks, folder / "tasks")
assert [result["value"] for result in results.values()] == [0, 1], results
assert os.getpid() not in {result["pid"] for result in results.values()}
try:
    run_tasks([*tasks, Fragile(2, str(folder))], folder / "tasks", "local")
except ValueError as error:
    print("refused:", error)
print([(folder / f"tries-{number}").stat().st_size for number in range(3)])
ray.shutdown()
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install '.[ray]'")
def test_a_lost_workers_task_is_done_again_and_a_refused_one_is_not(tmp_path: Path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(LOST_WORKER)
    command, path = [sys.executable, str(script), str(tmp_path)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"refused: two is refused", "[1, 2, 1]"} <= set(done.stdout.splitlines())  # Ray speaks too


def test_without_an_address_ray_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom studies.plays import Play\n"
        "from studies.tasks import run_tasks\nimport studies.run\n"
        "play = Play(name='x', policy='static', seeds=(1,), overrides={'episode_s': 10})\n"
        "run_tasks([play], Path(sys.argv[1]))\nprint('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
