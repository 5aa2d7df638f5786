"""The package as a user gets it: built, unpacked somewhere else, used from a third folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def play(folder: Path, cwd: Path) -> dict:
    """Play the episode in a fresh process that finds our packages in ``folder`` first."""
    environment = os.environ | {"PYTHONPATH": str(folder), "THERMALMOE_DATA": ""}
    command = [sys.executable, "-c", EPISODE]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (path,) = folder.glob("thermalmoe-*.whl")
    return path


def test_wheel_holds_the_data_files_and_nothing_else_of_the_checkout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"thermoe_env/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.*")}
    assert configs <= names
    assert {f"moe/data/files/fashion_mnist/{name}" for name in ("train.xz", "test.xz", "LICENSE")} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"moe", "thermoe_env", "agents"}


def test_installed_wheel_plays_what_the_checkout_plays(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--target", installed, wheel)
    from_wheel, from_checkout = play(installed, elsewhere), play(ROOT, elsewhere)
    assert all(path.startswith(str(installed)) for path in from_wheel["from"])
    assert all(path.startswith(str(ROOT)) for path in from_checkout["from"])
    assert from_wheel["images"] == 5_000
    assert from_wheel["rewards"] == from_checkout["rewards"] and len(from_wheel["rewards"]) == 5
