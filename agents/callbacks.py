"""What a training run does beside learning: TensorBoard, validation, checkpoints, fresh episodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure
from tqdm import tqdm

from agents.checkpoints import save_model
from agents.metrics import KPIS, episode_metrics
from agents.policies import make_policy
from agents.rollout import play_twin
from agents.vec import TwinVecEnv, fresh_seed
from thermoe_env.fields import RAW_DTYPE
from thermoe_env.interval import COST_NAMES
from thermoe_env.knobs import KNOB_NAMES
from thermoe_env.profiled import WORK_DTYPE
from thermoe_env.reward import REWARD_TERMS
from thermoe_env.signals import STAGES
from thermoe_env.twin import GPU_DTYPE

if TYPE_CHECKING:
    from agents.training import TrainConfig

VALIDATION_SEEDS = range(800_000, 900_000)
"""Episodes that choose the best model, from the first on; training and evaluation use other seeds."""


class RolloutLog(BaseCallback):
    """Logs each rollout as a whole: reward terms, costs, device, service, knobs.

    A step copies the batch's arrays; everything else happens once, at the rollout's end. Sums are per
    episode.
    """

    def __init__(self, env: TwinVecEnv) -> None:
        """Record rollouts of `env` that are one episode long."""
        super().__init__()
        shape = (env.batch.problem.scenario.steps, env.num_envs)
        self._batch = env.batch
        self._work = np.zeros(shape, WORK_DTYPE)
        self._gpu = np.zeros(shape, GPU_DTYPE)
        self._raw = np.zeros(shape, RAW_DTYPE)
        self._terms = np.zeros((*shape, len(REWARD_TERMS)))
        self._cost = np.zeros((*shape, len(COST_NAMES)))
        self._index = np.zeros((*shape, len(KNOB_NAMES)), np.int64)

    def _on_rollout_start(self) -> None:
        self._t = 0

    def _on_step(self) -> bool:
        batch, t = self._batch, self._t
        self._work[t], self._gpu[t], self._raw[t] = batch.work, batch.gpu, batch.raw
        self._terms[t], self._cost[t], self._index[t] = batch.terms, batch.cost, batch.index
        self._t += 1
        return True

    def _on_rollout_end(self) -> None:
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
        answered = work["answered_interactive"] + work["answered_deferrable"]
        settled = answered + work["expired_interactive"] + work["expired_deferrable"]
        late = self._cost[..., COST_NAMES.index("missed")].sum()
        # The larger of 1 and the count: a rollout without one answer has quality 0, not a division by zero.
        record(
            "service", quality=work["correct"] / max(1.0, answered), late_fraction=late / max(1.0, settled),
            j_per_good=gpu["energy_j"].sum() / max(1.0, work["good"]),
        )  # fmt: skip
        knobs = self._batch.problem.knobs
        for name in knobs.controlled:
            played = np.array(knobs.levels[name])[self._index[..., KNOB_NAMES.index(name)]]
            self.logger.record(f"knob/{name}", torch.as_tensor(played.ravel()))


class Updates(BaseCallback):
    """What happens between updates: validation, checkpoint, fresh episodes.

    The episodes of an update follow from the run's seed and the update's number, so that a run continued
    from a checkpoint plays the same ones.
    """

    model: PPO

    def __init__(
        self, config: TrainConfig, env: TwinVecEnv, folder: Path, state: dict[str, Any] | None, bar: tqdm
    ) -> None:
        """Keep `best_model.zip` and `last_model.zip` in `folder`; continue from a checkpoint's `state`."""
        super().__init__()
        self._config, self._env, self._folder, self._bar = config, env, folder, bar
        self._eval_seeds = VALIDATION_SEEDS[: config.eval_episodes]
        self._best: float | None = state["best_return"] if state else None
        self._validated_at: int = state["validated_at"] if state else 0

    def _on_training_start(self) -> None:
        problem = self._env.batch.problem
        static = play_twin(problem, make_policy("static", problem), self._eval_seeds, "static")
        self._static_return = float(static.reward.sum(0).mean())

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        if steps // self._config.eval_freq > self._validated_at // self._config.eval_freq:
            self._validate()
        self._save()
        update = steps // (self.model.n_steps * self._env.num_envs)
        self._env.seed(fresh_seed(self._config.seed, update))
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

    def _validate(self) -> None:
        """Play the held-out episodes deterministically; keep the model if its mean return is the best."""
        recording = play_twin(self._env.batch.problem, self.model, self._eval_seeds, "validation")
        mean = dict(zip(KPIS, episode_metrics(recording)[list(KPIS)].to_numpy(float).mean(0), strict=True))
        for name, value in mean.items():
            self.logger.record(f"eval/{name}", value)
        self.logger.record("eval/return_static", self._static_return)
        figure = expert_figure(recording.tokens_per_expert.sum((0, 1)))
        self.logger.record("eval/expert_share", LoggedFigure(figure, close=True))
        self.logger.dump(self.model.num_timesteps)
        self._validated_at = self.model.num_timesteps
        if self._best is None or mean["return"] > self._best:
            self._best = float(mean["return"])
            save_model(self.model, self._folder / "best_model.zip")
        shown = {"return": mean["return"], "best": self._best, "static": self._static_return}
        self._bar.set_postfix({name: f"{value:.1f}" for name, value in shown.items()})


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
