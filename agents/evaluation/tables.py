"""Tables of an evaluation as they lie in its folder, read back and checked: an edited number ranks nobody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.files import shown_name
from agents.play.metrics import KPIS

_TEXTS = ("policy", "run", "world", "device")
_FLAGS = ("whole", "shut_down")
_COLUMNS = (*_TEXTS, "seed", "time_s", *KPIS, *_FLAGS)
_LATE = "late_fraction", "late_interactive", "late_deferrable"
_LEAST_C, _MOST_C = -60.0, 300.0
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("quality", *_LATE, "waiting_fraction"), (0.0, 1.0)),
    **dict.fromkeys(("expert_entropy", "ttt_time_share"), (0.0, 1.0)),
    **dict.fromkeys(("peak_c", "mean_c"), (_LEAST_C, _MOST_C)),
    "return": (-np.inf, np.inf),
}
"""What an indicator lies between; the others are not negative."""
_ABOVE_0 = ("time_s", "j_per_good", "energy_j", "mean_power_w")
_MAY_LACK = (
    "quality", "latency_p50_s", "latency_p95_s", "latency_p99_s", *_LATE, "waiting_fraction",
    "expert_entropy", "ttt_time_share",
)  # fmt: skip
"""NaN where nothing was answered, arrived or computed."""
_ROUNDING = 1e-6
"""Tables keep 9 digits."""


class ResultsError(ValueError):
    """Results that cannot be compared with the others, or are no results."""


@dataclass(frozen=True)
class Played:
    """Tables of an evaluation; policies carry the names that they have in the comparison."""

    episodes: pd.DataFrame
    steps: pd.DataFrame

    def renamed(self, names: dict[str, str]) -> Played:
        """With new names, only the policies that have one."""
        tables = [table[table.policy.isin(names)] for table in (self.episodes, self.steps)]
        return Played(*(table.assign(policy=table.policy.map(names)) for table in tables))


def read_tables(folder: Path) -> Played:
    """Read episodes.csv and steps.csv.gz of a folder.

    Raises:
        ResultsError: a table is missing, has other columns or no rows, an episode twice, a cell that is no
            number or out of its range, or numbers of a row that contradict each other; the message names the
            file, the line and the column.
    """
    file = folder / "episodes.csv"
    episodes, steps = _read(file), _read(folder / "steps.csv.gz")
    if missing := sorted({*_COLUMNS} - {*episodes} | {"policy", "run", "seed"} - {*steps}):
        raise ResultsError(
            f"{folder} was written by another version: its tables lack {', '.join(missing)}; play it again"
        )
    if unknown := sorted({*episodes} - {*_COLUMNS}):
        raise ResultsError(f"{file}: unknown columns {', '.join(unknown)}: remove them, or play it again")
    _check_episodes(file, episodes)
    key = ["policy", "run", "seed"]
    _refuse_text(folder / "steps.csv.gz", steps.drop(columns=key[:2]))
    here, there = ({*zip(*(table[name] for name in key), strict=True)} for table in (episodes, steps))
    if here != there:
        policy, _, seed = min(here ^ there)
        raise ResultsError(
            f"{folder}: {policy}, seed {seed} is in one of episodes.csv and steps.csv.gz only; play it again"
        )
    return Played(episodes, steps)


def _read(file: Path) -> Any:
    try:
        # A policy may be called NA or null; numbers are written as such, and nothing where there is none.
        table = pd.read_csv(file, dtype={"policy": str, "run": str}, keep_default_na=False, na_values=[""])
    except (OSError, EOFError, ValueError) as error:
        raise ResultsError(f"{file} cannot be read ({error}); play it again") from error
    if not len(table):
        raise ResultsError(f"{file} holds no rows; play it again")
    return table.assign(run=table.run.fillna("")) if "run" in table else table


def _check_episodes(file: Path, episodes: Any) -> None:
    for name in ("policy", "world", "device"):
        for value in episodes[name].unique():
            try:
                shown_name(str(value))
            except ValueError as error:
                raise ResultsError(f"{file}: {name} {error}") from error
    for name in ("world", "device"):
        other = episodes[name] != episodes[name].iloc[0]
        _refuse(file, episodes, name, other, "is another one than in the first row")
    for name in _FLAGS:
        if episodes[name].dtype != bool:
            raise ResultsError(f"{file}: {name} must be True or False in every row")
    _refuse_text(file, episodes.drop(columns=[*_TEXTS, *_FLAGS]))
    _refuse(file, episodes, "seed", ~((episodes.seed >= 0) & (episodes.seed % 1 == 0)), "is no seed")
    twice = episodes.duplicated(["policy", "run", "seed"])
    _refuse(file, episodes, "seed", twice, "is there twice for this policy")
    for name in ("time_s", *KPIS):
        values = episodes[name].to_numpy(float)
        low, high = _RANGES.get(name, (0.0, np.inf))
        slack = _ROUNDING if np.isfinite(high) else 0.0
        bad = ~((values >= low) & (values <= high + slack)) & ~(np.isnan(values) & (name in _MAY_LACK))
        bad |= (name in _ABOVE_0) & (values == 0.0)
        bad |= (name != "j_per_good") & np.isinf(values)  # infinite where nothing was good
        _refuse(file, episodes, name, bad, f"lies outside of {low:g} to {high:g}")
    with np.errstate(divide="ignore"):
        of_row = {
            "mean_power_w": episodes.energy_j / episodes.time_s,
            "j_per_good": episodes.energy_j / (episodes.goodput_rps * episodes.time_s),
        }
    for name, expected in of_row.items():
        bad = ~np.isclose(episodes[name], expected, rtol=_ROUNDING, atol=0.0)
        _refuse(file, episodes, name, bad, "contradicts energy_j, time_s and goodput_rps")


def _refuse_text(file: Path, table: Any) -> None:
    """Refuse a column that does not hold numbers alone."""
    for name in table.select_dtypes(exclude="number"):
        numbers = pd.to_numeric(table[name].astype(str), errors="coerce")
        _refuse(file, table, name, pd.isna(numbers), "is not a number")


def _refuse(file: Path, table: Any, name: str, bad: Any, rule: str) -> None:
    """Refuse the file at the first row marked bad."""
    if len(rows := np.flatnonzero(bad)):
        value = table[name].iloc[rows[0]]
        raise ResultsError(f"{file}, line {rows[0] + 2}: {name} {value} {rule}; play it again")
