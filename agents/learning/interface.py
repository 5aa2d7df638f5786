"""What a policy was trained to read and to set, and on what, kept with its run and compared before use.

Shapes alone would let a policy read one field as another that took its place, and names of files alone would
let a run continue in another world than it began in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium

from thermoe_env.configs import config_path
from thermoe_env.mdp.fields import FIELDS, ranges_of
from thermoe_env.problem.problem import Problem

INTERFACE_FILE = "interface.json"


class InterfaceError(ValueError):
    """A run does not say what it was trained for; the message names the file and the remedy."""


def is_of_run(model: Path) -> bool:
    """Whether a zip lies in a run folder of this project; those of other programs are not judged."""
    return model.name in ("best_model.zip", "last_model.zip") and (model.parent / "config.yaml").is_file()


def interface_of(problem: Problem, began_with: str | None = None) -> str:
    """JSON: version of the environment, interval, every field's name, unit and range, every knob's levels.

    Under `trained_on` the SHA-256 of the scenario and of the contents of every file that it names, under
    `began_with` that of the trained model whose weights a run began with; null where there was none.
    """
    digests = {name: digest for name, (_, digest) in _inputs(problem).items()}
    about = {**_interface(problem), "trained_on": digests, "began_with": began_with}
    return json.dumps(about, indent=1) + "\n"


def began_with(folder: Path) -> str | None:
    """SHA-256 of the trained model that a run began with, None where there was none.

    Raises:
        InterfaceError: the run's interface.json is missing or damaged.
    """
    file = folder / INTERFACE_FILE
    try:
        return _read(file)["began_with"]
    except (KeyError, TypeError) as error:
        raise _damaged(file, error) from error


def mismatch(folder: Path, problem: Problem) -> str:
    """How what a run was trained for differs from `problem`, in words; empty where it does not.

    The values of the levels may differ: on another card they stand for each other in order.

    Raises:
        InterfaceError: the run's interface.json is missing or damaged.
    """
    file = folder / INTERFACE_FILE
    try:
        return "; ".join(_differences(_read(file), _interface(problem)))
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error


def changed_inputs(folder: Path, problem: Problem) -> list[str]:
    """What a run was trained on that is not what `problem` has now: `the scenario`, or file and path.

    Raises:
        InterfaceError: the run's interface.json is missing or damaged.
    """
    file, now = folder / INTERFACE_FILE, _inputs(problem)
    try:
        there = dict(_read(file)["trained_on"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InterfaceError):
            raise
        raise _damaged(file, error) from error
    named = {name: path for name, (path, _) in now.items()}
    digests = {name: digest for name, (_, digest) in now.items()}
    return [
        f"the {name} {named.get(name, '')}".strip()
        for name in dict.fromkeys((*there, *digests))
        if there.get(name) != digests.get(name)
    ]


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InterfaceError(
            f"{file} is missing, which says what the run was trained for: put it back, or train again"
        ) from error
    except ValueError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InterfaceError:
    return InterfaceError(f"{file} is damaged ({error!r}): put a whole copy in its place, or train again")


def _inputs(problem: Problem) -> dict[str, tuple[str, str]]:
    """Path and SHA-256 of what makes a problem; the scenario's leaves the paths out, which may be moved."""
    scenario = problem.scenario
    said = asdict(scenario)
    del said["profile"], said["twin"], said["traffic"]["trace"]
    files = {
        "profile": config_path("profiles", scenario.profile, ".json"),
        "twin": config_path("twin", scenario.twin, ".yaml"),
    }
    if scenario.traffic.trace is not None:
        files["trace"] = Path(scenario.traffic.trace)
    if scenario.inlet is not None and scenario.inlet.trace is not None:
        files["inlet"], said["inlet"]["trace"] = Path(scenario.inlet.trace), None
    contents = {name: (str(path), path.read_bytes()) for name, path in files.items()}
    contents = {"scenario": ("", json.dumps(said, sort_keys=True).encode()), **contents}
    return {name: (path, hashlib.sha256(content).hexdigest()) for name, (path, content) in contents.items()}


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
