"""Ranges of the numbers of configuration, as types: the annotation of a field says what it may hold.

Classes of configuration are dataclasses of pydantic, which keep to their annotations however they are made:
from a file, in Python, by `dataclasses.replace`. A field with a range of its own adds it to `Number` or
`Whole` where it stands. NaN and infinity are no numbers here, nor are strings, booleans and, for `Whole`,
floats.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")
"""Of every class of configuration: an unknown key is refused, so a misspelt one cannot vanish."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]

Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Spread = Annotated[Number, Field(ge=0.0, lt=1.0)]
"""Relative half-width: what varies by it keeps its sign."""
Throttle = Annotated[Number, Field(ge=0.01, le=1.0)]
"""Share of the device's time or clock that is left: never none."""
Weight = Annotated[Number, Field(ge=0.0, le=1e4)]
Seconds = Annotated[Number, Field(ge=1e-3, le=1e6)]
Dwell = Annotated[Number, Field(ge=0.1, le=1e6)]
"""Seconds between changes that are drawn one by one for a whole episode."""
Count = Annotated[Whole, Field(ge=1, le=1_000_000)]
Watts = Annotated[Number, Field(gt=0.0, le=1e5)]
Celsius = Annotated[Number, Field(ge=-50.0, le=200.0)]
Degrees = Annotated[Number, Field(ge=0.0, le=100.0)]
"""Difference of temperatures, or their standard deviation."""
