"""Calibration of a twin: the parameters of one device, in a strict YAML file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from moe.files import write_file
from moe.ranges import STRICT, Celsius, Name, Number, Seconds, Watts
from thermoe_env.configs import read_yaml, validated
from thermoe_env.errors import ScenarioError

Megahertz = Annotated[Number, Field(ge=1.0, le=1e5)]
Resistance = Annotated[Number, Field(gt=0.0, le=10.0)]
Inlet = Annotated[Number, Field(ge=-50.0, le=100.0)]
Drift = Annotated[Number, Field(ge=0.0, le=20.0)]
Noise = Annotated[Number, Field(gt=0.0, le=100.0)]
LoadRow = Annotated[list[Annotated[Number, Field(ge=0.0, le=1e9)]], Field(min_length=5, max_length=5)]

_DIE_RISE = ("r_die_c_per_w", "r_spreader_c_per_w", "r_sink_c_per_w")
_MEMORY_RISE = ("r_stack_c_per_w", "r_mem_c_per_w", "r_sink_c_per_w")
"""Nodes that heat; what the fans take back (`r_fan_c_per_w`) comes minutes later."""
MOST_RISE_C = 500.0
"""Above the inlet at the power cap, in any node: beyond lies no calibration but a slip of the unit."""
_DRIFTS = 6.0
"""Standard deviations of the inlet's drift that are taken for the coldest."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TwinParams:
    """One device as `physics` models it; `python -m thermoe_env.calibration fit` writes it."""

    gpu: Name
    """Name of the card as its driver gives it."""
    idle_power_w: Watts
    """Power without work, with a context and at full clock, at `idle_reference_c`."""
    idle_reference_c: Celsius
    leakage_per_c: Annotated[Number, Field(ge=0.0, le=0.1)]
    """Relative rise of idle power per degree of the die."""
    low_clock_power_w: Watts
    """Power of the card without a context, at its lowest clock."""
    low_clock_mhz: Megahertz
    power_cap_w: Watts
    """Mean power at which the board lowers its clock."""
    cap_onset_w: Watts
    """Mean power over a second from which on the cap is felt: it holds peaks, which lie above the mean."""
    max_clock_mhz: Megahertz
    r_die_c_per_w: Resistance
    r_spreader_c_per_w: Resistance
    tau_spreader_s: Seconds
    r_sink_c_per_w: Resistance
    tau_sink_s: Seconds
    r_fan_c_per_w: Annotated[Number, Field(ge=-10.0, le=0.0)]
    """Not above 0: what the chassis's fans take back."""
    tau_fan_s: Seconds
    inlet_c: Inlet
    """Temperature that the die would have at no power, drift apart; mean over places and days."""
    r_stack_c_per_w: Resistance
    """Of the memory, at once."""
    r_mem_c_per_w: Resistance
    """Of the memory's own node; the heatsink's is common to both."""
    tau_mem_s: Seconds
    mem_offset_c: Annotated[Number, Field(ge=-100.0, le=100.0)]
    """Memory above the inlet at no power: what it dissipates regardless, and the sensors' difference."""
    inlet_spread_c: Drift
    """Standard deviation of the inlet between places and days."""
    inlet_drift_c: Drift
    """Standard deviation of the slow drift that power does not explain: fans, neighbours, room."""
    inlet_drift_tau_s: Seconds
    die_gain_spread: Annotated[Number, Field(ge=0.0, le=10.0)]
    """Relative standard deviation of `r_die_c_per_w` with the work: where on the card its power goes."""
    die_gain_tau_s: Seconds
    mem_drift_c: Drift
    """Standard deviation of the memory's temperature with its share of the power."""
    mem_drift_tau_s: Seconds
    node_noise_c: Drift
    """What the observer allows each node to differ from the model."""
    sensor_noise_c: Noise
    """What it allows a mean of whole degrees to differ from the truth."""
    slowdown_c: Celsius
    hw_slowdown_c: Celsius
    mem_limit_c: Celsius
    shutdown_c: Celsius
    loads: dict[str, list[LoadRow]]
    """Calibration loads: name -> rows of (experts per token, tokens, J above idle, s, share of the time under
    the power cap) of a forward pass."""
    provenance: dict[str, Any]
    """Where and when it was measured, by what, and with what error."""

    def __post_init__(self) -> None:
        rise = sum(getattr(self, name) for name in _DIE_RISE)
        if not self.power_cap_w > self.idle_power_w > self.low_clock_power_w:
            raise ScenarioError(
                "needs low_clock_power_w < idle_power_w < power_cap_w, got "
                f"{self.low_clock_power_w}, {self.idle_power_w}, {self.power_cap_w}"
            )
        if self.low_clock_mhz >= self.max_clock_mhz:
            raise ScenarioError(
                f"low_clock_mhz must lie below max_clock_mhz={self.max_clock_mhz}, got {self.low_clock_mhz}"
            )
        if not self.tau_spreader_s <= self.tau_sink_s <= self.tau_fan_s:
            raise ScenarioError(
                "needs tau_spreader_s <= tau_sink_s <= tau_fan_s, got "
                f"{self.tau_spreader_s}, {self.tau_sink_s}, {self.tau_fan_s}"
            )
        if self.resistance_c_per_w <= 0.0:
            raise ScenarioError(
                f"r_fan_c_per_w must leave a rise of {' + '.join(_DIE_RISE)} = {rise:g}, got "
                f"{self.r_fan_c_per_w}"
            )
        for names in (_DIE_RISE, _MEMORY_RISE):
            at_cap_c = self.power_cap_w * sum(getattr(self, name) for name in names)
            if at_cap_c > MOST_RISE_C:
                raise ScenarioError(
                    f"power_cap_w * ({' + '.join(names)}) must be at most {MOST_RISE_C:g} degC, "
                    f"got {at_cap_c:g}"
                )
        if self.leakage_per_c * self.idle_power_w * rise >= 1.0:
            raise ScenarioError(
                f"leakage_per_c * idle_power_w * ({' + '.join(_DIE_RISE)}) must stay below 1, else "
                f"the device heats itself without end, got {self.leakage_per_c * self.idle_power_w * rise:g}"
            )
        # The fans still turn when the heat is gone.
        coldest_c = self.inlet_c - _DRIFTS * self.inlet_drift_c + self.power_cap_w * self.r_fan_c_per_w
        if self.leakage_per_c * (self.idle_reference_c - coldest_c) >= 1.0:
            raise ScenarioError(
                f"leakage_per_c must leave idle power at inlet_c - {_DRIFTS:g} * inlet_drift_c + "
                f"power_cap_w * r_fan_c_per_w = {coldest_c:g} degC, got {self.leakage_per_c} from "
                f"idle_reference_c={self.idle_reference_c} on"
            )
        if not self.inlet_c + self.idle_rise_c < self.slowdown_c <= self.hw_slowdown_c <= self.shutdown_c:
            raise ScenarioError(
                "needs inlet_c + idle_power_w * (sum of r_*_c_per_w) < slowdown_c <= hw_slowdown_c <= "
                "shutdown_c, got "
                f"{self.inlet_c + self.idle_rise_c:g}, {self.slowdown_c}, {self.hw_slowdown_c}, "
                f"{self.shutdown_c}"
            )

    @property
    def resistance_c_per_w(self) -> float:
        """Of all nodes from the inlet to the die, once they have settled."""
        return self.r_die_c_per_w + self.r_spreader_c_per_w + self.r_sink_c_per_w + self.r_fan_c_per_w

    @property
    def idle_rise_c(self) -> float:
        """How much warmer than the inlet the die settles without work."""
        return self.idle_power_w * self.resistance_c_per_w


def load_twin(path: str | Path) -> TwinParams:
    """Read a twin calibration.

    Raises:
        ScenarioError: no such file, an unknown or missing key, or a value its rule refuses.
    """
    return validated(TwinParams, read_yaml(path), str(path))


def save_twin(twin: TwinParams, path: str | Path) -> None:
    """Write a twin calibration in one step: the file is whole or as it was."""
    text = yaml.safe_dump(asdict(twin), sort_keys=False, width=100, default_flow_style=None)
    write_file(Path(path), text)
