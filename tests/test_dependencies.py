"""The lowest versions that are allowed are those that are installed and tried."""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NOT_LOWEST = {"torch"}
"""Stays the build of constraints.txt."""


def test_the_lowest_set_is_what_pyproject_allows_at_least() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    ranges = {r.name: r.specifier for r in map(Requirement, texts) if r.name != project["name"]}
    lowest = {
        name: Version(bound.version)
        for name, specifier in ranges.items()
        for bound in specifier
        if bound.operator == ">=" and name not in NOT_LOWEST
    }
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {name: Version(version) for name, version in pairs}
    assert pins.keys() == ranges.keys()
    assert lowest == {name: version for name, version in pins.items() if name not in NOT_LOWEST}
