"""Whether limits that act can be kept at all on the devices of a twin."""

from __future__ import annotations

import numpy as np

from thermoe_env.device.parameters import TwinParams
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.scenario import Scenario


def inlet_offsets_c(scenario: Scenario) -> np.ndarray:
    """Offset of a scenario's inlet in each second, float [episode_s + 1].

    Raises:
        ScenarioError: the trace of offsets cannot be used.
    """
    seconds = scenario.episode_s + 1
    return np.zeros(seconds) if scenario.inlet is None else scenario.inlet.offsets_c(seconds)


def check_limits(scenario: Scenario, twin: TwinParams, inlet_c: np.ndarray, limit_c: float) -> None:
    """Refuse a limit that acts and that idle devices do not keep: nothing would ever lift it.

    Args:
        scenario: the control problem.
        twin: the calibration.
        inlet_c: float [seconds], offset of the inlet.
        limit_c: the temperature limit.

    Raises:
        ScenarioError: names the limit and what lies above it.
    """
    budget, limits = scenario.power_budget, scenario.limits
    idle_w, lowest_w = twin.idle_power_w * len(scenario.devices), min(budget.normal_w, budget.event_w[0])
    if budget.brake is not None and lowest_w <= idle_w:
        raise ScenarioError(
            f"power_budget.brake (grace_s, duty, hold_s) holds a budget as low as {lowest_w:g} W (normal_w, "
            f"event_w), but the devices draw {idle_w:g} W when idle: raise the budget, or leave the brake out"
        )
    if limits.slowdown is None and limits.alarm is None and scenario.inlet is None:
        return
    hottest_c = twin.inlet_c + max(d.inlet_offset_c for d in scenario.devices) + float(inlet_c.max())
    recover_c = 0.0 if limits.slowdown is None else limits.slowdown.recover_c
    if limit_c - recover_c <= hottest_c:
        raise ScenarioError(
            f"limits.temperature_c {limit_c:g} less slowdown.recover_c {recover_c:g} must lie "
            f"above the inlet, which comes to {hottest_c:g} degC by inlet_offset_c and inlet (by_c, trace): "
            "raise the limit, or leave out what acts on it (slowdown.duty, alarm.drain_s, inlet)"
        )
