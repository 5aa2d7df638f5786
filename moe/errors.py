"""Named errors of the data sets and of the card at work, and how commands end by an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def one_line_errors(*named: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Leave a command by a line in place of a traceback where it refuses its input or the user stops it.

    Args:
        named: errors that say what to do, besides refused values, files, missing packages and those above.
        interrupted: what to say to the user who stops it, before what the interruption itself says.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, ThermoeError, *named) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as stop:
        sys.exit("\n" + "; ".join(filter(None, (interrupted, str(stop)))))
