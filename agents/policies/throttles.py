"""Throttles: PID control of a strain, by one knob or by several in a stated order.

The strain says how far the device is beyond what it was told: power against the lowest announced budget, or
temperature against the virtual limit, whichever is worse. Without strain a throttle is the static service;
with it, it lowers its knobs one after another to their cheapest levels. The controllers are simple-pid's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from simple_pid import PID

from moe.workload import KNOB_NAMES
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.problem import Problem

THROTTLES: dict[str, tuple[str, ...]] = {
    "pid": ("routing_bias", "expert_count", "batch_size", "ttt_steps"),
    "batch_only": ("batch_size",),
    "experts_only": ("expert_count",),
    "routing_only": ("routing_bias",),
    "clock_only": ("sm_clock",),
    "pace_only": ("pace",),
}
"""Policies of this kind, and the knobs that they lower, in order: what costs least quality comes first."""

HEAT_SPAN_C = 10.0
"""Degrees that strain as much as power of a whole budget."""


@dataclass(frozen=True, kw_only=True)
class ThrottleConfig:
    """Gains and margins of a throttle. Its output is a share of the levels between dearest and cheapest."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    knobs: tuple[str, ...]
    """What is lowered, in this order: the second once the first is at its cheapest level. Of several, those
    that a scenario does not control are passed over."""
    proportional: float = 1.0
    integral: float = 0.2
    """Per second."""
    derivative: float = 0.0
    """In seconds."""
    budget_margin: float = 0.05
    """Share of the budget from which power strains: this much below it."""
    heat_margin_c: float = 2.0
    """Margin to the temperature limit from which heat strains."""
    adapt_steps: int | None = None
    """Adaptation steps per batch without strain, where they are controlled; None: the static service's."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.knobs if name not in KNOB_NAMES]
        if unknown or not self.knobs or len(set(self.knobs)) < len(self.knobs):
            raise ValueError(f"knobs must be different ones of {KNOB_NAMES}, got {self.knobs}")
        if min(self.proportional, self.integral, self.derivative) < 0.0:
            raise ValueError(
                "proportional, integral and derivative must not be negative, got "
                f"{self.proportional}, {self.integral}, {self.derivative}"
            )
        if not self.budget_margin < 1.0 or (self.adapt_steps or 0) < 0:
            raise ValueError(
                f"budget_margin must be below 1 and adapt_steps not negative, got {self.budget_margin} and "
                f"{self.adapt_steps}"
            )


def strain_of(o: dict[str, np.ndarray], config: ThrottleConfig) -> np.ndarray:
    """How strained each device is, float [n]: 0 at the margins, 1 a whole budget or `HEAT_SPAN_C` beyond.

    Args:
        o: decoded fields, name -> [n].
        config: the margins.
    """
    power = o["power_w"] / o["budget_ahead_w"] - (1.0 - config.budget_margin)
    heat = (config.heat_margin_c - o["margin_c"]) / HEAT_SPAN_C
    return np.maximum(power, heat)


def cheapest_level(problem: Problem, name: str) -> int:
    """Level of a knob at which an answer of the otherwise static service takes the least energy.

    Pace and clock spread or shrink the power, adaptation adds to it, and who is not admitted takes none: for
    these it is the lowest level.
    """
    if name in ("pace", "sm_clock", "ttt_steps", "admission"):
        return 0
    joules = []
    for value in problem.knobs.levels[name]:
        index = np.array(problem.knobs.default_index)
        index[KNOB_NAMES.index(name)] = problem.knobs.levels[name].index(value)
        knobs = problem.knobs.knobs(index)
        batch = knobs.batch_size * problem.batch_scale
        joules.append(problem.power_profile.energy_at(batch, knobs.expert_count, knobs.routing_bias) / batch)
    return int(np.argmin(joules))


class Throttle:
    """A PID controller per environment. Memory: the controllers."""

    def __init__(self, problem: Problem, config: ThrottleConfig, name: str = "pid") -> None:
        """Take the levels of the problem's knobs.

        Args:
            problem: what is controlled.
            config: gains, margins, knobs.
            name: of the policy, for messages.

        Raises:
            ValueError: the scenario controls none of the knobs, or none of those can be lowered.
        """
        self._config, self._ranges = config, ranges_of(problem)
        self._interval_s = problem.scenario.interval_s
        controlled = problem.knobs.controlled
        knobs = [knob for knob in config.knobs if knob in controlled]
        if not knobs:
            raise ValueError(
                f"policy {name!r} steers {', '.join(config.knobs)}, which scenario {problem.scenario.name!r} "
                f"does not control: add it to the scenario's `knobs` (now {list(controlled)}), in its file "
                f"or by an override such as knobs={[*controlled, *config.knobs]}"
            )
        self._start = problem.knobs.action()  # [controlled]
        if config.adapt_steps is not None and "ttt_steps" in controlled:
            self._start = problem.knobs.action(ttt_steps=config.adapt_steps)
        self._columns = [controlled.index(knob) for knob in knobs]
        cheapest = np.array([cheapest_level(problem, knob) for knob in knobs])
        way = cheapest - self._start[self._columns]
        self._direction, self._levels = np.sign(way), np.abs(way)  # [knobs]
        self._before = self._levels.cumsum() - self._levels  # levels that the knobs before take
        if not self._levels.any():
            raise ValueError(
                f"policy {name!r} cannot lower {', '.join(knobs)}: the static service of scenario "
                f"{problem.scenario.name!r} is at the cheapest level already; change the scenario's `static`"
            )

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions by the depth of throttling; see `Policy.predict`."""
        controllers = [self._controller() for _ in observation] if state is None else state
        if episode_start is not None:
            for i in np.flatnonzero(episode_start):
                controllers[i].reset()
        strain = strain_of(self._ranges.decode(observation), self._config)
        pairs = zip(controllers, strain.tolist(), strict=True)
        # The setpoint is no strain, and the controller's error is setpoint less input.
        depth = np.array([pid(-value, dt=self._interval_s) for pid, value in pairs])  # [n], in [0, 1]
        lowered = np.rint(depth * self._levels.sum())[:, None]
        action = np.tile(self._start, (len(observation), 1))
        action[:, self._columns] += self._direction * np.clip(lowered - self._before, 0, self._levels).astype(
            np.int64
        )
        return action, controllers

    def _controller(self) -> PID:
        c = self._config
        gains = c.proportional, c.integral, c.derivative
        return PID(*gains, setpoint=0.0, sample_time=None, output_limits=(0.0, 1.0))
