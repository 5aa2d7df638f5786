"""Configuration: where its files are, how they are read, and what is said of what is wrong in them."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from thermoe_env.errors import ScenarioError

T = TypeVar("T")
Location = tuple[int | str, ...]
"""Keys and list positions on the way from the top of a file to a value."""


def configs_dir() -> Path:
    """Folder of the shipped configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_path(kind: str, name: str, suffix: str, beside: Path | None = None) -> Path:
    """Path of a shipped configuration by name, or of the user's own by path.

    Args:
        kind: folder in configs.
        name: a shipped name, which goes before a file that is called the same, or a path.
        suffix: of the files.
        beside: folder in which relative paths begin; by default the current one.

    Raises:
        ScenarioError: no such file; the message lists the shipped names.
    """
    folder = configs_dir() / kind
    known = sorted(p.stem for p in folder.glob(f"*{suffix}"))
    if name in known:
        return folder / f"{name}{suffix}"
    path = (beside or Path()) / name
    if not path.is_file():
        where = "" if beside is None else f" in {beside}"
        raise ScenarioError(f"no {kind} {name!r}{where}: give one of {known} or the path of a {suffix} file")
    return path


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, where all but the last would silently be lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in first:
                raise ScenarioError(
                    f"line {line}: key {key.value!r} is given twice, first in line {first[name]}: "
                    "remove one of them"
                )
            first[name] = line
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping of keys.

    Raises:
        ScenarioError: the file cannot be read, is not UTF-8, not YAML, no mapping, or has a key twice; names
            the file and, where there is one, the line.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read ({error.strerror}); name a file that can") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ScenarioError(f"{path}{line}: not YAML ({problem})") from error
    except ScenarioError as error:
        raise ScenarioError(f"{path}, {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise ScenarioError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ScenarioError(f"{path}: must be a mapping of keys (`key: value`), got {found}")
    return raw


def load_settings(kind: type[T], folder: str, name: str | Path) -> T:
    """Read settings: a name in a folder of configs, or the path of a YAML file.

    Raises:
        ScenarioError: no such file, or an unknown, missing or refused key.
    """
    path = config_path(folder, str(name), ".yaml")
    return validated(kind, read_yaml(path), str(path))


def validated(
    kind: type[T], raw: dict[str, Any], origin: str | Callable[[Location], str], also: Sequence[str] = ()
) -> T:
    """Make a dataclass of keys and values.

    Args:
        kind: the dataclass; nested ones are sections.
        raw: its keys.
        origin: where they come from, for messages; a function where that depends on the location.
        also: keys at the top that the file may have besides, for messages.

    Raises:
        ScenarioError: an unknown, missing or refused key; a line for each, with the known ones if needed.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            loc = item["loc"]
            known = f"; known keys: {_known_keys(kind, loc, also)}"
            says: str = {
                "missing": f"is missing{known}",
                "value_error": str(item.get("ctx", {}).get("error")),
                "extra_forbidden": f"is not known{known}",
                "unexpected_keyword_argument": f"is not known{known}",
            }.get(item["type"], f"{item['msg']}, got {reprlib.repr(item['input'])}")
            named = origin if isinstance(origin, str) else origin(loc)
            lines.append(": ".join(filter(None, (named, ".".join(map(str, loc)), says))))
        raise ScenarioError("\n".join(lines)) from error


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`: mappings merge, all else (lists too) is replaced."""
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def _known_keys(kind: Any, loc: Location, also: Sequence[str]) -> list[str]:
    """Keys of the section of `kind` that an error lies in."""
    sections = [kind]
    for part in loc[:-1]:
        sections = [inner for section in sections for inner in _inside(section, part)]
    own = {name for section in sections for name in _fields(section)}
    return sorted(own.union(also if len(loc) == 1 else ()))


def _fields(kind: Any) -> dict[str, Any]:
    """Fields of a dataclass with their types; none for any other type."""
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _inside(kind: Any, part: int | str) -> Iterator[Any]:
    """Types of what lies in a value of type `kind` at a key or position."""
    if part in (own := _fields(kind)):
        yield from _members(own[str(part)])
    elif get_origin(kind) in (tuple, list, dict):
        yield from _members(next(arg for arg in reversed(get_args(kind)) if arg is not Ellipsis))
    else:
        yield kind  # a location also names the member of a union


def _members(kind: Any) -> Iterator[Any]:
    """Types of which a value of type `kind` may be."""
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind
