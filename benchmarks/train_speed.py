"""How fast training is, and where its time goes: `python -m benchmarks.train_speed`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy

from agents.learning.callbacks import RolloutLog, Updates
from agents.learning.config import load_train_config
from agents.learning.training import train
from agents.learning.vec import TwinVecEnv
from moe.errors import one_line_errors
from thermoe_env.problem.scenario import load_scenario

_PARTS: dict[str, tuple[type, str]] = {
    "environments, intervals": (TwinVecEnv, "step_wait"),
    "environments, new episodes": (TwinVecEnv, "reset"),
    "policy, actions": (ActorCriticPolicy, "forward"),
    "policy, gradients": (PPO, "train"),
    "log, every step": (RolloutLog, "_on_step"),
    "log, every round": (RolloutLog, "_record"),
    "validation": (Updates, "_validate"),
    "checkpoints": (Updates, "_save"),
}
"""What is timed. The rest is Stable-Baselines3's own bookkeeping."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the shipped training on this machine, with the shipped settings where none are given."""

    updates: int = 10
    """Updates to time."""
    torch_threads: int | None = None
    n_envs: int | None = None
    n_epochs: int | None = None
    scenario: str | None = None


def main(options: Options) -> dict[str, float]:
    """Time a training run; returns the seconds of each part, of `all`, and `steps_per_s`."""
    given = {name: getattr(options, name) for name in ("torch_threads", "n_envs", "n_epochs", "scenario")}
    config = load_train_config("ppo", **{key: value for key, value in given.items() if value is not None})
    update = config.n_envs * load_scenario(config.scenario).steps
    spent = dict.fromkeys(_PARTS, 0.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train(
            replace(config, total_timesteps=update), folder / "warm-up", progress=False
        )  # compiles, imports
        for name, (owner, method) in _PARTS.items():
            stack.enter_context(_timed(owner, method, name, spent))
        start = time.perf_counter()
        steps = options.updates * update
        train(replace(config, total_timesteps=steps), folder / "timed", progress=False)
        wall = time.perf_counter() - start
    return {**spent, "all": wall, "steps_per_s": steps / wall}


@contextmanager
def _timed(owner: type, method: str, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add the time spent in `owner.method` to `spent[name]`."""
    original: Callable[..., Any] = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, original)


if __name__ == "__main__":
    with one_line_errors():
        result = main(tyro.cli(Options, description=__doc__))
        for part, seconds in result.items():
            if part in _PARTS:
                print(f"{part:28}{seconds:8.2f} s {seconds / result['all']:7.1%}")
        rest = result["all"] - sum(result[part] for part in _PARTS)
        print(f"{'the rest':28}{rest:8.2f} s {rest / result['all']:7.1%}")
        print(f"{'all':28}{result['all']:8.2f} s {result['steps_per_s']:10,.0f} steps/s")
