"""What a training run does beside learning: TensorBoard, validation, checkpoints, fresh episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure
from tqdm import tqdm

from agents.learning.checkpoints import save_model
from agents.learning.config import TrainConfig
from agents.learning.models import ModelPolicy
from agents.learning.vec import TwinVecEnv, fresh_seed
from agents.play.metrics import KPIS, episode_metrics
from agents.play.rollout import play_twin
from agents.policies.registry import make_policy
from moe.workload import KNOB_NAMES, WORK_DTYPE
from thermoe_env.mdp.fields import RAW_DTYPE
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import STAGES
from thermoe_env.twin.heat import GPU_DTYPE

VALIDATION_SEEDS = range(800_000, 900_000)
"""Episodes that choose the best model, from the first on; training and evaluation use other seeds."""
COMPARED = ("return", "return_best", "j_per_good", "quality", "late_fraction", "peak_c", "above_limit_s")
"""Validation scalars (`eval/...`) by which TensorBoard's tab of hyper-parameters compares runs."""


Watch = Callable[[int, float], None]
"""Told of every validation: steps so far and mean return. What it raises ends the run."""


class RolloutLog(BaseCallback):
    """Logs each round, one episode in every environment: reward terms, costs, device, service, knobs.

    A step copies the batch's arrays; everything else happens once, at the round's end. Sums are per episode.
    """

    def __init__(self, env: TwinVecEnv) -> None:
        """Record the rounds of `env`."""
        super().__init__()
        shape = (env.batch.problem.scenario.steps, env.num_envs)
        self._batch = env.batch
        self._work = np.zeros(shape, WORK_DTYPE)
        self._gpu = np.zeros(shape, GPU_DTYPE)
        self._raw = np.zeros(shape, RAW_DTYPE)
        self._terms = np.zeros((*shape, len(REWARD_TERMS)))
        self._cost = np.zeros((*shape, len(COST_NAMES)))
        self._index = np.zeros((*shape, len(KNOB_NAMES)), np.int64)

    def _on_step(self) -> bool:
        batch, steps = self._batch, len(self._work)
        t = (self.model.num_timesteps // batch.num_envs - 1) % steps
        self._work[t], self._gpu[t], self._raw[t] = batch.work, batch.gpu, batch.raw
        self._terms[t], self._cost[t], self._index[t] = batch.terms, batch.cost, batch.index
        if t == steps - 1:
            self._record()
        return True

    def _record(self) -> None:
        def record(group: str, **values: float) -> None:
            for name, value in values.items():
                self.logger.record(f"{group}/{name}", value)

        gpu, steps = self._gpu, len(self._gpu)
        work = {name: self._work[name].sum() for name in WORK_DTYPE.names or ()}
        record("reward", **dict(zip(REWARD_TERMS, self._terms.mean((0, 1)) * steps, strict=True)))
        record("cost", **dict(zip(COST_NAMES, self._cost.mean((0, 1)) * steps, strict=True)))
        record("gpu", temp_c=gpu["temp_c"].mean(), peak_c=gpu["temp_c"].max(), power_w=gpu["power_w"].mean())
        stage = np.bincount(self._raw["stage"].astype(np.int64).ravel(), minlength=len(STAGES))
        record("stage", **dict(zip(STAGES, stage / stage.sum(), strict=True)))
        answered = work["answered"]
        settled = answered + work["expired"]
        late = self._cost[..., COST_NAMES.index("missed")].sum()
        # The larger of 1 and the count: a round without one answer has quality 0, not a division by zero.
        record(
            "service", quality=work["correct"] / max(1.0, answered), late_fraction=late / max(1.0, settled),
            j_per_good=gpu["energy_j"].sum() / max(1.0, work["good"]),
        )  # fmt: skip
        knobs = self._batch.problem.knobs
        for name in knobs.controlled:
            played = np.array(knobs.levels[name])[self._index[..., KNOB_NAMES.index(name)]]
            self.logger.record(f"knob/{name}", torch.as_tensor(played.ravel()))


class Updates(BaseCallback):
    """What happens between rounds: validation, checkpoint, fresh episodes.

    The episodes of a round follow from the run's seed and the round's number, so that a run continued from a
    checkpoint plays the same ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        env: TwinVecEnv,
        folder: Path,
        state: dict[str, Any] | None,
        bar: tqdm,
        watch: Watch | None,
    ) -> None:
        """Keep `best_model.zip` and `last_model.zip` in `folder`; continue from a checkpoint's `state`."""
        super().__init__()
        self._config, self._env, self._folder, self._bar, self._watch = config, env, folder, bar, watch
        self._round = env.batch.problem.scenario.steps * env.num_envs
        self._eval_seeds = VALIDATION_SEEDS[: config.eval_episodes]
        self._best: float | None = state["best_return"] if state else None
        self._validated_at: int = state["validated_at"] if state else 0
        self._saved_at: int = state["num_timesteps"] if state else 0

    def _on_training_start(self) -> None:
        problem = self._env.batch.problem
        static = play_twin(problem, make_policy("static", problem), self._eval_seeds, "static")
        self._static_return = float(static.reward.sum(0).mean())

    def _on_rollout_start(self) -> None:
        number, within = divmod(self.model.num_timesteps, self._round)
        if not within:
            self._begin(number)

    def _begin(self, number: int) -> None:
        """Start round `number`."""
        steps = self.model.num_timesteps
        if steps // self._config.eval_freq > self._validated_at // self._config.eval_freq:
            self._validate()
        if steps - self._saved_at >= self._config.save_freq:
            self._save()
        self._env.seed(fresh_seed(self._config.seed, number))
        self.model._last_obs = self._env.reset()
        self.model._last_episode_starts = np.ones(self._env.num_envs, bool)

    def _on_step(self) -> bool:
        self._bar.update(self._env.num_envs)
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self._validated_at:
            self._validate()
        self._save()

    def _save(self) -> None:
        progress = {"best_return": self._best, "validated_at": self._validated_at}
        save_model(self.model, self._folder / "last_model.zip", progress)
        self._saved_at = self.model.num_timesteps

    def _validate(self) -> None:
        """Play the held-out episodes deterministically; keep the model if its mean return is the best."""
        problem = self._env.batch.problem
        policy = ModelPolicy(self.model.policy, self._config.action_mode, problem.knobs)
        recording = play_twin(problem, policy, self._eval_seeds, "validation")
        mean = dict(zip(KPIS, episode_metrics(recording)[list(KPIS)].to_numpy(float).mean(0), strict=True))
        for name, value in mean.items():
            self.logger.record(f"eval/{name}", value)
        improved = self._best is None or mean["return"] > self._best
        if improved:
            self._best = float(mean["return"])
        self.logger.record("eval/return_best", self._best)
        self.logger.record("eval/return_static", self._static_return)
        figure = expert_figure(recording.tokens_per_expert.sum((0, 1)))
        self.logger.record("eval/expert_share", LoggedFigure(figure, close=True))
        self.logger.dump(self.model.num_timesteps)
        self._validated_at = self.model.num_timesteps
        if improved:
            save_model(self.model, self._folder / "best_model.zip")
        shown = {"return": mean["return"], "best": self._best, "static": self._static_return}
        self._bar.set_postfix({name: f"{value:.1f}" for name, value in shown.items()})
        if self._watch is not None:
            self._watch(self._validated_at, float(mean["return"]))


def expert_figure(tokens_per_expert: np.ndarray) -> Figure:
    """Heat map of the share that each expert took of its layer's tokens.

    Args:
        tokens_per_expert: [L, E].
    """
    figure = Figure(figsize=(6.0, 2.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(tokens_per_expert / tokens_per_expert.sum(-1, keepdims=True), aspect="auto", vmin=0.0)
    axes.set(xlabel="expert", ylabel="layer", title="share of the layer's routed tokens")
    figure.colorbar(image, ax=axes)
    return figure
