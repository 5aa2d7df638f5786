"""The hand-written controller: staged hysteresis on temperature, queue, power and budget.

It reads physical values from the observation and knows the levels of the knobs, nothing else. Its
thresholds live in configs/agents/rule_based.yaml, tuned by `python -m agents.tuning.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from thermoe_env.configs import load_settings
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.problem import Problem

NOTHING_ANSWERED = 1e-3
"""Confidence up to which an interval counts as one without answers, whose confidence is 0."""


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Thresholds of the rules. Levels count from 0, the cheapest."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    normal_experts: int = 0
    """Expert-count level in quiet times."""
    shifted_experts: int = 0
    """Expert-count level while confidence is low."""
    saving_experts: int = 0
    """Expert-count level under a power budget, heat or a full queue."""
    normal_bias: int = 0
    saving_bias: int = 0
    quiet_batch: int = 4
    """Batch-size level at low load."""
    busy_batch: int = 4
    busy_load: float = 0.7
    """Load from which the busy batch is used."""
    low_confidence: float = 0.75
    """Confidence below which inputs count as shifted."""
    budget_margin_w: float = 40.0
    """Power is saved when it would come this close to the announced budget."""
    full_queue_s: float = 2.0
    """Waiting work, in seconds of capacity, from which experts are saved."""
    late_share: float = 0.01
    adapt_change: float = 0.02
    """Change of confidence against its average, up or down, that starts adaptation: a model adapted to other
    inputs can be confidently wrong. Adaptation itself changes it, so it goes on until it has settled."""
    adapt_for_s: float = 4.0
    """Adaptation goes on this long after the last such change, and after the start."""
    adapt_steps: int = 1
    adapt_max_stage: int = 2
    """Adaptation is put off in hotter stages than this."""
    release_s: float = 3.0
    """Saving goes on this long after its cause has gone (hysteresis)."""

    def __post_init__(self) -> None:
        if min(self.adapt_for_s, self.release_s, self.full_queue_s) < 0.0:
            raise ValueError("adapt_for_s, release_s and full_queue_s must not be negative")


def load_rule_config(path: str | Path = "rule_based") -> RuleConfig:
    """Read the thresholds; unknown keys are refused."""
    return load_settings(RuleConfig, "agents", path)


class RuleBased:
    """Staged rules. Memory per environment: seconds left of saving and of adapting."""

    def __init__(self, problem: Problem, config: RuleConfig) -> None:
        self._config = config
        self._knobs, self._ranges = problem.knobs, ranges_of(problem)
        self._interval_s = problem.scenario.interval_s

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions by rule; see `Policy.predict`."""
        c, o = self._config, self._ranges.decode(observation)
        n = len(observation)
        saving_s, adapting_s = (np.zeros(n), np.full(n, c.adapt_for_s)) if state is None else state
        if episode_start is not None:
            saving_s = np.where(episode_start, 0.0, saving_s)
            adapting_s = np.where(episode_start, c.adapt_for_s, adapting_s)

        budget = np.minimum(o["budget_w"], o["budget_ahead_w"] + 25.0 * o["budget_change_s"])
        strained = (
            (o["power_w"] > budget - c.budget_margin_w)
            | (o["stage"] >= 2)
            | (o["queue_interactive_s"] + o["queue_deferrable_s"] > c.full_queue_s)
            | (o["late_share"] > c.late_share)
        )
        saving_s = np.where(strained, c.release_s, np.maximum(0.0, saving_s - self._interval_s))
        saving = saving_s > 0.0

        seen = o["confidence"] > NOTHING_ANSWERED
        changed = seen & (np.abs(o["shift_indicator"]) > c.adapt_change)
        adapting_s = np.where(changed, c.adapt_for_s, np.maximum(0.0, adapting_s - self._interval_s))
        adapt = (adapting_s > 0.0) & (o["stage"] <= c.adapt_max_stage) & ~(o["late_share"] > c.late_share)

        shifted = seen & (o["confidence"] < c.low_confidence)
        level = {
            "routing_bias": np.where(saving, c.saving_bias, c.normal_bias),
            "batch_size": np.where(o["load_fast"] > c.busy_load, c.busy_batch, c.quiet_batch),
            "expert_count": np.where(
                saving, c.saving_experts, np.where(shifted, c.shifted_experts, c.normal_experts)
            ),
            "ttt_steps": np.where(adapt, c.adapt_steps, 0),
        }
        action = np.tile(self._knobs.action(), (n, 1))
        for column, name in enumerate(self._knobs.controlled):
            if name in level:
                action[:, column] = np.clip(level[name], 0, self._knobs.nvec[column] - 1)
        return action, (saving_s, adapting_s)
