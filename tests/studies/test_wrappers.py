"""Policies around policies: fields that come late, knobs that are held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agents.play.rollout import play_twin
from agents.policies.registry import make_policy
from studies.wrappers import Delayed, Held
from thermoe_env.mdp.fields import FIELD_NAMES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

FIELDS = ("power_w", "temp_c", "busy")
COLUMNS = [FIELD_NAMES.index(name) for name in FIELDS]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(load_scenario("vision", episode_s=20))


class Eye:
    """A policy that remembers what it was shown, and in its state how often it was asked."""

    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []
        self.states: list[Any] = []

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        self.shown.append(observation.copy())
        self.states.append(state)
        return np.zeros((len(observation), 4), np.int64), (0 if state is None else state) + 1


def watch(delay_s: float | None, restart: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What comes and what is shown in 12 intervals of 3 environments; one may start anew. [T, n, fields]"""
    rng, eye, state = np.random.default_rng(0), Eye(), None
    seen = rng.uniform(-1, 1, (12, 3, len(FIELD_NAMES))).astype(np.float32)
    policy = Delayed(eye, FIELDS, delay_s, 1.0)
    for t, observation in enumerate(seen):
        start = np.array([t == 0, t in (0, restart), t == 0])
        before = observation.copy()
        _, state = policy.predict(observation, state, start)
        np.testing.assert_array_equal(observation, before)  # what is given is left alone
    assert eye.states == [None, *range(1, 12)]
    return seen, np.stack(eye.shown)


@pytest.mark.parametrize("delay_s", [None, 1.0, 3.0, 15.0])
def test_late_fields_leave_the_others_untouched(delay_s: float | None) -> None:
    seen, shown = watch(delay_s)
    others = [i for i in range(len(FIELD_NAMES)) if i not in COLUMNS]
    assert shown[..., others].tobytes() == seen[..., others].tobytes()


@pytest.mark.parametrize("delay", [1, 3, 15])
def test_a_delay_is_a_shift_by_hand(delay: int) -> None:
    seen, shown = watch(float(delay), restart=5)
    for t in range(12):
        for n, began in enumerate([0, 5 if t >= 5 else 0, 0]):
            by_hand = seen[max(began, t - delay), n, COLUMNS]
            np.testing.assert_array_equal(shown[t, n, COLUMNS], by_hand)


def test_without_a_delay_the_start_of_the_episode_stays() -> None:
    seen, shown = watch(None, restart=5)
    first = np.repeat(seen[:1], 12, axis=0)
    first[5:, 1] = seen[5, 1]
    np.testing.assert_array_equal(shown[..., COLUMNS], first[..., COLUMNS])


@pytest.mark.parametrize(("fields", "delay_s"), [(["watts"], None), (["power_w"], 0.0), (["power_w"], 1.5)])
def test_wrong_fields_and_delays_are_refused(fields: list[str], delay_s: float | None) -> None:
    with pytest.raises(ValueError, match=r"watts|multiple"):
        Delayed(Eye(), fields, delay_s, 1.0)


def test_held_knobs_are_held_and_the_others_are_the_policys(problem: Problem) -> None:
    rules = make_policy("rule_based", problem)
    free = play_twin(problem, rules, [1, 2])
    held = Held(rules, {"expert_count": 8.0}, problem)
    state, start = None, np.ones(2, bool)
    own_state = None
    for observation in free.observation:
        action, state = held.predict(observation, state, start)
        expected, own_state = rules.predict(observation, own_state, start)
        expected[:, problem.knobs.controlled.index("expert_count")] = 3
        np.testing.assert_array_equal(action, expected)
        start = np.zeros(2, bool)
    with pytest.raises(ValueError, match="expert_count cannot be held at 3"):
        Held(rules, {"expert_count": 3.0}, problem)
    with pytest.raises(ValueError, match="pace cannot be held"):
        Held(rules, {"pace": 1.0}, problem)
