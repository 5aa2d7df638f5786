"""What a policy is: one `predict`, the same for rules and for trained models; and the two simplest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from thermoe_env.problem.knobs import KnobTable


class PolicyError(ValueError):
    """A policy cannot be loaded, or answers with what is no action; the message names it."""


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


def decide(
    policy: Policy, name: str, knobs: KnobTable, observation: np.ndarray, state: Any, start: np.ndarray
) -> tuple[np.ndarray, Any]:
    """Ask a policy, and check the form of its answer.

    Args:
        policy: who is asked.
        name: its label, for messages.
        knobs: what it controls.
        observation: float32 [n, fields].
        state: what it returned last, None at the start.
        start: bool [n], where an episode begins.

    Returns:
        (level of every controlled knob, [n, controlled], state)

    Raises:
        PolicyError: its answer has another form.
    """
    answer = policy.predict(observation, state, start, deterministic=True)
    n, controlled = len(observation), knobs.controlled
    rule = f"policy {name!r}: predict must return (levels [{n}, {len(controlled)}] of {controlled}, state)"
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise PolicyError(f"{rule}, got {type(answer).__name__}")
    action, state = answer
    if np.shape(action) != (n, len(controlled)):
        raise PolicyError(f"{rule}, got shape {np.shape(action)}")
    return np.asarray(action), state


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
