"""Named errors of the data sets and of the card at work. Each message says what to do."""

from __future__ import annotations


class DataMissingError(FileNotFoundError):
    """A data set that was asked for is not on this machine."""


class DataCorruptError(ValueError):
    """A data file does not hold what it should."""


class ThermoeError(RuntimeError):
    """Base of what can go wrong at run time with the card and with the environment."""


class GpuUnavailableError(ThermoeError):
    """No NVIDIA driver, no such device, or one that lacks what is needed of it."""


class GpuLostError(ThermoeError):
    """The device stopped answering; what was recorded so far is kept."""


class ReadingError(ThermoeError):
    """A sensor or a model gave a value that cannot be; nothing is put in its place."""
