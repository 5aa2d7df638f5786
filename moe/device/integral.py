"""Energy of a card without an energy counter: its power, sampled by a thread and integrated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from moe.device.base import Tick
from moe.errors import ThermoeError

SAMPLE_S = 0.05
"""Between two samples. Boards of that age report power as it is now, to 5%; what it does between two samples
is not seen."""


class PowerIntegral:
    """The integral of power over time, by trapezoids."""

    def __init__(self, power_w: Callable[[], float]) -> None:
        """Begin at 0 J.

        Args:
            power_w: reads the board's power.

        Raises:
            ThermoeError: as `power_w` does.
        """
        self._power_w = power_w
        self._lock = threading.Lock()
        self._last_w, self._tick = power_w(), Tick(0.0, time.perf_counter())
        self._error: ThermoeError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power integral", daemon=True)
        self._thread.start()

    def read(self) -> Tick:
        """The energy until now.

        Raises:
            ThermoeError: as `power_w` does, now or at a sample since the start.
        """
        if self._error is not None:
            raise self._error
        with self._lock:
            now_w, now_s = self._power_w(), time.perf_counter()
            mean_w = 0.5 * (self._last_w + now_w)
            energy_j = self._tick.energy_j + mean_w * (now_s - self._tick.time_s)
            self._last_w, self._tick = now_w, Tick(energy_j, now_s)
            return self._tick

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed.wait(SAMPLE_S):
                self.read()
        except ThermoeError as error:
            self._error = error
