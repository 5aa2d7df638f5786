"""Recorded telemetry of a device: reading, checking, and means over equal intervals.

A trace is a CSV file, one row per sample, named `X_telemetry.csv`. What its driver said of limits and
versions lies beside it in `X_nvml_info.json`; what load ran, if known, in `X_segments.csv`.
`python -m thermoe_env.calibration record` writes the first two.
"""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.device.base import AVERAGE_S, MOST_OF_LIMIT, PERIOD_S, RANGES
from thermoe_env.errors import TraceFormatError

COLUMNS = (
    "t", "temp_c", "mem_temp_c", "power_w", "power_inst_w", "energy_mj",
    "sm_mhz", "mem_mhz", "util", "reasons",
)  # fmt: skip
"""`t` in s; `energy_mj` is the cumulative counter; `reasons` is NVML's bitmask of clock event reasons;
`mem_temp_c` is empty or 0 throughout where the card has no such sensor."""
_CHECKED = {
    "temp_c": "temp_c",
    "mem_temp_c": "mem_temp_c",
    "power_w": "power_w",
    "power_inst_w": "power_w",
    "sm_mhz": "sm_clock_mhz",
}
"""Columns whose values must lie within one of `moe.device.base.RANGES`."""
POWER_CAP_REASON = 0x4
THROTTLE_REASONS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""Power cap, hardware slowdown, software and hardware thermal slowdown, power brake."""
SENSOR_LAG_S = 0.1
"""How far temperature trails power: the sensor's 100 ms hold and the rise of the die itself. On two H100s
forecasts over a second are best at 0.1 s."""
FROZEN_S = 2.0
SUMMED_S = 10.0
"""From this length on the sum of `power_w`, which trails by a second, judges the energy counter."""
LEAST_STEP_W = 100.0
LEAST_RESPONSE_C_PER_W = 0.004
MAX_GAP_S = 5.0
MAX_GAP_STEPS = 10.0

_FOREIGN = {"temperature.gpu": "nvidia-smi", "DCGM_FI_DEV_GPU_TEMP": "DCGM"}
"""A column of another tool's table -> the tool."""

_SEGMENT_NUMBERS = ("t0", "t1", "k", "tokens", "duty", "steps", "mean_lat_ms")
SEGMENT_COLUMNS = ("phase", *_SEGMENT_NUMBERS, "load")
"""What `load_segments` reads; `load` may be absent."""
UNNAMED_LOAD = "unnamed"
"""The load of segments without a column `load`."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Means over equal intervals of a trace, float [N] each."""

    interval_s: float
    t_s: np.ndarray
    """End of each interval."""
    power_w: np.ndarray
    """From the energy counter."""
    temp_c: np.ndarray
    mem_temp_c: np.ndarray
    """NaN where the card has no such sensor."""
    util: np.ndarray
    sm_mhz_min: np.ndarray
    power_capped: np.ndarray
    """Fraction of samples in which the power cap held the clock."""
    throttled: np.ndarray
    """Fraction of samples in which the cap, heat or the board's brake did."""

    def __len__(self) -> int:
        return len(self.t_s)

    def until(self, count: int) -> Intervals:
        """The first `count` intervals."""
        return self.slice(0, count)

    def slice(self, start: int, stop: int) -> Intervals:
        """The intervals from number `start` to before `stop`."""
        arrays = {k: v[start:stop] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return Intervals(interval_s=self.interval_s, **arrays)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A checked trace: one float array [N] per column of the file; NaN where the card lacks a sensor."""

    path: Path
    sha256: str
    t: np.ndarray
    temp_c: np.ndarray
    mem_temp_c: np.ndarray
    power_w: np.ndarray
    power_inst_w: np.ndarray
    energy_mj: np.ndarray
    sm_mhz: np.ndarray
    mem_mhz: np.ndarray
    util: np.ndarray
    reasons: np.ndarray

    def intervals(self, interval_s: float = 1.0) -> Intervals:
        """Means over intervals of `interval_s`.

        Power is the energy counter's difference, interpolated between its ticks. Temperatures are means
        of the samples, `SENSOR_LAG_S` later: many samples of whole degrees resolve fractions of one.

        Raises:
            TraceFormatError: the counter ticks too slowly, or the trace holds no two intervals.
        """
        ticks = np.flatnonzero(np.diff(self.energy_mj) > 0.0) + 1
        tick_s, tick_j = self.t[ticks], self.energy_mj[ticks] / 1e3
        if len(ticks) < 3 or np.median(np.diff(tick_s)) > interval_s / 2.0:
            raise TraceFormatError(
                f"{self.path}: energy_mj ticks too slowly for {interval_s} s intervals; "
                "record the cumulative counter at 10 Hz or more"
            )
        count = math.floor((min(self.t[-1] - SENSOR_LAG_S, tick_s[-1]) - tick_s[0]) / interval_s + 1e-9)
        if count < 2:
            raise TraceFormatError(
                f"{self.path}: {self.t[-1] - self.t[0]:.1f} s is too short to average; record longer"
            )
        edges = tick_s[0] + interval_s * np.arange(count + 1)
        first = np.searchsorted(self.t, edges, side="right")
        late = np.searchsorted(self.t, edges + SENSOR_LAG_S, side="right")
        if not (np.all(np.diff(first) > 0) and np.all(np.diff(late) > 0)):
            raise TraceFormatError(
                f"{self.path}: an interval of {interval_s} s holds no sample; record faster"
            )

        def mean(values: np.ndarray, start: np.ndarray) -> np.ndarray:
            sums = np.append(0.0, np.cumsum(values))[start]
            return np.diff(sums) / np.diff(start)

        return Intervals(
            interval_s=interval_s,
            t_s=edges[1:],
            power_w=np.diff(np.interp(edges, tick_s, tick_j)) / interval_s,
            temp_c=mean(self.temp_c, late),
            mem_temp_c=mean(self.mem_temp_c, late),
            util=mean(self.util, first),
            sm_mhz_min=np.minimum.reduceat(self.sm_mhz[: first[-1]], first[:-1]),
            power_capped=mean((self.reasons.astype(np.int64) & POWER_CAP_REASON > 0).astype(float), first),
            throttled=mean((self.reasons.astype(np.int64) & THROTTLE_REASONS > 0).astype(float), first),
        )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of one load within a trace."""

    phase: str
    t0: float
    t1: float
    k: float
    """Experts per token; 0 when idle."""
    tokens: float
    """Tokens per forward pass; 0 when idle."""
    duty: float
    """Busy fraction asked for."""
    steps: float
    """Forward passes done."""
    mean_latency_s: float
    """Mean time of one."""
    load: str = UNNAMED_LOAD
    """Which load: energies of one say nothing of another."""


def load_trace(path: str | Path) -> Trace:
    """Read and check a trace.

    Raises:
        TraceFormatError: another tool's table, missing column, not a number, what no sensor says
            (`moe.device.base.RANGES`), time repeated or running backward, a gap (more than 10 median steps or
            5 s), an energy counter that falls, stands still, jumps or does not
            go with power; names file, row and field.
    """
    path = Path(path)
    table = _read_numbers(path, COLUMNS, lacking=("mem_temp_c",))
    t, energy = table["t"], table["energy_mj"]
    if len(t) < 3:
        raise TraceFormatError(f"{path}: {len(t)} rows; a trace needs at least 3")
    for column, name in _CHECKED.items():
        (low, high), values = RANGES[name], table[column]
        odd = np.flatnonzero((values < low) | (values > high))
        if len(odd):
            raise TraceFormatError(
                f"{path}: row {odd[0] + 2}: {column} is {values[odd[0]]:g}, which no card at work says "
                f"({low:g} to {high:g}): cut the trace there, or record again with a current driver"
            )
    steps = np.diff(t)
    _refuse(path, "t", steps <= 0.0, "time must ascend: remove the repeated or swapped row")
    allowed_s = min(MAX_GAP_S, MAX_GAP_STEPS * float(np.median(steps)))
    _refuse(path, "t", steps > allowed_s, f"gap of more than {allowed_s:.3g} s: cut the trace there")
    _refuse(
        path, "energy_mj", np.diff(energy) < 0.0, "the counter fell (driver reloaded?): cut the trace there"
    )
    moved = np.append(0, np.flatnonzero(np.diff(energy) > 0.0) + 1)  # rows at which the counter last moved
    since = t - t[moved[np.searchsorted(moved, np.arange(len(t)), side="right") - 1]]
    _refuse(
        path, "energy_mj", (since > FROZEN_S)[1:],
        f"the counter is frozen for more than {FROZEN_S:g} s: reload the driver and record again",
    )  # fmt: skip
    most_w = MOST_OF_LIMIT * max(table["power_w"].max(), table["power_inst_w"].max())
    before = np.maximum(0, np.searchsorted(t, t - AVERAGE_S, side="right") - 1)
    jumped = energy - energy[before] > 1e3 * most_w * (t - t[before] + PERIOD_S)
    _refuse(path, "energy_mj", jumped[1:], f"the counter jumped, by more than {most_w:.0f} W: cut the trace")
    used_j, integral_j = (energy[-1] - energy[0]) / 1e3, float(np.trapezoid(table["power_w"], t))
    if t[-1] - t[0] > SUMMED_S and not 0.5 < used_j / integral_j < 2.0:
        raise TraceFormatError(
            f"{path}: energy_mj rose by {used_j:.4g} J while power_w adds up to {integral_j:.4g}: is it in "
            "mJ, and of the same card?"
        )
    return Trace(path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **table)


def load_segments(path: str | Path) -> list[Segment]:
    """Read the loads of a trace.

    Columns are phase, t0, t1, k, tokens, duty, steps, mean_lat_ms and, where loads of several kinds exist,
    load; others are left alone.

    Raises:
        TraceFormatError: missing column, not a number, a segment that ends before it begins or overlaps the
            one above it, work without tokens or steps.
    """
    path = Path(path)
    table = _read_numbers(path, _SEGMENT_NUMBERS, ("phase",), ("load",))
    segments = []
    for i in range(len(table["t0"])):
        values = {name: float(table[name][i]) for name in _SEGMENT_NUMBERS}
        row, latency_s = i + 2, values.pop("mean_lat_ms") / 1e3
        if values["t1"] <= values["t0"]:
            raise TraceFormatError(
                f"{path}: row {row}: t1 must lie after t0={values['t0']}, got {values['t1']}"
            )
        if segments and values["t0"] < segments[-1].t1:
            raise TraceFormatError(f"{path}: row {row}: t0: begins before the segment above it ends")
        busy = values["tokens"] > 0
        if busy and not (
            values["steps"] >= 0 and latency_s > 0 and 0 < values["duty"] <= 1 and values["k"] >= 1
        ):
            raise TraceFormatError(
                f"{path}: row {row}: work needs steps >= 0, mean_lat_ms > 0, 0 < duty <= 1 and k >= 1"
            )
        load = str(table["load"][i]) if "load" in table else ""
        segments.append(
            Segment(
                phase=str(table["phase"][i]), mean_latency_s=latency_s, load=load or UNNAMED_LOAD, **values
            )
        )
    return segments


def segments_path(trace: Path) -> Path:
    """Where what ran in a trace `X_telemetry.csv` lies: `X_segments.csv`."""
    return trace.with_name(trace.stem.removesuffix("_telemetry") + "_segments.csv")


def _read_numbers(
    path: Path,
    numbers: tuple[str, ...],
    texts: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    lacking: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Columns of a CSV file; row numbers in messages are its lines.

    Args:
        path: the file.
        numbers: columns of numbers.
        texts: columns of text.
        optional: columns of text that it may have.
        lacking: which of `numbers` may be of a sensor that the card lacks: those are NaN.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if tool := next((tool for name, tool in _FOREIGN.items() if name in header), None):
                raise TraceFormatError(
                    f"{path}: row 1: a table of {tool}, which is not read: record with `thermalmoe-calibrate "
                    f"record`, or write one card's readings, at 10 Hz or more, as columns {numbers}"
                )
            missing = [name for name in (*numbers, *texts) if name not in header]
            if missing:
                raise TraceFormatError(
                    f"{path}: row 1: missing column {missing[0]!r}; needs {(*numbers, *texts)}"
                )
            texts = (*texts, *(name for name in optional if name in header))
            at = {name: header.index(name) for name in (*numbers, *texts)}
            columns: dict[str, list[str]] = {name: [] for name in at}
            lines: list[int] = []
            for row in reader:
                if len(row) != len(header):
                    raise TraceFormatError(
                        f"{path}: row {reader.line_num}: {len(row)} fields, the header names {len(header)}"
                    )
                lines.append(reader.line_num)
                for name in at:
                    columns[name].append(row[at[name]])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceFormatError(f"{path}: cannot be read as CSV ({error})") from error
    table = {name: np.array(columns[name]) for name in texts}
    for name in numbers:
        if name in lacking and all(map(_says_nothing, columns[name])):
            table[name] = np.full(len(lines), math.nan)
        else:
            cells = zip(lines, columns[name], strict=True)
            table[name] = np.array([_number(path, line, name, cell) for line, cell in cells])
    return table


def _number(path: Path, row: int, field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TraceFormatError(f"{path}: row {row}: {field} must be a finite number, got {text!r}")
    return value


def _says_nothing(cell: str) -> bool:
    """Whether a cell is what tools write, or drivers answer, for a sensor that is not there."""
    cell = cell.strip()
    return cell in ("", "N/A", "[N/A]") or set(cell) <= set("0.")


def _refuse(path: Path, field: str, bad: np.ndarray, rule: str) -> None:
    """Refuse the file at the first difference marked bad (difference i ends in line i + 3)."""
    if np.any(bad):
        raise TraceFormatError(f"{path}: row {int(np.flatnonzero(bad)[0]) + 3}: {field}: {rule}")


def refuse_foreign_temperature(path: Path, intervals: Intervals) -> None:
    """Refuse a trace whose die does not warm with its power: sensors of two cards, most likely.

    Raises:
        TraceFormatError: the mean response to steps of power is below a fifth of any card's.
    """
    lag = max(1, round(2.0 / intervals.interval_s))
    power = intervals.power_w[lag:] - intervals.power_w[:-lag]
    temp = intervals.temp_c[lag:] - intervals.temp_c[:-lag]
    step = np.abs(power) > LEAST_STEP_W
    if step.sum() < 3:
        return
    slope = float((temp[step] * power[step]).sum() / (power[step] ** 2).sum())
    if slope < LEAST_RESPONSE_C_PER_W:
        raise TraceFormatError(
            f"{path}: temp_c answers steps of power by {slope:.4f} degC/W, a card's own sensor by at least "
            f"{LEAST_RESPONSE_C_PER_W}: is the temperature that of another card?"
        )
