"""What the driver of a card says of it: the file `X_nvml_info.json` beside a trace `X_telemetry.csv`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from thermoe_env.errors import TraceFormatError


@dataclass(frozen=True, kw_only=True)
class DriverInfo:
    """What the driver of a card says of it."""

    name: str
    driver: str
    measured_on: str
    """ISO date of the trace."""
    slowdown_c: float
    """Highest operating temperature: above it software lowers the clock (87 on an H100)."""
    hw_slowdown_c: float
    mem_limit_c: float
    shutdown_c: float
    power_limit_w: float
    missing: tuple[str, ...] = ()
    """What the card cannot say, see `moe.device.nvml.Gpu`."""


def driver_info_path(trace: Path) -> Path:
    """Where the driver's answers to a trace `X_telemetry.csv` lie: `X_nvml_info.json`."""
    return trace.with_name(trace.stem.removesuffix("_telemetry") + "_nvml_info.json")


def load_driver_info(path: str | Path) -> DriverInfo:
    """Read what NVML said of the card; limits are the card's own and never guessed.

    Raises:
        TraceFormatError: no such file, or a limit that is missing or not a number.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise TraceFormatError(
            f"{path}: missing; `thermalmoe-calibrate record` writes it, --nvml-info names another"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TraceFormatError(f"{path}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise TraceFormatError(f"{path}: must be a JSON object")

    def number(key: str) -> float:
        try:
            value = float(raw[key])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise TraceFormatError(f"{path}: {key} must be a number, got {raw.get(key, 'nothing')!r}")
        return value

    for key in ("name", "driver", "measured_on"):
        if not isinstance(raw.get(key), str):
            raise TraceFormatError(f"{path}: {key} must be a string, got {raw.get(key, 'nothing')!r}")
    missing = raw.get("missing", [])
    if not isinstance(missing, list) or not all(isinstance(name, str) for name in missing):
        raise TraceFormatError(f"{path}: missing must be a list of names, got {missing!r}")
    shutdown_c = number("thr_SHUTDOWN")
    # A card is not slowed by a temperature that it does not know.
    unknown = "mem_temp_c" in missing and "thr_MEM_MAX" not in raw
    return DriverInfo(
        name=raw["name"],
        driver=raw["driver"],
        measured_on=raw["measured_on"],
        slowdown_c=number("thr_GPU_MAX"),
        hw_slowdown_c=number("thr_SLOWDOWN"),
        mem_limit_c=shutdown_c if unknown else number("thr_MEM_MAX"),
        shutdown_c=shutdown_c,
        power_limit_w=number("nvmlDeviceGetEnforcedPowerLimit") / 1e3,
        missing=tuple(missing),
    )
