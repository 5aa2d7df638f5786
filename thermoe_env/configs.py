"""The shipped configuration: where its files are."""

from __future__ import annotations

from pathlib import Path

from thermoe_env.errors import ScenarioError


def configs_dir() -> Path:
    """Folder of the shipped configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_path(kind: str, name: str, suffix: str) -> Path:
    """Path of a shipped configuration by name, or of the user's own by path.

    Raises:
        ScenarioError: no such file; the message lists the shipped names.
    """
    folder = configs_dir() / kind
    for path in (Path(name), folder / f"{name}{suffix}"):
        if path.is_file():
            return path
    known = sorted(p.stem for p in folder.glob(f"*{suffix}"))
    raise ScenarioError(f"no {kind} {name!r}: give one of {known} or the path of a {suffix} file")
