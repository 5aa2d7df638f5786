"""How much warmer the air at the inlet becomes in an episode: a profile over time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from moe.ranges import STRICT, Name, Number
from thermoe_env.errors import ScenarioError

MOST_C = 30.0
"""Offsets lie within as many degrees of the calibrated inlet."""
COLUMNS = ["t_s", "offset_c"]

Kind = Literal["constant", "step", "ramp", "trace"]
_Offset = Annotated[Number, Field(ge=-MOST_C, le=MOST_C)]
_Moment = Annotated[Number, Field(ge=0.0, le=86_400.0)]

_KEYS: dict[Kind, tuple[str, ...]] = {
    "constant": ("by_c",),
    "step": ("by_c", "at_s"),
    "ramp": ("by_c", "from_s", "to_s", "back_from_s", "back_to_s"),
    "trace": ("trace",),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InletConfig:
    """Offset of the inlet over an episode, in degrees. A second has that of its beginning."""

    kind: Kind = "constant"
    """`constant` (by_c), `step` (by_c, at_s), `ramp` (by_c, from_s, to_s, and to come down again back_from_s,
    back_to_s) or `trace` (a file)."""
    by_c: _Offset | None = None
    at_s: _Moment | None = None
    from_s: _Moment | None = None
    to_s: _Moment | None = None
    back_from_s: _Moment | None = None
    back_to_s: _Moment | None = None
    trace: Name | None = None
    """CSV with the columns `t_s,offset_c`, times rising; straight lines between its rows, level outside."""

    def __post_init__(self) -> None:
        takes = _KEYS[self.kind]
        given = {name for keys in _KEYS.values() for name in keys if getattr(self, name) is not None}
        optional = {"by_c"} if self.kind == "constant" else set()
        if not self._returns:
            optional |= {"back_from_s", "back_to_s"}
        if given - set(takes) or set(takes) - given - optional:
            raise ValueError(
                f"inlet of kind {self.kind!r} takes {takes} (back_from_s and back_to_s both or neither), got "
                f"{sorted(given)}"
            )
        if self.kind == "ramp":
            times = self._corners_s
            if sorted(times) != times or any(a == b for a, b in zip(times[::2], times[1::2], strict=True)):
                raise ValueError(
                    f"inlet needs from_s < to_s <= back_from_s < back_to_s, got {', '.join(map(str, times))}"
                )

    @property
    def _returns(self) -> bool:
        return self.back_from_s is not None or self.back_to_s is not None

    @property
    def _corners_s(self) -> list[float]:
        """Of a ramp."""
        corners = self.from_s, self.to_s, self.back_from_s, self.back_to_s
        return [time for time in corners if time is not None]

    def offsets_c(self, seconds: int) -> np.ndarray:
        """The offset in each second of an episode, float [seconds].

        Raises:
            ScenarioError: the trace cannot be used; names the file and the line.
        """
        t = np.arange(seconds, dtype=np.float64)
        if self.kind == "trace":
            return np.interp(t, *_read_trace(str(self.trace)))
        by_c = float(self.by_c or 0.0)
        if self.kind == "constant":
            return np.full(seconds, by_c)
        if self.kind == "step":
            return np.where(t >= float(self.at_s or 0.0), by_c, 0.0)
        times = self._corners_s
        return np.interp(t, times, [0.0, by_c, by_c, 0.0][: len(times)])


def _read_trace(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Times in s and offsets in degrees, float [rows] each.

    Raises:
        ScenarioError: see `InletConfig.offsets_c`.
    """
    remedy = f"inlet.trace needs a first line {','.join(COLUMNS)!r}, then numbers with times rising"
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScenarioError(f"{path}: cannot be read ({error}); {remedy}") from error
    if len(rows) < 2 or rows[0] != COLUMNS:
        raise ScenarioError(f"{path}: begins with {rows[:1]} and has {len(rows)} lines; {remedy}")
    values: list[tuple[float, float]] = []
    for line, row in enumerate(rows[1:], 2):
        try:
            t_s, offset_c = map(float, row)
        except ValueError as error:
            raise ScenarioError(f"{path}, line {line}: {row} are not two numbers; {remedy}") from error
        if not abs(offset_c) <= MOST_C:
            raise ScenarioError(
                f"{path}, line {line}: offset_c must lie within {MOST_C:g} degC of 0, got {offset_c:g}"
            )
        if not (values[-1][0] if values else -np.inf) < t_s < np.inf:
            raise ScenarioError(f"{path}, line {line}: t_s {t_s:g} does not rise; {remedy}")
        values.append((t_s, offset_c))
    times, offsets = np.array(values).T
    return times, offsets
