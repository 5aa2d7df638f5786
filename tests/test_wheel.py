"""The package as a user gets it: built, unpacked somewhere else, used from a third folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.conftest import ONE_THREAD

ROOT = Path(__file__).parents[1]
EPISODE = """
import json, gymnasium, thermoe_env, moe.data.datasets
env = gymnasium.make("ThermalMoETwin-v0", max_episode_steps=5)
env.action_space.seed(0)
observation, info = env.reset(seed=0)
rewards, truncated = [], False
while not truncated:
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation) and not terminated
    rewards.append(reward)
images, labels = moe.data.datasets.load_vision("test", full=False)
sources = [thermoe_env.__file__, moe.data.datasets.__file__]
print(json.dumps({"rewards": rewards, "images": len(images), "from": sources}))
"""


def pip(*arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)],
        check=True,
    )


def run(folder: Path, cwd: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a fresh process that finds our packages in ``folder`` first."""
    own = {"PYTHONPATH": str(folder), "THERMALMOE_DATA": "", "COLUMNS": "100"}
    environment = os.environ | ONE_THREAD | own
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def play(folder: Path, cwd: Path) -> dict:
    """Play the episode."""
    played = run(folder, cwd, sys.executable, "-c", EPISODE)
    assert played.returncode == 0, played.stderr
    return json.loads(played.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (path,) = folder.glob("thermalmoe-*.whl")
    return path


def test_wheel_holds_the_data_files_and_nothing_else_of_the_checkout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"thermoe_env/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.*")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "agents" / "templates").iterdir()}
    assert configs | templates <= names
    assert {f"moe/data/files/fashion_mnist/{name}" for name in ("train.xz", "test.xz", "LICENSE")} <= names
    language = {"tokenizer.json", "documents.npz", "small.safetensors", "small.json", "README.md", "LICENSE"}
    assert {f"moe/lm/shipped/{name}" for name in language} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"moe", "thermoe_env", "agents"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the code that the checkout has compiled: it is taken for the very same sources or not at all."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    for package in ("moe", "thermoe_env", "agents"):
        for path in (ROOT / package).rglob("__pycache__/*.nb[ci]"):
            with contextlib.suppress(FileNotFoundError):  # another process may just replace it
                shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    assert text.endswith((ROOT / "README.md").read_text())
    about = message_from_string(text)
    assert about["Description-Content-Type"] == "text/markdown"
    assert "Intended Audience :: Science/Research" in about.get_all("Classifier", [])
    assert set(about.get_all("Provides-Extra", [])) == {"dev", "ecosystem", "hf", "ray"}


@pytest.mark.slow  # the other test of the wheel trains and evaluates
def test_installed_wheel_plays_what_the_checkout_plays(installed: Path, tmp_path: Path) -> None:
    from_wheel, from_checkout = play(installed, tmp_path), play(ROOT, tmp_path)
    assert all(path.startswith(str(installed)) for path in from_wheel["from"])
    assert all(path.startswith(str(ROOT)) for path in from_checkout["from"])
    assert from_wheel["images"] == 5_000
    assert from_wheel["rewards"] == from_checkout["rewards"] and len(from_wheel["rewards"]) == 5


def test_the_wheel_alone_trains_and_evaluates(installed: Path, tmp_path: Path) -> None:
    short = "{name: short, base: vision, episode_s: 20, knobs: [batch_size, expert_count]}"
    (tmp_path / "short.yaml").write_text(short)
    commands = installed / "bin"
    tiny = "--algo ppo --scenario short.yaml -n 80 --n-envs 2 --eval-freq 40 --log-folder mine".split()
    trained = run(installed, tmp_path, sys.executable, commands / "thermalmoe-train", *tiny)
    assert trained.returncode == 0, trained.stderr
    assert "results in mine: best_model.zip" in trained.stdout
    played = "--policy mine rule_based --scenario short.yaml --seeds 2 --out results".split()
    evaluated = run(installed, tmp_path, sys.executable, commands / "thermalmoe-evaluate", *played)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "simulated (twin)" in evaluated.stdout and "rule_based" in evaluated.stdout
    assert "<table" in (tmp_path / "results" / "report.html").read_text()


ONE_AFTER_THE_OTHER = """
import contextlib, io, json, runpy, sys
ended = []
for command in json.loads(sys.argv[1]):
    sys.argv, said = command, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = runpy.run_path(command[0], run_name="__main__") and 0
        except SystemExit as end:
            code = end.code
    ended.append((code, said.getvalue()))
print(json.dumps(ended))
"""
"""Scripts in one process, which imports what they share once."""


def test_every_command_goes_by_its_own_name_and_refuses_in_its_own_words(
    installed: Path, tmp_path: Path
) -> None:
    names = [f"thermalmoe-{name}" for name in ("train", "evaluate", "calibrate", "profile")]
    asked = [[str(installed / "bin" / name), "--help"] for name in names]
    asked.append([asked[0][0], "--resume", "absent"])
    done = run(installed, tmp_path, sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    *shown, (refused, _) = json.loads(done.stdout)
    for name, (code, said) in zip(names, shown, strict=True):
        assert code == 0 and f"usage: {name} " in said
    assert refused.startswith("CheckpointError: absent holds no config.yaml")  # what Python ends by


def test_another_package_called_agents_is_named(installed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "agents").mkdir(parents=True)
    (other / "agents" / "__init__.py").write_text("raise RuntimeError('needs a key')")
    about = other / "openai_agents-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 1.0\n")
    (about / "top_level.txt").write_text("agents\n")
    expected = f"in place of ThermalMoE's: {other / 'agents' / '__init__.py'}, of openai-agents; uninstall it"
    for command in ("train", "evaluate"):
        call = f"from thermoe_env.commands import {command}; {command}()"
        shadowed = run(Path(f"{other}{os.pathsep}{installed}"), tmp_path, sys.executable, "-c", call)
        assert shadowed.returncode == 1 and expected in shadowed.stderr, shadowed.stderr
        assert len(shadowed.stderr.splitlines()) == 1


def test_a_package_that_overwrote_ours_is_named(installed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(installed, tmp_path / "overwritten")
    ours = folder / "agents" / "__init__.py"
    for content in ("", "import nothing_such"):
        ours.write_text(content)
        shadowed = run(folder, tmp_path, sys.executable, folder / "bin" / "thermalmoe-train")
        assert shadowed.returncode == 1 and f"in place of ThermalMoE's: {ours}; un" in shadowed.stderr
