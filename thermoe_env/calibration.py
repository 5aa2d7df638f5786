"""Calibration of a twin: the parameters of one device, in a strict YAML file."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from thermoe_env.errors import ScenarioError

_POSITIVE = (
    "idle_power_w", "r_die_c_per_w", "r_spreader_c_per_w", "tau_spreader_s", "r_sink_c_per_w", "tau_sink_s",
    "r_mem_c_per_w", "tau_mem_s", "inlet_drift_tau_s", "max_clock_mhz",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TwinParams:
    """One device as `thermoe_env.physics` models it; `python -m thermoe_env.calibrate fit` writes it."""

    gpu: str
    """Name of the card as its driver gives it."""
    idle_power_w: float
    """Power without work, with a context and at full clock, at `idle_reference_c`."""
    idle_reference_c: float
    leakage_per_c: float
    """Relative rise of idle power per degree of the die."""
    power_cap_w: float
    """Mean power at which the board lowers its clock. It caps peaks: this may lie below the nominal limit."""
    r_die_c_per_w: float
    r_spreader_c_per_w: float
    tau_spreader_s: float
    r_sink_c_per_w: float
    tau_sink_s: float
    inlet_c: float
    """Temperature that the die would have at no power, slow drift apart."""
    r_mem_c_per_w: float
    """Of the memory's own node; the heatsink's is common to both."""
    tau_mem_s: float
    mem_offset_c: float
    """Memory above the inlet at no power: what it dissipates regardless, and the sensors' difference."""
    inlet_drift_c: float
    """Standard deviation of the slow drift that power does not explain: fans, neighbours, room."""
    inlet_drift_tau_s: float
    slowdown_c: float
    hw_slowdown_c: float
    mem_limit_c: float
    shutdown_c: float
    max_clock_mhz: float
    provenance: dict[str, Any]
    """Where and when it was measured, by what, and with what error."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "float" and not (type(value) in (int, float) and math.isfinite(value)):
                raise ScenarioError(f"{f.name} must be a finite number, got {value!r}")
        if not self.gpu or not isinstance(self.gpu, str) or not isinstance(self.provenance, dict):
            raise ScenarioError(
                f"gpu must be a name and provenance a mapping, got {self.gpu!r}, {self.provenance!r}"
            )
        for name in _POSITIVE:
            if getattr(self, name) <= 0.0:
                raise ScenarioError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("leakage_per_c", "inlet_drift_c"):
            if getattr(self, name) < 0.0:
                raise ScenarioError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.power_cap_w <= self.idle_power_w:
            raise ScenarioError(
                f"power_cap_w must exceed idle_power_w={self.idle_power_w}, got {self.power_cap_w}"
            )
        if self.tau_spreader_s > self.tau_sink_s:
            raise ScenarioError(
                f"tau_spreader_s must not exceed tau_sink_s={self.tau_sink_s}, got {self.tau_spreader_s}"
            )
        if not self.inlet_c < self.slowdown_c <= self.hw_slowdown_c <= self.shutdown_c:
            raise ScenarioError(
                "needs inlet_c < slowdown_c <= hw_slowdown_c <= shutdown_c, got "
                f"{self.inlet_c}, {self.slowdown_c}, {self.hw_slowdown_c}, {self.shutdown_c}"
            )


def load_twin(path: str | Path) -> TwinParams:
    """Read a twin calibration.

    Raises:
        ScenarioError: no such file, an unknown or missing key, or a value its rule refuses.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScenarioError(f"{path}: cannot be read as YAML ({error})") from error
    known = [f.name for f in fields(TwinParams)]
    if not isinstance(raw, dict):
        raise ScenarioError(f"{path}: a twin is a mapping of {known}")
    odd = {
        "unknown": [str(key) for key in raw if key not in known],
        "missing": [key for key in known if key not in raw],
    }
    if any(odd.values()):
        listed = "; ".join(f"{kind} {', '.join(keys)}" for kind, keys in odd.items() if keys)
        raise ScenarioError(f"{path}: {listed}. A twin holds exactly {known}")
    try:
        return TwinParams(**raw)
    except ScenarioError as error:
        raise ScenarioError(f"{path}: {error}") from error


def save_twin(twin: TwinParams, path: str | Path) -> None:
    """Write a twin calibration in one step: the file is whole or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(yaml.safe_dump(asdict(twin), sort_keys=False, width=100))
    os.replace(part, path)
