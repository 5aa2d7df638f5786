"""Policies around policies: one that sees some fields late or never, one whose knobs are held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.policies.policy import Policy
from thermoe_env.mdp.fields import FIELD_NAMES
from thermoe_env.problem.problem import Problem


class Delayed:
    """A policy that sees some fields of the observation late; all others as they are.

    Before a delayed field's first value is due the policy sees the one that the episode began with: a cool,
    idle device, an empty queue, the normal power budget. Without a delay it sees this for good. Memory per
    environment: the delayed values not yet shown.
    """

    def __init__(
        self, policy: Policy, fields: Sequence[str], delay_s: float | None, interval_s: float
    ) -> None:
        """Put it around a policy.

        Args:
            policy: whose actions.
            fields: names of the observation's fields that come late.
            delay_s: how late, whole intervals; None for never.
            interval_s: time between observations.

        Raises:
            ValueError: an unknown field, or a delay that is not a positive number of intervals.
        """
        unknown = sorted(set(fields) - set(FIELD_NAMES))
        if unknown:
            raise ValueError(f"unknown fields {unknown}; known: {list(FIELD_NAMES)}")
        steps = 0 if delay_s is None else delay_s / interval_s
        if delay_s is not None and (steps < 1 or steps != round(steps)):
            raise ValueError(
                f"delay_s must be a positive multiple of the interval ({interval_s:g} s), got {delay_s:g}; "
                "give no delay (null) for fields that are never seen"
            )
        self._policy = policy
        self._columns = [FIELD_NAMES.index(name) for name in fields]
        self._steps = round(steps)  # 0: never

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """The policy's actions on what it is shown; see `Policy.predict`."""
        now = observation[:, self._columns]  # [n, fields]
        if state is None:
            past, inner = np.repeat(now[None], max(1, self._steps), axis=0), None  # [delay, n, fields]
        else:
            past, inner = state
            if episode_start is not None:
                past = np.where(episode_start[:, None], now, past)
        shown = observation.copy()
        shown[:, self._columns] = past[0]
        action, inner = self._policy.predict(shown, inner, episode_start, deterministic)
        return action, (np.concatenate([past[1:], now[None]]) if self._steps else past, inner)


class Held:
    """A policy some of whose knobs are held, whatever it says."""

    def __init__(self, policy: Policy, levels: Mapping[str, float], problem: Problem) -> None:
        """Put it around a policy.

        Args:
            policy: sets the other knobs.
            levels: knob -> value, one of its levels.
            problem: what will be played.

        Raises:
            ValueError: a knob that is not controlled, or a value that is no level of it.
        """
        self._policy = policy
        table = problem.knobs
        for name, value in levels.items():
            if name not in table.controlled or value not in table.levels[name]:
                raise ValueError(
                    f"{name} cannot be held at {value:g}: controlled are {table.controlled}, with the levels "
                    f"{[table.levels[knob] for knob in table.controlled]}"
                )
        self._columns = [table.controlled.index(name) for name in levels]
        self._held = [table.levels[name].index(value) for name, value in levels.items()]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """The policy's actions with the held knobs put in; see `Policy.predict`."""
        action, state = self._policy.predict(observation, state, episode_start, deterministic)
        action = action.copy()
        action[:, self._columns] = self._held
        return action, state
