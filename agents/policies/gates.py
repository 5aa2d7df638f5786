"""Gates as policies: another policy's knobs, with adaptation where a rule of `moe.service.gates` says so.

The rules were made for batches; here each is asked once per control interval, of the interval's means. Their
settings live in configs/agents/gates.yaml, tuned by `python -m agents.tuning.gates`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from agents.policies.policy import Policy
from agents.policies.rules import NOTHING_ANSWERED
from moe.service.gates import (
    Always,
    ConfidenceChange,
    EntropyThreshold,
    Gate,
    InputShift,
    Never,
    Observed,
    Periodic,
    WhenCool,
)
from thermoe_env.configs import load_settings
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem

Base = Literal["rule_based", "static", "best_constant"]

NOTHING_TO_GAIN = {"entropy": 0.0, "confidence": 1.0}
"""Answers than which none are surer."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Settings of the gates. An interval is a control interval in which something was answered."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    base: Base = "rule_based"
    """Policy that sets the other knobs; `shift` has its own."""
    steps: int = 1
    """Adaptation steps per batch in an interval with adaptation; a level of the knob `ttt_steps`."""
    every: int = 10
    """`periodic`: adapt in the first of so many intervals."""
    entropy_above: float = 0.1
    """`entropy`: adapt above this mean entropy."""
    change_threshold: float = 0.1
    """`change`, `thermal`: sum of the deviations of confidence that is an alarm."""
    change_tolerance: float = 0.01
    """`change`, `thermal`: deviation of an interval that counts as none."""
    adapt_for: int = 3
    """`change`, `thermal`: intervals to adapt in from the start, or an alarm, on."""
    shift_base: Base = "best_constant"
    """`shift`: policy that sets the other knobs. Over one that leaves them alone, changes of confidence and
    entropy come from inputs and adaptation only."""
    shift_threshold: float = 0.006
    """`shift`: sum of the deviations of confidence, or of entropy, that is an alarm."""
    shift_tolerance: float = 0.0025
    """`shift`: deviation of an interval that counts as none."""
    shift_for: int = 1
    """`shift`: intervals to adapt in from the start, or an alarm, on."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}; gate-never is the one without")
        for make in GATES.values():
            make(self)  # each refuses its own settings

    def base_of(self, rule: str) -> Base:
        """The policy that a gate is played over."""
        return self.shift_base if rule == "shift" else self.base


def _change(config: GateConfig) -> Gate:
    return ConfidenceChange(config.change_threshold, config.change_tolerance, config.adapt_for)


GATES: dict[str, Callable[[GateConfig], Gate]] = {
    "always": lambda config: Always(),
    "never": lambda config: Never(),
    "periodic": lambda config: Periodic(config.every),
    "entropy": lambda config: EntropyThreshold(config.entropy_above),
    "change": _change,
    "thermal": lambda config: WhenCool(_change(config)),
    "shift": lambda config: InputShift(config.shift_threshold, config.shift_tolerance, config.shift_for),
}
"""Rules by name; the policies are called `gate-<name>`."""


def load_gate_config(path: str | Path = "gates") -> GateConfig:
    """Read the settings; unknown keys are refused."""
    return load_settings(GateConfig, "agents", path)


class Gated:
    """A base policy whose `ttt_steps` a gate decides. Memory: the base's, and one gate per environment.

    An interval without answers is not shown to the gate. What follows it, as what follows the start of an
    episode, is what a new gate says to the surest answers: all but `never` and `entropy` adapt then.
    """

    def __init__(self, problem: Problem, base: Policy, rule: str, config: GateConfig) -> None:
        """Put a gate over a policy.

        Args:
            problem: what will be played.
            base: sets the other knobs.
            rule: name in `GATES`.
            config: settings of the gate.

        Raises:
            ValueError: an unknown rule, or a problem in which `ttt_steps` cannot be set as configured.
        """
        if rule not in GATES:
            raise ValueError(f"unknown gate {rule!r}; known: {sorted(GATES)}")
        controlled, levels = problem.knobs.controlled, problem.knobs.levels["ttt_steps"]
        if "ttt_steps" not in controlled or float(config.steps) not in levels:
            raise ValueError(
                f"a gate sets ttt_steps to 0 or {config.steps}; this scenario controls {controlled} and its "
                f"profile has the levels {levels}: control ttt_steps, on a model that adapts"
            )
        self._base, self._ranges = base, ranges_of(problem)
        self._new_gate: Callable[[], Gate] = lambda: GATES[rule](config)
        self._column = controlled.index("ttt_steps")
        self._off_on = np.array([levels.index(0.0), levels.index(float(config.steps))])

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """The base's actions, with or without adaptation; see `Policy.predict`."""
        n = len(observation)
        base_state, gates = (None, [self._new_gate() for _ in range(n)]) if state is None else state
        if episode_start is not None:
            gates = [
                self._new_gate() if new else gate for gate, new in zip(gates, episode_start, strict=True)
            ]
        action, base_state = self._base.predict(observation, base_state, episode_start, deterministic)
        action = action.copy()
        action[:, self._column] = self._off_on[self._decide(observation, gates).astype(np.int64)]
        return action, (base_state, gates)

    def _decide(self, observation: np.ndarray, gates: list[Gate]) -> np.ndarray:
        """Where to adapt, bool [n]."""
        o = self._ranges.decode(observation)
        answered = o["confidence"] > NOTHING_ANSWERED
        adapts = np.zeros(len(gates), bool)
        for i, gate in enumerate(gates):
            stage = STAGES[round(float(o["stage"][i]))]
            if answered[i]:
                seen = Observed(float(o["entropy"][i]), float(o["confidence"][i]), stage)
                adapts[i] = gate.decide(seen)
            else:
                adapts[i] = self._new_gate().decide(Observed(**NOTHING_TO_GAIN, stage=stage))
        return adapts
