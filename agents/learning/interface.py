"""What a policy was trained to read and to set, kept with its run and compared before it is used.

Shapes alone would let a policy read one field as another that took its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium

from thermoe_env.mdp.fields import FIELDS, ranges_of
from thermoe_env.problem.problem import Problem

INTERFACE_FILE = "interface.json"


def interface_of(problem: Problem) -> str:
    """JSON: version of the environment, interval, every field's name, unit and range, every knob's levels."""
    return json.dumps(_interface(problem), indent=1) + "\n"


def mismatch(folder: Path, problem: Problem) -> str:
    """How what a run was trained for differs from `problem`, in words; empty where it does not.

    The values of the levels may differ: on another card they stand for each other in order. Folders without
    an interface.json (of other programs) are not judged.
    """
    file = folder / INTERFACE_FILE
    if not file.is_file():
        return ""
    try:
        return "; ".join(_differences(json.loads(file.read_text(encoding="utf-8")), _interface(problem)))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        return f"{file} is damaged, so nobody can tell ({error!r})"


def _interface(problem: Problem) -> dict[str, Any]:
    ranges = ranges_of(problem)
    versions = [spec.version for spec in gymnasium.registry.values() if spec.name == "ThermalMoE"]
    return {
        "environment_version": max(version for version in versions if version is not None),
        "interval_s": problem.scenario.interval_s,
        "fields": {
            field.name: [field.unit, float(low), float(high)]
            for field, low, high in zip(FIELDS, *ranges, strict=True)
        },
        "knobs": {name: list(problem.knobs.levels[name]) for name in problem.knobs.controlled},
    }


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    found = [
        f"{name} {there[name]} there, {here[name]} here"
        for name in ("environment_version", "interval_s")
        if there[name] != here[name]
    ]
    found += _fields(there["fields"], here["fields"])
    old, new = ({name: len(levels) for name, levels in side["knobs"].items()} for side in (there, here))
    if list(old.items()) != list(new.items()):
        found.append(f"knobs (and how many levels) {old} there, {new} here")
    return found


def _fields(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Differences of two field tables."""
    lost, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    scaled = sorted(name for name in set(there) & set(here) if there[name] != here[name])
    found = {"fields observed only there": lost, "only here": new, "of other units or ranges": scaled}
    words = [f"{what}: {names}" for what, names in found.items() if names]
    if not words and list(there) != list(here):
        words = ["the same fields in another order"]
    return words
