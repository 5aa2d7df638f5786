"""What a training run does beside learning: logs of its episodes, checkpoints, fresh episodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import ResultsWriter
from tqdm import tqdm

from agents.files import write_file
from agents.learning.checkpoints import CheckpointError, save_model
from agents.learning.config import TrainConfig
from agents.learning.validation import Validation
from agents.learning.vec import TwinVecEnv, fresh_seed
from moe.workload import KNOB_NAMES, WORK_DTYPE
from thermoe_env.mdp.fields import RAW_DTYPE
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import STAGES
from thermoe_env.twin.heat import GPU_DTYPE

MONITOR_FILE = "monitor.csv"

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


class EpisodeLog(BaseCallback):
    """Writes every episode of the training into `monitor.csv`, as Stable-Baselines3's `Monitor` does."""

    def __init__(self, folder: Path, episodes: int) -> None:
        """Go on after the first `episodes` of an earlier part of the run; what came later is played again.

        Raises:
            CheckpointError: the file has fewer.
        """
        super().__init__()
        self.episodes, file = episodes, folder / MONITOR_FILE
        if episodes:
            self._t_start = _cut_monitor(file, episodes)
        else:
            self._t_start = time.time()
        header: dict[str, float | str] = {"t_start": self._t_start, "env_id": "ThermalMoETwin-v0"}
        self._writer = ResultsWriter(str(file), header, override_existing=not episodes)

    def _on_step(self) -> bool:
        if self.locals["dones"].any():
            for episode in (info["episode"] for info in self.locals["infos"] if "episode" in info):
                took = round(time.time() - self._t_start, 6)
                self._writer.write_row({"r": round(episode["r"], 6), "l": episode["l"], "t": took})
                self.episodes += 1
        return True

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _cut_monitor(file: Path, episodes: int) -> float:
    """Leave the first `episodes` in a file of `Monitor`; returns when it began.

    Raises:
        CheckpointError: it has fewer, or is not such a file.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[: 2 + episodes]
        if len(lines) < 2 + episodes:
            raise ValueError(f"{max(0, len(lines) - 2)} there, {episodes} played")
        began = float(json.loads(lines[0].removeprefix("#"))["t_start"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} lacks episodes of the run ({error}): put a whole copy in its place, or begin a new run"
        ) from error
    write_file(file, "".join(lines))
    return began


class Updates(BaseCallback):
    """What happens between rounds: validation, checkpoint, fresh episodes.

    The episodes of a round follow from the run's seed and the round's number, so that a run continued from a
    checkpoint plays the same ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        env: TwinVecEnv,
        validation: Validation,
        episodes: EpisodeLog,
        folder: Path,
        bar: tqdm,
        watch: Watch | None,
    ) -> None:
        """Keep `last_model.zip` in `folder`."""
        super().__init__()
        self._config, self._env, self._folder, self._bar, self._watch = config, env, folder, bar, watch
        self._validation, self._episodes = validation, episodes
        self._round = env.batch.problem.scenario.steps * env.num_envs
        self._saved_at = 0

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        number, within = divmod(self.model.num_timesteps, self._round)
        if not within:
            self._begin(number)

    def _begin(self, number: int) -> None:
        """Start round `number`."""
        steps = self.model.num_timesteps
        if steps // self._config.eval_freq > self._validation.at // self._config.eval_freq:
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
        if self.model.num_timesteps > self._validation.at:
            self._validate()
        self._save()

    def _save(self) -> None:
        progress = {
            "best_return": self._validation.best,
            "validated_at": self._validation.at,
            "episodes": self._episodes.episodes,
        }
        save_model(self.model, self._folder / "last_model.zip", progress)
        self._saved_at = self.model.num_timesteps

    def _validate(self) -> None:
        returns = self._validation(self.model)
        self._bar.set_postfix({name: f"{value:.1f}" for name, value in returns.items()})
        if self._watch is not None:
            self._watch(self.model.num_timesteps, returns["deterministic"])
