"""What a training run writes to TensorBoard, and the periodic validation that keeps the best model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure

from agents.policies import Policy
from agents.vec import TwinVecEnv
from thermoe_env.batch import TwinBatch
from thermoe_env.fields import RAW_DTYPE
from thermoe_env.interval import COST_NAMES
from thermoe_env.knobs import KNOB_NAMES
from thermoe_env.problem import Problem
from thermoe_env.profiled import WORK_DTYPE
from thermoe_env.reward import REWARD_TERMS
from thermoe_env.signals import STAGES
from thermoe_env.twin import GPU_DTYPE

VALIDATION_SEEDS = range(800_000, 900_000)
"""Episodes that choose the best model; training and evaluation use other seeds."""
_KEY_EXCLUDE = ("stdout", "log", "json", "csv")


class RolloutLog(BaseCallback):
    """Logs a rollout as a whole: reward terms, device, service and knobs.

    A step copies the batch's arrays; everything else happens once, at the rollout's end.
    """

    def __init__(self, env: TwinVecEnv, n_steps: int) -> None:
        """Record rollouts of `n_steps` steps of `env`."""
        super().__init__()
        n = env.num_envs
        self._env = env
        self._work = np.zeros((n_steps, n), WORK_DTYPE)
        self._gpu = np.zeros((n_steps, n), GPU_DTYPE)
        self._raw = np.zeros((n_steps, n), RAW_DTYPE)
        self._terms = np.zeros((n_steps, n, len(REWARD_TERMS)))
        self._cost = np.zeros((n_steps, n, len(COST_NAMES)))
        self._index = np.zeros((n_steps, n, len(KNOB_NAMES)), np.int64)

    def _on_rollout_start(self) -> None:
        self._t = 0

    def _on_step(self) -> bool:
        batch, t = self._env.batch, self._t
        self._work[t], self._gpu[t], self._raw[t] = batch.work, batch.gpu, batch.raw
        self._terms[t], self._cost[t], self._index[t] = batch.terms, batch.cost, batch.index
        self._t += 1
        return True

    def _on_rollout_end(self) -> None:
        work, gpu, scenario = self._work, self._gpu, self._env.batch.problem.scenario
        for name, value in zip(REWARD_TERMS, self._terms.mean((0, 1)), strict=True):
            self.logger.record(f"reward/{name}", value * scenario.steps)
        cost = dict(zip(COST_NAMES, self._cost.mean((0, 1)) * scenario.steps, strict=True))
        for name, value in cost.items():
            self.logger.record(f"cost/{name}", value)
        self.logger.record("gpu/temp_c", gpu["temp_c"].mean())
        self.logger.record("gpu/peak_temp_c", gpu["temp_c"].max())
        self.logger.record("gpu/power_w", gpu["power_w"].mean())
        for stage, share in enumerate(
            np.bincount(self._raw["stage"].astype(np.int64).ravel(), minlength=4) / work.size
        ):
            self.logger.record(f"stage/{STAGES[stage]}", share)
        for name, value in service_metrics(work, gpu).items():
            self.logger.record(f"service/{name}", value)
        knobs = self._env.batch.problem.knobs
        for name in knobs.controlled:
            levels = np.array(knobs.levels[name])
            played = levels[self._index[..., KNOB_NAMES.index(name)].ravel()]
            self.logger.record(f"knob/{name}", torch.as_tensor(played), exclude=_KEY_EXCLUDE)


def service_metrics(work: np.ndarray, gpu: np.ndarray) -> dict[str, float]:
    """Quality, late share and energy per good answer of the intervals in `work` and `gpu` (any shape).

    Intervals that answered nothing give NaN: there is no quality without an answer.
    """
    total = {name: float(work[name].sum()) for name in WORK_DTYPE.names or ()}
    answered = total["answered_interactive"] + total["answered_deferrable"]
    expired = total["expired_interactive"] + total["expired_deferrable"]
    late = total["late_interactive"] + total["late_deferrable"]
    nan = float("nan")
    return {
        "quality": total["correct"] / answered if answered else nan,
        "late_share": (late + expired) / (answered + expired) if answered + expired else nan,
        "j_per_good": float(gpu["energy_j"].sum()) / total["good"] if total["good"] else nan,
    }


@dataclass(frozen=True)
class Validation:
    """Result of one validation."""

    mean_return: float
    metrics: dict[str, float]
    """As of `service_metrics`, and the peak temperature."""
    expert_share: np.ndarray
    """[L, E] share of each layer's routed tokens that its experts took."""


class Validator:
    """Plays policies on the same held-out episodes."""

    def __init__(self, problem: Problem, episodes: int) -> None:
        """Validate on the first `episodes` of `VALIDATION_SEEDS`."""
        self._batch = TwinBatch(problem, episodes)
        self._seeds: Sequence[int] = VALIDATION_SEEDS[:episodes]
        profile = problem.profile
        bias = np.array(problem.knobs.levels["routing_bias"])

        def at_bias(row: np.ndarray) -> np.ndarray:
            return np.interp(bias, profile.routing_bias, row)

        self._share = np.apply_along_axis(at_bias, 1, profile.expert_share)  # [K, B, L, E]

    def __call__(self, policy: Policy) -> Validation:
        """Play one episode per seed, deterministically; an episode ends for good at its first end."""
        batch, n = self._batch, self._batch.num_envs
        knobs = batch.problem.knobs
        observation, state, start = batch.reset(self._seeds), None, np.ones(n, bool)
        running, total = np.ones(n, bool), np.zeros(n)
        played: list[tuple[np.ndarray, np.ndarray]] = []
        tokens = np.zeros(self._share.shape[:2])  # [K, B]
        bias, experts = KNOB_NAMES.index("routing_bias"), KNOB_NAMES.index("expert_count")
        count = np.array(knobs.levels["expert_count"])
        for _ in range(batch.problem.scenario.steps):
            action, state = policy.predict(observation, state, start, deterministic=True)
            step = batch.step(knobs.indices(action, "multi_discrete"))
            total += np.where(running, step.reward, 0.0)
            work = batch.work[running]
            played.append((work, batch.gpu[running]))
            answered = work["answered_interactive"] + work["answered_deferrable"]
            k = batch.index[running, experts]
            np.add.at(tokens, (k, batch.index[running, bias]), answered * count[k])
            start = step.terminated | step.truncated
            running &= ~start
            observation = step.observation
        work, gpu = (np.concatenate(part) for part in zip(*played, strict=True))
        metrics = {**service_metrics(work, gpu), "peak_temp_c": float(gpu["temp_c"].max())}
        share = np.tensordot(tokens, self._share, 2)
        return Validation(float(total.mean()), metrics, share / share.sum(-1, keepdims=True))


def expert_figure(expert_share: np.ndarray) -> Figure:
    """Heat map of the share [L, E] each expert takes of its layer's tokens."""
    figure = Figure(figsize=(6.0, 2.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(expert_share, aspect="auto", cmap="viridis", vmin=0.0)
    axes.set(xlabel="expert", ylabel="layer", title="share of the layer's routed tokens")
    figure.colorbar(image, ax=axes)
    return figure


def log_validation(logger: Any, result: Validation) -> None:
    """Record a validation under `eval/`."""
    logger.record("eval/mean_return", result.mean_return)
    for name, value in result.metrics.items():
        logger.record(f"eval/{name}", value)
    logger.record(
        "eval/expert_share",
        LoggedFigure(expert_figure(result.expert_share), close=True),
        exclude=_KEY_EXCLUDE,
    )
