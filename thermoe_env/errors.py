"""Exceptions with a name for everything that can go wrong at run time. Each message says what to do."""

from __future__ import annotations


class ThermoeError(RuntimeError):
    """Base of the run-time errors of this package."""


class GpuUnavailableError(ThermoeError):
    """No NVIDIA driver, no device, or no CUDA for the live world."""


class GpuLostError(ThermoeError):
    """The device stopped answering during an episode; what was recorded so far is kept."""


class GpuBusyError(ThermoeError):
    """Another live environment already uses this GPU."""


class PrivilegeError(ThermoeError):
    """A knob needs a right that this process does not have, or an opt-in that was not given."""


class ReadingError(ThermoeError):
    """A sensor or a model gave a value that is not a number; nothing is put in its place."""


class TraceFormatError(ValueError):
    """A telemetry trace is malformed; the message names the file, the row and the field."""


class ScenarioError(ValueError):
    """A scenario or calibration file is wrong; the message names the field and the known ones."""
