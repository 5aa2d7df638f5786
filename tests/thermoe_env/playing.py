"""Plays in a process of its own: compiled code that never ends can only be ended with its process."""

from __future__ import annotations

import logging
import multiprocessing
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pydantic import ValidationError

from tests.thermoe_env.soundness import broken, play

START_S = 600.0
"""For imports and, the first time, compiling."""
LIMIT_S = 120.0
"""Far above what an episode takes."""
WARM_UP: tuple[dict[str, Any], ...] = ({"episode_s": 10}, {"episode_s": 10, "adaptation": {"budget": {}}})


class Outcome(NamedTuple):
    """How playing overrides ended."""

    kind: str
    """`sound`, `refused`, or what may not be: `unsound`, `crashed`, `endless`, `died`."""
    text: str = ""
    """The refusal, the broken laws, or the traceback."""


def outcome(overrides: dict[str, Any]) -> Outcome:
    """Play and judge; a refusal is a named `ValueError`, and pydantic's own words are not one."""
    try:
        laws = broken(play(overrides))
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, ValidationError):
            return Outcome("refused", str(error))
        return Outcome("crashed", traceback.format_exc())
    return Outcome("unsound", ", ".join(laws)) if laws else Outcome("sound")


def _serve(connection: Connection) -> None:
    """Judge what comes; first None, once everything is compiled."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")  # an overflow is no sound episode
    for overrides in WARM_UP:
        outcome(overrides)
    connection.send(None)
    while True:
        connection.send(outcome(connection.recv()))


class Player:
    """A process that plays; another one follows where one had to be ended."""

    def __init__(self) -> None:
        self._process: Any = None

    def outcome(self, overrides: dict[str, Any]) -> Outcome:
        """What became of overrides."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(overrides)
            if self._connection.poll(LIMIT_S):
                return self._connection.recv()
            found = Outcome("endless", f"not over after {LIMIT_S:g} s")
        except (EOFError, ConnectionError):
            found = Outcome("died")
        self.close()
        return found

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(START_S):
            self.close()
            raise TimeoutError(f"the twin was not compiled after {START_S:g} s")
        self._connection.recv()
