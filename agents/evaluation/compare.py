"""Episodes of earlier evaluations, taken into a comparison instead of being played again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.evaluation.tables import Played, ResultsError, read_tables
from agents.files import plain, shown_name
from agents.play.metrics import KPIS, world_of
from thermoe_env.configs import read_yaml
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.scenario import Scenario


def is_results(folder: str | Path) -> bool:
    """Whether `evaluate.py` wrote results there."""
    return (Path(folder) / "episodes.csv").is_file()


def read_results(folders: Sequence[str | Path], scenario: Scenario, seeds: Sequence[int]) -> list[Played]:
    """Read results of the same episodes.

    A policy that is in several folders with the same numbers is taken once. One with other numbers (other
    settings, or measured again) is called <folder>/<policy>, except for the first.

    Args:
        folders: as `evaluate.py` writes them.
        scenario: what must have been played.
        seeds: on which episodes.

    Raises:
        ResultsError: `read_tables` refuses a folder; it holds another scenario, seeds, world or device, and
            the message names the difference; or `static` differs in two twins: they are not the same twin.
    """
    taken: dict[str, list[pd.DataFrame]] = {}
    played: list[Played] = []
    for folder in map(Path, folders):
        own = read_tables(folder)
        _refuse_others(folder, own.episodes, scenario, seeds)
        if played:
            refuse_other_world(folder, own.episodes, *world_of(played[0].episodes))
        names = {}
        for policy, rows in own.episodes.groupby("policy", sort=False):
            earlier = taken.setdefault(str(policy), [])
            if any(_same(rows, other) for other in earlier):
                continue
            if earlier and policy == "static" and world_of(rows)[0] == "twin":
                raise ResultsError(
                    f"{folder}: static has other numbers than in {folders[0]}, so its twin was another one "
                    "(version, profile or calibration): play one of them again"
                )
            other = f"{shown_name(folder.resolve().name)}/{policy}"
            names[str(policy)] = other if earlier else str(policy)
            earlier.append(rows)
        played.append(own.renamed(names))
    labels = [label for part in played for label in part.episodes.policy.unique()]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ResultsError(f"{', '.join(sorted(twice))}: two folders have the same name, rename one of them")
    return played


def refuse_other_world(folder: str | Path, episodes: pd.DataFrame, world: str, device: str) -> None:
    """Refuse results of another world or device.

    Raises:
        ResultsError: names both.
    """
    if world_of(episodes) != (world, device):
        there, card = world_of(episodes)
        raise ResultsError(
            f"{folder}: played in world {there!r} ({card}), what it is compared with in {world!r} ({device})"
        )


def _refuse_others(folder: Path, episodes: pd.DataFrame, scenario: Scenario, seeds: Sequence[int]) -> None:
    try:
        kept = read_yaml(folder / "config.yaml")["scenario"]
    except (ScenarioError, KeyError) as error:
        raise ResultsError(f"{folder / 'config.yaml'} does not name the scenario ({error})") from error
    if differences := list(_differences(kept, plain(asdict(scenario)))):
        raise ResultsError(f"{folder} was played on another scenario: {'; '.join(differences)}")
    for _, rows in episodes.groupby(["policy", "run"], sort=False):
        if set(rows.seed) != set(seeds):
            name = "/".join(filter(None, rows[["policy", "run"]].iloc[0]))
            raise ResultsError(
                f"{folder}: {name} was played on {len(rows)} seeds, {rows.seed.min()} to {rows.seed.max()}, "
                f"this comparison is on {len(seeds)}, {min(seeds)} to {max(seeds)}: give --seed and --seeds "
                "as they were there, or play it again"
            )


def _differences(kept: Any, wanted: Any, key: str = "") -> Iterator[str]:
    """What differs, by dotted keys."""
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys([*kept, *wanted]):
            yield from _differences(kept.get(name), wanted.get(name), f"{key}.{name}" if key else str(name))
    elif kept != wanted:
        yield f"{key} {kept} there, {wanted} here"


def _same(rows: pd.DataFrame, others: pd.DataFrame) -> bool:
    """Whether two policies did the same on the same episodes, to the digits that tables keep."""
    both = [table.sort_values(["run", "seed"]) for table in (rows, others)]
    if [*both[0].run] != [*both[1].run]:
        return False
    left, right = (table[list(KPIS)].to_numpy(float) for table in both)
    return np.allclose(left, right, rtol=1e-8, atol=0.0, equal_nan=True)
