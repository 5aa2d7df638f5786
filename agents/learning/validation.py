"""Validation: held-out episodes that choose the best model, what is logged of them, and what looks wrong."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Figure as LoggedFigure

from agents.files import write_file
from agents.learning.algorithms import OnPolicySettings
from agents.learning.checkpoints import CheckpointError, save_model
from agents.learning.config import TrainConfig
from agents.learning.models import ModelPolicy
from agents.play.metrics import KPIS, episode_metrics
from agents.play.rollout import Recording, play_twin
from agents.policies.registry import make_policy
from moe.files import DAMAGED
from thermoe_env.problem.problem import Problem

VALIDATION_SEEDS = range(800_000, 900_000)
"""Episodes that choose the best model, from the first on; training and evaluation use other seeds."""
COMPARED = (
    "mean_reward", "mean_reward_best", "j_per_good", "quality", "late_fraction", "served_share", "peak_c",
    "above_limit_s",
)  # fmt: skip
"""Validation scalars (`eval/...`) by which TensorBoard's tab of hyper-parameters compares runs."""
EVALUATIONS_FILE = "evaluations.npz"
SERVED_SHARE_LOW, LATE_HIGH = 0.05, 0.5

_LOG = logging.getLogger("agents.learning")


class Validation:
    """Plays the held-out episodes and keeps `best_model.zip` and `evaluations.npz` in a run's folder.

    What is judged, saved and evaluated later is the deterministic policy, which takes the most likely action.
    Algorithms that learn from sampled actions (on-policy ones) are played with those too, on the same
    episodes: what training shows is their return, and the two can lie far apart.
    """

    def __init__(self, config: TrainConfig, problem: Problem, folder: Path, state: dict[str, Any]) -> None:
        """Continue from the training state of a checkpoint.

        Raises:
            CheckpointError: evaluations.npz lacks what was validated before.
        """
        self._config, self._problem, self._folder = config, problem, folder
        self._seeds = VALIDATION_SEEDS[: config.eval_episodes]
        self.best: float | None = state["best_return"]
        self.at: int = state["validated_at"]
        """Steps at the last validation."""
        self._kept = _read_evaluations(folder / EVALUATIONS_FILE, self.at)
        static = play_twin(problem, make_policy("static", problem), self._seeds, "static")
        self._static = _means(static)
        self._warned = False

    def __call__(self, model: BaseAlgorithm) -> dict[str, float]:
        """Validate: write files, log, warn once where the policy serves nearly nothing.

        Returns:
            Mean returns by whose they are: `deterministic`, `sampled` (on-policy), `best` so far, `static`.
        """
        problem, steps, record = self._problem, model.num_timesteps, model.logger.record
        policy = ModelPolicy(model.policy, self._config.action_mode, problem.knobs)
        recording = play_twin(problem, policy, self._seeds, "validation")
        mean = _means(recording)
        returns = {"deterministic": mean["return"]}
        if isinstance(self._config.settings, OnPolicySettings):
            returns["sampled"] = self._sampled(policy)
            record("eval/mean_reward_sampled", returns["sampled"])
        best = returns["deterministic"] if self.best is None else max(self.best, returns["deterministic"])
        improved, self.best = best != self.best, best
        returns |= {"best": best, "static": self._static["return"]}
        for name in KPIS:
            record(f"eval/{'mean_reward' if name == 'return' else name}", mean[name])
        record("eval/mean_reward_best", returns["best"])
        record("eval/mean_reward_static", returns["static"])
        record("eval/mean_ep_length", float(recording.length.mean()))
        record("eval/served_share", mean["served_share"])
        figure = expert_figure(recording.tokens_per_expert.sum((0, 1)))
        record("eval/expert_share", LoggedFigure(figure, close=True))
        model.logger.dump(steps)
        self.at = steps
        self._keep(steps, recording.reward.sum(0), recording.length)
        if improved:
            save_model(model, self._folder / "best_model.zip")
        self._warn(mean["served_share"], mean["late_fraction"])
        return returns

    def _sampled(self, policy: ModelPolicy) -> float:
        """Mean return of sampled actions, drawn apart from the generator that training goes on with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.seed)
            recording = play_twin(self._problem, _Sampled(policy), self._seeds, "validation, sampled")
        return float(recording.reward.sum(0).mean())

    def _keep(self, steps: int, returns: np.ndarray, lengths: np.ndarray) -> None:
        """Add to evaluations.npz, in the form of Stable-Baselines3's `EvalCallback`."""
        for name, row in zip(("timesteps", "results", "ep_lengths"), (steps, returns, lengths), strict=True):
            self._kept.setdefault(name, []).append(row)
        file, arrays = io.BytesIO(), dict[str, Any]()
        for name, rows in self._kept.items():
            arrays[name] = np.array(rows)
        np.savez(file, **arrays)
        write_file(self._folder / EVALUATIONS_FILE, file.getvalue())

    def _warn(self, served_share: float, late_fraction: float) -> None:
        said = serves_nothing(served_share, late_fraction)
        if said and not self._warned:
            self._warned = True
            static_late = self._static["late_fraction"]
            remedy = (
                "compare reward/late with the other reward/... terms in TensorBoard, reward weights and "
                "learning_rate with the shipped ones"
                if static_late <= self._problem.scenario.feasible.late_share
                else "the scenario asks for more than can be served, lower its traffic"
            )
            _LOG.warning(
                f"validation at {self.at} steps: {said}, and the static service has {static_late:.2%} late: "
                f"{remedy}"
            )


def serves_nothing(served_share: float, late_fraction: float) -> str:
    """What looks as if a policy had learned to serve nothing, with its value; empty where nothing does.

    Args:
        served_share: arrivals that were answered in time.
        late_fraction: late or expired over answered or expired; NaN where nothing was.
    """
    if served_share < SERVED_SHARE_LOW:
        return (
            f"eval/served_share is {served_share:.2%} (below {SERVED_SHARE_LOW:.0%} of the arrivals in time)"
        )
    if late_fraction > LATE_HIGH:
        return f"eval/late_fraction is {late_fraction:.2%} (above {LATE_HIGH:.0%})"
    return ""


def _means(recording: Recording) -> dict[str, float]:
    """Means over episodes of `KPIS`, and of the share of the arrivals that was answered in time."""
    episodes = episode_metrics(recording)
    mean = dict(zip(KPIS, episodes[list(KPIS)].to_numpy(float).mean(0).tolist(), strict=True))
    # Where nothing was answered or given up, no share of it is late.
    late = np.nan_to_num(episodes.late_fraction.to_numpy(float))
    settled = 1.0 - episodes.waiting_fraction.to_numpy(float)
    return {**mean, "served_share": float((settled * (1.0 - late)).mean())}


class _Sampled:
    """A policy that samples its actions whatever it is asked for."""

    def __init__(self, policy: ModelPolicy) -> None:
        self._policy = policy

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """See `Policy.predict`."""
        return self._policy.predict(observation, state, episode_start, deterministic=False)


def _read_evaluations(file: Path, until: int) -> dict[str, list[Any]]:
    """Rows of evaluations.npz up to a number of steps; those after it are made again.

    Raises:
        CheckpointError: the row of that number is not there.
    """
    if not until:
        return {}
    try:
        with np.load(file, allow_pickle=False) as kept:
            count = kept["timesteps"].tolist().index(until) + 1
            return {name: list(kept[name][:count]) for name in ("timesteps", "results", "ep_lengths")}
    except (OSError, *DAMAGED) as error:
        raise CheckpointError(
            f"{file} lacks the validation at {until} steps ({error}): put a whole copy in its place, or "
            "begin a new run"
        ) from error


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
