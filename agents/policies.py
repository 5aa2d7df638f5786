"""Policies: one `predict`, the same for rules and for trained models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from agents.gating import GATES, Gated, load_gate_config
from agents.throttles import THROTTLES, Throttle, ThrottleConfig
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


@runtime_checkable
class ForeseeingPolicy(Policy, Protocol):
    """A policy that knows the future of a twin's episodes, so it has to be told which they are."""

    def for_seeds(self, seeds: Sequence[int]) -> Policy:
        """The policy that plays episodes of these seeds, all at once and in this order, from number 0 on."""
        ...


def for_episodes(policy: Policy, seeds: Sequence[int], world: str) -> Policy:
    """The policy that plays episodes of these seeds: another one only where it foresees them.

    Raises:
        ValueError: it does, but the world is not the twin.
    """
    if not isinstance(policy, ForeseeingPolicy):
        return policy
    if world != "twin":
        raise ValueError(
            f"{type(policy).__name__} plans on the future of a twin's episode, which world {world!r} does "
            "not have: play it in the twin, or play `mpc`, which plans on forecasts"
        )
    return policy.for_seeds(seeds)


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
        return Gated(problem, POLICIES[config.base_of(rule)](problem), rule, config)

    return make


def _greedy(problem: Problem) -> Policy:
    from agents.greedy import Greedy, GreedyConfig
    from agents.rules import load_settings

    return Greedy(problem, load_settings(GreedyConfig, "greedy"))


def _mpc(problem: Problem) -> Policy:
    from agents.belief import MpcConfig
    from agents.mpc import Mpc
    from agents.rules import load_settings

    return Mpc(problem, load_settings(MpcConfig, "mpc"))


def _oracle(problem: Problem) -> Policy:
    from agents.planner import Oracle, PlanConfig
    from agents.rules import load_settings

    return Oracle(problem, load_settings(PlanConfig, "oracle"))


def _throttle(name: str) -> Callable[[Problem], Policy]:
    def make(problem: Problem) -> Policy:
        from agents.rules import load_settings

        return Throttle(problem, load_settings(ThrottleConfig, name), name)

    return make


POLICIES: dict[str, Callable[[Problem], Policy]] = {
    "static": _static,
    "best_constant": _best_constant,
    "rule_based": _rule_based,
    "random": _random,
    **{f"gate-{rule}": _gated(rule) for rule in GATES},
    **{name: _throttle(name) for name in THROTTLES},
    "greedy": _greedy,
    "mpc": _mpc,
    "oracle": _oracle,
}
"""Policies by name: the standard MoE service, the best fixed setting, the staged rules, chance, gates that
decide when a base policy adapts, PID control of several knobs and of single ones, the best next interval,
plans on forecasts and on the true future."""


def make_policy(name: str, problem: Problem) -> Policy:
    """Build a policy by name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {sorted(POLICIES)}, or the path of a trained run")
    return POLICIES[name](problem)
