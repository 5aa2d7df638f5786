"""Exceptions with a name for everything that can go wrong at run time. Each message says what to do."""

from __future__ import annotations

from moe.errors import GpuLostError, GpuUnavailableError, ReadingError, ThermoeError

__all__ = [
    "GpuBusyError",
    "GpuLostError",
    "GpuUnavailableError",
    "PrivilegeError",
    "ReadingError",
    "ScenarioError",
    "ThermoeError",
    "TraceFormatError",
]


class GpuBusyError(ThermoeError):
    """Another live environment already uses this GPU."""


class PrivilegeError(ThermoeError):
    """A knob needs a right that this process does not have, or an opt-in that was not given."""


class TraceFormatError(ValueError):
    """A telemetry trace is malformed; the message names the file, the row and the field."""


class ScenarioError(ValueError):
    """A scenario or calibration file is wrong; the message names the field and the known ones."""
