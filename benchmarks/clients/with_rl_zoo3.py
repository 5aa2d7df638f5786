"""`train`, `enjoy` with `--gym-packages`: the return that is printed is the plain environment's."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
from stable_baselines3 import PPO

from benchmarks.clients.plain import ID

STEPS, SEED = 300, 3
SETTINGS = f"""
default:
  n_envs: 2
  n_timesteps: {2 * STEPS}
  policy: MlpPolicy
  n_steps: {STEPS}
  batch_size: {STEPS}
  n_epochs: 1
"""


def zoo(command: str, folder: Path, *arguments: str) -> str:
    """What a command of the zoo prints."""
    parts = [
        *(sys.executable, "-m", f"rl_zoo3.{command}", "--algo", "ppo", "--device", "cpu"),
        *("--gym-packages", "thermoe_env", "--seed", str(SEED), "-f", str(folder)),
    ]
    run = subprocess.run([*parts, *arguments], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def main(folder: Path) -> None:
    """Train in two processes, play what was saved, and play it again without the zoo."""
    settings = folder / "settings.yml"
    settings.write_text(SETTINGS)
    name = ID.partition(":")[2]
    zoo("train", folder, "--env", name, "-conf", str(settings), "--vec-env", "subproc", "--eval-freq", "-1")
    printed = zoo("enjoy", folder, "--env", name, "-n", str(STEPS), "--no-render")
    shown = [float(text) for text in re.findall(r"Episode Reward: (\S+)", printed)]
    (saved,) = folder.glob(f"ppo/*/{name}.zip")
    model, env = PPO.load(saved, device="cpu"), gymnasium.make(ID)
    (observation, _), total, ended = env.reset(seed=SEED), 0.0, False
    while not ended:
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    assert len(shown) == 1 and abs(shown[0] - total) < 0.02, (shown, total)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
