"""Rules that are linear in what is observed: a score per knob, rounded to its nearest level.

A knob's level is its bias plus the sum of weight times feature, in levels, within its range. Features are
few, of about -1 to 1, and each belongs to a signal, so that a rule can be made blind to one: it then sees the
mean of what it saw in training. Shapes: n environments, K controlled knobs, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from thermoe_env.configs import configs_dir, load_settings
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.problem import Problem

Signal = Literal["queue", "power", "heat", "answers", "promise", "price"]
Observed = dict[str, np.ndarray]
"""Fields of the observation in physical units, [n] each."""


@dataclass(frozen=True)
class Feature:
    """A number that rules go by."""

    name: str
    signal: Signal
    meaning: str
    of: Callable[[Observed, Problem], np.ndarray]


def _longest_tpot_s(problem: Problem) -> float:
    generate = problem.scenario.generate
    return 1.0 if generate is None else generate.tpot_s[0]


def _first_s(problem: Problem) -> float:
    """How soon an interactive request is to be begun."""
    generate, service = problem.scenario.generate, problem.scenario.service
    return service.deadline_s[0] if generate is None else min(service.deadline_s[0], generate.ttft_s[0])


FEATURES: tuple[Feature, ...] = (
    Feature("load", "queue", "5 s average of the load, -1 at none, 1 at full",
            lambda o, p: 2.0 * o["load_fast"] - 1.0),
    Feature("oldest", "queue", "age of the oldest interactive request over what is promised",
            lambda o, p: o["oldest_interactive_s"] / _first_s(p)),
    Feature("backlog", "queue", "deferrable requests that wait, over a third of their deadline",
            lambda o, p: 3.0 * o["queue_deferrable_s"] / p.scenario.service.deadline_s[1]),
    Feature("margin", "power", "budget less power, over 0.3 of the standard service's power at full load",
            lambda o, p: (o["budget_w"] - o["power_w"]) / (0.3 * p.reference_power_w)),
    Feature("cap", "power", "what the budget lacks of that power, over half of it, at least 0",
            lambda o, p: np.maximum(
                0.0, (p.reference_power_w - o["budget_w"]) / (0.5 * p.reference_power_w)
            )),
    Feature("cap_ahead", "power", "what the announced budget lacks of the present one, over the same",
            lambda o, p: (o["budget_w"] - o["budget_ahead_w"]) / (0.5 * p.reference_power_w)),
    Feature("overload", "power", "share of what the power brake bears that is used up",
            lambda o, p: o["overload_share"]),
    Feature("heat", "heat", "1 at the temperature limit, 0 five degrees below",
            lambda o, p: 1.0 - o["margin_c"] / 5.0),
    Feature("changed", "answers", "1 when confidence or entropy has just changed, 0 after six seconds",
            lambda o, p: np.maximum(0.0, 1.0 - o["since_change_s"] / 6.0)),
    Feature("strict", "promise", "what the promised time per token lacks of the longest one",
            lambda o, p: 1.0 - o["promised_tpot_s"] / _longest_tpot_s(p)),
    Feature("strict_ahead", "promise", "the same of the shortest one announced",
            lambda o, p: 1.0 - o["promised_tpot_ahead_s"] / _longest_tpot_s(p)),
    Feature("price", "price", "price of energy over the usual one, less 1", lambda o, p: o["price"] - 1.0),
)  # fmt: skip
WEIGHTS = ("bias", *(feature.name for feature in FEATURES))
"""Of a knob, by name: its bias, then one per feature."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Weights as a person reads them: per knob its bias and the weight of each feature that has one."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    weights: dict[str, dict[str, float]]

    def table(self, problem: Problem) -> np.ndarray:
        """The weights of a problem's knobs, [K, 1 + F].

        Raises:
            ValueError: They are for other knobs, or name no feature.
        """
        unknown = sorted({name for own in self.weights.values() for name in own} - set(WEIGHTS))
        if unknown or set(self.weights) != set(problem.knobs.controlled):
            raise ValueError(
                f"weights must be for the knobs {problem.knobs.controlled} and of {WEIGHTS}, got those of "
                f"{tuple(self.weights)}{f' with {unknown}' if unknown else ''}: search them anew "
                "(python -m agents.tuning.linear)"
            )
        rows = [[self.weights[knob].get(name, 0.0) for name in WEIGHTS] for knob in problem.knobs.controlled]
        return np.array(rows)

    @classmethod
    def of(cls, problem: Problem, weights: np.ndarray) -> LinearConfig:
        """The same of a table, to three digits behind the point."""
        rounded = {
            knob: {name: round(float(w), 3) for name, w in zip(WEIGHTS, row, strict=True) if round(w, 3)}
            for knob, row in zip(problem.knobs.controlled, weights, strict=True)
        }
        return cls(weights=rounded)


def weights_file(scenario: str) -> Path:
    """Where the weights of a scenario of that name are shipped, if they are."""
    return configs_dir() / "agents" / f"linear-{scenario}.yaml"


def load_linear(problem: Problem) -> LinearRule:
    """The shipped rule of a scenario, of `weights_file`.

    Raises:
        ValueError: There is none, or it is for other knobs.
    """
    name = problem.scenario.name
    path = weights_file(name)
    if not path.exists():
        raise ValueError(
            f"policy 'linear' has no weights for the scenario {name!r}: search them "
            f"(python -m agents.tuning.linear --scenario {name})"
        )
    return LinearRule(problem, load_settings(LinearConfig, "agents", str(path)).table(problem))


def features_of(problem: Problem, observation: np.ndarray) -> np.ndarray:
    """Return 1 and the features of observations, float64 [n, 1 + F], within -1 and 1."""
    o = ranges_of(problem).decode(observation)
    columns = [np.ones(len(observation)), *(np.clip(f.of(o, problem), -1.0, 1.0) for f in FEATURES)]
    return np.stack(columns, axis=1)


def constant_weights(action: np.ndarray) -> np.ndarray:
    """Return the weights, [K, 1 + F], of the rule that always takes an action, [K]."""
    weights = np.zeros((len(action), len(WEIGHTS)))
    weights[:, 0] = action
    return weights


class LinearRule:
    """A policy of weights, or many of them at once, one per environment."""

    def __init__(
        self, problem: Problem, weights: np.ndarray, blind: Mapping[Signal, np.ndarray] | None = None
    ) -> None:
        """Prepare to play.

        Args:
            problem: What is played.
            weights: Of each knob, in the order of `problem.knobs.controlled`.  # [K, 1 + F] or [n, K, 1 + F]
            blind: Signals that are not seen, each with the means, [1 + F], of what is shown instead.

        Raises:
            ValueError: Weights of another shape, or that are no numbers.
        """
        weights = np.asarray(weights, np.float64)
        shape = len(problem.knobs.controlled), len(WEIGHTS)
        if weights.ndim not in (2, 3) or weights.shape[-2:] != shape or not np.isfinite(weights).all():
            raise ValueError(
                f"weights must be finite, [knobs, 1 + features] = {shape} or one such table per environment, "
                f"got shape {weights.shape}"
            )
        self._problem, self._weights = problem, weights
        self._top = problem.knobs.nvec - 1
        self._shown = [
            (1 + number, means[1 + number])
            for signal, means in (blind or {}).items()
            for number, feature in enumerate(FEATURES)
            if feature.signal == signal
        ]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions by rule; see `Policy.predict`."""
        seen = features_of(self._problem, observation)
        for column, mean in self._shown:
            seen[:, column] = mean
        subscripts = "kf,nf->nk" if self._weights.ndim == 2 else "nkf,nf->nk"
        score = np.einsum(subscripts, self._weights, seen)
        return np.clip(np.rint(score), 0, self._top).astype(np.int64), state
