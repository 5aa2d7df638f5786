"""Named errors of the data sets and of the card at work, and how commands end by an error."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moe.terminal import plain_terminal

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that was asked to end, as shells give it."""
UNREAD = 128 + signal.SIGPIPE
"""Exit status of a process whose output nobody reads any more, as shells give it."""
_REMEDIES: dict[int | None, str] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "get the right to it, or name another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or name a place on another disk"),
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENOENT: "check the name",
    errno.EISDIR: "it is a folder, name a file",
    errno.ENOTDIR: "a file stands where a folder has to be, name another place",
}
"""What to do where the system refuses a file."""


class DataMissingError(FileNotFoundError):
    """A data set that was asked for is not on this machine."""


class DataCorruptError(ValueError):
    """A data file does not hold what it should."""


class ThermoeError(RuntimeError):
    """Base of what can go wrong at run time without being a fault of the program."""


class GpuUnavailableError(ThermoeError):
    """No NVIDIA driver, no such device, or one that lacks what is needed of it."""


class GpuLostError(ThermoeError):
    """The device stopped answering; what was recorded so far is kept."""


class ReadingError(ThermoeError):
    """A sensor or a model gave a value that cannot be; nothing is put in its place."""


@contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """The frame of every command, which is left by a line in place of a traceback.

    Terminals of any encoding are written to. Refused values, files and packages, and the errors above, exit
    with status 1; SIGTERM stops as Ctrl-C does, with status `TERMINATED`; where the reader of the output has
    left (`| head`), nothing is said and the status is `UNREAD`.

    Args:
        interrupted: what to say to the user who stops it, before what the interruption itself says.
    """
    plain_terminal()
    with _interruptions() as received:
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()  # here a closed pipe can still be answered for
        except (ValueError, OSError, ImportError, ThermoeError) as error:
            if isinstance(error, BrokenPipeError) and (unread := _unread()):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                for stream in unread:
                    os.dup2(nowhere, stream)  # what is still buffered
                sys.exit(UNREAD)
            remedy = _REMEDIES.get(getattr(error, "errno", None))
            sys.exit("; ".join(filter(None, (f"{type(error).__name__}: {error}", remedy))))
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich has seen to the rest
                sys.exit(UNREAD)
            raise
        except KeyboardInterrupt as stop:
            said = "\n" + "; ".join(filter(None, (interrupted, str(stop))))
            if signal.SIGTERM not in received:
                sys.exit(said)
            print(said, file=sys.stderr)
            sys.exit(TERMINATED)


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Let SIGTERM interrupt as SIGINT does, and what a callback of a library swallowed interrupt once more.

    Compiling calls back into Python, where an exception is lost. Yields the signals that came.
    """
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def lost(said: sys.UnraisableHookArgs) -> None:
        if issubclass(said.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # SIGALRM, when the callback is over
        else:
            hook(said)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _unread() -> list[int]:
    """Standard output and error, those of the two whose reader has closed the pipe."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return [stream for stream, event in poll.poll(0) if event & select.POLLERR]
