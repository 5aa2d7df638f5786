"""Policies: one `predict`, the same for rules and for trained models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from agents.gating import GATES, Gated, load_gate_config
from thermoe_env.problem import Problem


class Policy(Protocol):
    """Anything that maps observations to actions; Stable-Baselines3 models are policies as they are."""

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions for a batch of observations.

        Args:
            observation: float32 [n, fields].
            state: what the last call returned, None at the start.
            episode_start: bool [n], where an episode begins and memory must be cleared.
            deterministic: whether to take the most likely action.

        Returns:
            (int64 [n, controlled knobs], state)
        """
        ...


class ConstantPolicy:
    """Always the same action."""

    def __init__(self, action: np.ndarray) -> None:
        self.action = np.asarray(action, np.int64)  # [controlled]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """The action, once per observation."""
        return np.tile(self.action, (len(observation), 1)), state


class RandomPolicy:
    """Uniform over all actions; reproducible from its seed."""

    def __init__(self, nvec: np.ndarray, seed: int = 0) -> None:
        self._nvec = nvec
        self._rng = np.random.default_rng([seed, 4])

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """A fresh action per observation."""
        return self._rng.integers(0, self._nvec, (len(observation), len(self._nvec))), state


def _static(problem: Problem) -> Policy:
    return ConstantPolicy(problem.knobs.action())


def _best_constant(problem: Problem) -> Policy:
    from agents.search import best_constant

    return ConstantPolicy(best_constant(problem))


def _rule_based(problem: Problem) -> Policy:
    from agents.rules import RuleBased, load_rule_config

    return RuleBased(problem, load_rule_config())


def _random(problem: Problem) -> Policy:
    return RandomPolicy(problem.knobs.nvec)


def _gated(rule: str) -> Callable[[Problem], Policy]:
    def make(problem: Problem) -> Policy:
        config = load_gate_config()
        return Gated(problem, POLICIES[config.base](problem), rule, config)

    return make


POLICIES: dict[str, Callable[[Problem], Policy]] = {
    "static": _static,
    "best_constant": _best_constant,
    "rule_based": _rule_based,
    "random": _random,
    **{f"gate-{rule}": _gated(rule) for rule in GATES},
}
"""Policies by name: the standard MoE service, the best fixed setting, the staged rules, chance, and gates
that decide when a base policy adapts."""


def make_policy(name: str, problem: Problem) -> Policy:
    """Build a policy by name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {sorted(POLICIES)}, or the path of a trained run")
    return POLICIES[name](problem)
