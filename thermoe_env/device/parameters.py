"""Calibration of a twin: the parameters of one device, in a strict YAML file."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from thermoe_env.configs import read_yaml, validated
from thermoe_env.errors import ScenarioError

_POSITIVE = (
    "idle_power_w", "low_clock_power_w", "low_clock_mhz", "cap_onset_w", "r_die_c_per_w",
    "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s", "tau_fan_s", "r_stack_c_per_w",
    "r_mem_c_per_w", "tau_mem_s", "inlet_drift_tau_s", "die_gain_tau_s", "mem_drift_tau_s",
    "sensor_noise_c", "max_clock_mhz",
)  # fmt: skip
_NOT_NEGATIVE = (
    "leakage_per_c", "inlet_spread_c", "inlet_drift_c", "die_gain_spread", "mem_drift_c", "node_noise_c",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TwinParams:
    """One device as `physics` models it; `python -m thermoe_env.calibration fit` writes it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    gpu: str
    """Name of the card as its driver gives it."""
    idle_power_w: float
    """Power without work, with a context and at full clock, at `idle_reference_c`."""
    idle_reference_c: float
    leakage_per_c: float
    """Relative rise of idle power per degree of the die."""
    low_clock_power_w: float
    """Power of the card without a context, at its lowest clock."""
    low_clock_mhz: float
    power_cap_w: float
    """Mean power at which the board lowers its clock."""
    cap_onset_w: float
    """Mean power over a second from which on the cap is felt: it holds peaks, which lie above the mean."""
    max_clock_mhz: float
    r_die_c_per_w: float
    r_spreader_c_per_w: float
    tau_spreader_s: float
    r_sink_c_per_w: float
    tau_sink_s: float
    r_fan_c_per_w: float
    """Not above 0: what the chassis's fans take back."""
    tau_fan_s: float
    inlet_c: float
    """Temperature that the die would have at no power, drift apart; mean over places and days."""
    r_stack_c_per_w: float
    """Of the memory, at once."""
    r_mem_c_per_w: float
    """Of the memory's own node; the heatsink's is common to both."""
    tau_mem_s: float
    mem_offset_c: float
    """Memory above the inlet at no power: what it dissipates regardless, and the sensors' difference."""
    inlet_spread_c: float
    """Standard deviation of the inlet between places and days."""
    inlet_drift_c: float
    """Standard deviation of the slow drift that power does not explain: fans, neighbours, room."""
    inlet_drift_tau_s: float
    die_gain_spread: float
    """Relative standard deviation of `r_die_c_per_w` with the work: where on the card its power goes."""
    die_gain_tau_s: float
    mem_drift_c: float
    """Standard deviation of the memory's temperature with its share of the power."""
    mem_drift_tau_s: float
    node_noise_c: float
    """What the observer allows each node to differ from the model."""
    sensor_noise_c: float
    """What it allows a mean of whole degrees to differ from the truth."""
    slowdown_c: float
    hw_slowdown_c: float
    mem_limit_c: float
    shutdown_c: float
    loads: dict[str, list[list[float]]]
    """Calibration loads: name -> rows of (experts per token, tokens, J above idle, s, share of the time under
    the power cap) of a forward pass."""
    provenance: dict[str, Any]
    """Where and when it was measured, by what, and with what error."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ScenarioError(f"{f.name} must be a finite number, got {value!r}")
        if not self.gpu:
            raise ScenarioError("gpu must name the card, got ''")
        for name in _POSITIVE:
            if getattr(self, name) <= 0.0:
                raise ScenarioError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0.0:
                raise ScenarioError(f"{name} must be >= 0, got {getattr(self, name)}")
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
        if self.r_fan_c_per_w > 0.0 or self.resistance_c_per_w <= 0.0:
            raise ScenarioError(
                f"r_fan_c_per_w must lie between 0 and what leaves a rise, got {self.r_fan_c_per_w}"
            )
        if not self.inlet_c < self.slowdown_c <= self.hw_slowdown_c <= self.shutdown_c:
            raise ScenarioError(
                "needs inlet_c < slowdown_c <= hw_slowdown_c <= shutdown_c, got "
                f"{self.inlet_c}, {self.slowdown_c}, {self.hw_slowdown_c}, {self.shutdown_c}"
            )
        for name, rows in self.loads.items():
            if any(len(row) != 5 or not all(v >= 0.0 for v in row) for row in rows):
                raise ScenarioError(f"loads {name!r} must be rows of five numbers >= 0, got {rows!r}")

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(
        yaml.safe_dump(asdict(twin), sort_keys=False, width=100, default_flow_style=None), encoding="utf-8"
    )
    os.replace(part, path)
