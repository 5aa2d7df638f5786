"""Which of a scenario's devices holds which expert of the model that its profile measured."""

from __future__ import annotations

from moe.placement import Placement, PlacementError
from moe.profiles import Profile
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.scenario import Scenario


def place(scenario: Scenario, profile: Profile) -> Placement:
    """Place the model's experts as the scenario's devices list them.

    Raises:
        ScenarioError: names the experts that are left out, unknown or on several devices, or the devices that
            would decode without any.
    """
    count = profile.expert_share.shape[-1]
    if scenario.devices[0].experts is None:
        return Placement((0,) * count, 1)
    try:
        placement = Placement.of_devices([device.experts or () for device in scenario.devices], count)
    except PlacementError as error:
        raise ScenarioError(f"scenario {scenario.name!r} on profile {scenario.profile!r}: {error}") from error
    idle = [d for d, device in enumerate(scenario.devices) if not device.experts]
    if scenario.generate is not None and idle:
        raise ScenarioError(
            f"scenario {scenario.name!r}: each device of a service of tokens runs every row, and devices "
            f"{idle} would without any of its `experts`: give them some, or leave them out"
        )
    widths_needed = placement.n_devices > 1 and scenario.generate is None
    if widths_needed and "expert_widths" not in profile.model["config"]:
        raise ScenarioError(
            f"profile {scenario.profile!r} does not say its expert_widths, by which the devices share the "
            "energy; measure it with `python -m moe.profiling`"
        )
    return placement
