"""Worker processes know the environment by its module, `thermoe_env:ThermalMoETwin-v0`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GYMNASIUM = """
import gymnasium, numpy as np

ID = "thermoe_env:ThermalMoETwin-v0"
if __name__ == "__main__":
    many = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="async", vector_kwargs={"context": "spawn"})
    observation, _ = many.reset(seed=3)
    many.close()
    for i in range(2):
        alone, _ = gymnasium.make(ID).reset(seed=3 + i)
        np.testing.assert_array_equal(observation[i], alone)
"""
STABLE_BASELINES3 = """
import gymnasium, numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

ID = "thermoe_env:ThermalMoETwin-v0"
if __name__ == "__main__":
    many = make_vec_env(ID, 2, seed=3, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "spawn"})
    observation = many.reset()
    many.close()
    for i in range(2):
        alone, _ = gymnasium.make(ID).reset(seed=3 + i)
        np.testing.assert_array_equal(observation[i], alone)
"""


@pytest.mark.parametrize("script", [GYMNASIUM, STABLE_BASELINES3], ids=["gymnasium", "stable-baselines3"])
def test_spawned_processes_find_the_environment_by_its_module(script: str, tmp_path: Path) -> None:
    """Nothing but the id names the package; a spawned process starts bare."""
    file = tmp_path / "script.py"
    file.write_text(script)
    run = subprocess.run(
        [sys.executable, str(file)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
