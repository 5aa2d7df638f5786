"""Request traces of production services: reading, checking, and how their load changes from second to second.

Known are the public ones, by the name of their column of times:

| trace | file | time | tokens |
|---|---|---|---|
| Azure LLM inference 2023, 2024 | CSV | `TIMESTAMP` | `ContextTokens`, `GeneratedTokens` |
| BurstGPT | CSV | `Timestamp`, in seconds | `Request tokens`, `Response tokens` (0: it failed) |
| Mooncake | JSON lines | `timestamp`, in milliseconds | `input_length`, `output_length` |

A time is an ISO date and time (UTC where it names no zone), an epoch time in s, ms, us or ns (told by its
size), or a number in the unit of its column. Rows may come in any order, as of requests by completion.
Failed requests count: they arrived.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

_SECOND_US = 1_000_000
_MINUTE_US = 60 * _SECOND_US
_LONGEST_US = 31 * 86_400 * _SECOND_US
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_US = {10**9: Decimal(_SECOND_US), 10**12: Decimal(1000), 10**15: Decimal(1), 10**18: Decimal("0.001")}
"""Least epoch time since 2001 in s, ms, us and ns -> microseconds of its unit; each holds up to tenfold."""


class TraceError(ValueError):
    """A trace file cannot be used; the message names the file, the line and the reason."""


class _Format(NamedTuple):
    time: str
    unit_us: int | None
    """Microseconds of a number that is no epoch time; None where such a number is refused."""
    prompt: str
    output: str


_CSV = (
    _Format("TIMESTAMP", None, "ContextTokens", "GeneratedTokens"),
    _Format("Timestamp", _SECOND_US, "Request tokens", "Response tokens"),
)
_JSON_LINES = (_Format("timestamp", 1000, "input_length", "output_length"),)


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """Requests by time of arrival."""

    path: str
    arrival_us: np.ndarray
    """int64 [N], microseconds after the first, ascending."""
    prompt_tokens: np.ndarray | None
    """int64 [N]; None where the file has no such column."""
    output_tokens: np.ndarray | None
    """int64 [N], likewise."""

    @property
    def step_us(self) -> int:
        """Greatest common step of the times: stamps to the minute have 60 s."""
        return int(np.gcd.reduce(self.arrival_us))

    def relative_rate(self) -> np.ndarray:
        """Arrivals per second over their mean, float [seconds].

        A stamp says no more than in which step its request came: requests are spread evenly over the step
        that begins with their stamp.

        Raises:
            TraceError: all times are the same, or most but not all are to the minute, or there is less than
                one request per second, or per step of the stamps where this is longer: single requests, and
                moments that stand for a minute, would be spikes of load.
        """
        step_us, requests = self.step_us, len(self.arrival_us)
        if step_us == 0:
            raise TraceError(f"{self.path}: all {requests} requests have the same time, which gives no load")
        if _SECOND_US % step_us == 0:
            counts = np.bincount(self.arrival_us // _SECOND_US).astype(np.float64)
        else:
            stamps, there = np.unique(self.arrival_us, return_counts=True)
            edges = np.stack([stamps, stamps + step_us], axis=-1).ravel() / _SECOND_US
            before = np.cumsum(there) - there
            arrived = np.stack([before, before + there], axis=-1).ravel()
            counts = np.diff(np.interp(np.arange(max(1, math.floor(edges[-1])) + 1), edges, arrived))
        to_the_minute = np.unique(self.arrival_us % _MINUTE_US, return_counts=True)[1].max()
        if step_us % _MINUTE_US and 2 * to_the_minute > requests:
            raise TraceError(
                f"{self.path}: {to_the_minute} of {requests} times lie on one moment of the minute, the "
                "others do not: that would be a spike in every minute; round all times down to the minute"
            )
        longest_s = max(1.0, step_us / _SECOND_US)
        if requests * longest_s < len(counts):
            raise TraceError(
                f"{self.path}: {requests} requests in {len(counts)} s are less than one per {longest_s:g} s, "
                "each would be a spike of load: give a busier trace, or round the times down to steps of "
                f"{2 * math.ceil(len(counts) / requests)} s or more, over which requests are spread evenly"
            )
        return counts / counts.mean()


def read_request_trace(path: str | Path) -> RequestTrace:
    """Read and check a trace.

    Raises:
        TraceError: no such file, none of the known formats, a time or a number of tokens that is none, fewer
            than 2 requests, or more than 31 days; names file, line and column.
    """
    name = str(path)
    if not Path(path).is_file():
        raise TraceError(f"{name}: no such trace; traffic.trace must name a file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            times, prompts, outputs = _columns(name, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{name}: not a CSV file or JSON lines in UTF-8 ({error})") from error
    if len(times) < 2:
        raise TraceError(f"{name}: holds {len(times)} requests, at least 2 are needed")
    time_us = np.array(times, np.int64)
    order = np.argsort(time_us, kind="stable")
    arrival_us = time_us[order] - time_us[order[0]]
    if arrival_us[-1] > _LONGEST_US:
        raise TraceError(
            f"{name}: spans {arrival_us[-1] / 86_400 / _SECOND_US:.0f} days, at most 31 are read; check its "
            "times, or cut it"
        )
    tokens = (np.array(column, np.int64)[order] if column else None for column in (prompts, outputs))
    return RequestTrace(
        path=name, arrival_us=arrival_us, prompt_tokens=next(tokens), output_tokens=next(tokens)
    )


def _columns(path: str, file: TextIO) -> tuple[list[int], list[int], list[int]]:
    """Times in microseconds, and tokens of prompts and outputs, in the order of the file."""
    json_lines = file.read(1) == "{"
    file.seek(0)
    rows = _json_rows(path, file) if json_lines else _csv_rows(path, file)
    known: _Format | None = None
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    for line, row in rows:
        if known is None:
            known = next((f for f in (_JSON_LINES if json_lines else _CSV) if f.time in row), None)
            if known is None:
                names = " or ".join(f.time for f in (_JSON_LINES if json_lines else _CSV))
                raise TraceError(f"{path}: no column {names} in the header {list(row)}")
            present = [name in row for name in known[2:]]
        if line is None:  # the header
            continue
        columns[0].append(_time_us(path, line, known, row.get(known.time)))
        for column, name, there in zip(columns[1:], known[2:], present, strict=True):
            if there:
                column.append(_tokens(path, line, name, row.get(name)))
    return columns


def _csv_rows(path: str, file: TextIO) -> Iterator[tuple[int | None, dict[Any, Any]]]:
    """(line, row) of a CSV file; first its header, with no line."""
    reader = csv.DictReader(file, skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    yield None, dict.fromkeys(reader.fieldnames)
    for row in reader:
        if None in row:
            raise TraceError(f"{path}, line {reader.line_num}: more fields than the header names")
        yield reader.line_num, row


def _json_rows(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of JSON lines; numbers stay text, as in a CSV file."""
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}, line {line}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise TraceError(f"{path}, line {line}: not a JSON object")
        yield line, row


def _number(text: Any) -> Decimal | None:
    """A finite number, None for any other text."""
    try:
        number = Decimal(text) if isinstance(text, str) else Decimal("NaN")
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _time_us(path: str, line: int, known: _Format, text: Any) -> int:
    number = _number(text)  # before dates: to `fromisoformat` 20240512 is one
    if number is not None:
        for least, unit_us in _EPOCH_US.items():
            if least <= number < 10 * least:
                return round(number * unit_us)
        if known.unit_us is not None and 0 <= number < min(_EPOCH_US):
            return round(number * known.unit_us)
        raise TraceError(
            f"{path}, line {line}: {known.time} {text} is a number, but no epoch time in s, ms, us or ns: "
            "write an ISO date and time, or seconds from the start in a column Timestamp"
        )
    try:
        time = datetime.fromisoformat(text.strip() if isinstance(text, str) else "")
    except ValueError as error:
        raise TraceError(
            f"{path}, line {line}: {known.time} {text!r} is neither an ISO date and time nor a number"
        ) from error
    # Of the public traces some name a zone; the others mean UTC, never a local zone with its summer time.
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (time - _EPOCH) // timedelta(microseconds=1)


def _tokens(path: str, line: int, name: str, text: Any) -> int:
    number = _number(text)
    if number is None or not 0 <= number < 10**9 or number != int(number):
        raise TraceError(f"{path}, line {line}: {name} must be a whole number from 0 on, got {text!r}")
    return int(number)
