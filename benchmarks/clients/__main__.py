"""Try the environment in the libraries that use it: `python -m benchmarks.clients` (downloads gigabytes).

Each client gets a virtual environment of its own, made anew, and runs its script there: `with_NAME.py`, which
asserts what its first line says. Versions and outcomes go to docs/clients.md.
"""

from __future__ import annotations

import ast
import json
import platform
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro
from rich.console import Console

from moe.errors import one_line_errors
from moe.terminal import plain_terminal

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clients.md"
CLIENTS: dict[str, tuple[str, ...]] = {
    "gymnasium": ("gymnasium", "pygame"),  # the checker opens a window
    "mo_gymnasium": ("mo-gymnasium",),
    "minari": ("minari[hdf5,create]",),  # `create` for its DataCollector
    "rl_zoo3": ("rl_zoo3", "requests"),  # `enjoy` imports it, the package does not ask for it
    "tianshou": ("tianshou",),
    "skrl": ("skrl",),
    "torchrl": ("torchrl",),
    "rllib": ("ray[rllib]",),
}
"""What each installs beside ThermalMoE; the first names the client."""
SHOWN = ("gymnasium", "numpy", "numba")
"""Versions that the table has for every client."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Try the environment in other libraries, each in a virtual environment of its own."""

    clients: tuple[str, ...] = tuple(CLIENTS)
    """Which; the page is written only where all are tried."""
    folder: Path = ROOT / "runs" / "clients"
    """Holds the virtual environments, and what went wrong in NAME.txt."""
    timeout_s: float = 600.0
    """For installing one, and for its script."""


@dataclass(frozen=True)
class Outcome:
    """How one client did."""

    name: str
    versions: dict[str, str]
    failure: str = ""
    """Last line of what was printed; empty where all went well."""

    def row(self) -> str:
        """Its line in the table."""
        package = CLIENTS[self.name][0].partition("[")[0]
        proves = ast.get_docstring(ast.parse(script(self.name).read_text(encoding="utf-8")))
        versions = [self.versions.get(name, "-") for name in (package, *SHOWN)]
        return f"| {package} | {' | '.join(versions)} | {proves} | {self.failure or 'works'} |"


def script(name: str) -> Path:
    """Of a client."""
    return Path(__file__).with_name(f"with_{name}.py")


def torch_build() -> str:
    """The torch that the tests run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def attempt(name: str, options: Options) -> Outcome:
    """Install a client and run its script."""
    home = options.folder / name
    venv.create(home, clear=True, with_pip=True)
    python = home / "bin" / "python"
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", torch_build()]
    versions: dict[str, str] = {}
    try:
        run(install, options)  # alone, then held: where a CPU build is wanted, nothing may bring another
        run([*install, "-e", ROOT, *CLIENTS[name]], options)
        listed = run([python, "-m", "pip", "list", "--format=json"], options)
        versions = {row["name"].lower(): row["version"] for row in json.loads(listed)}
        run([python, "-m", f"benchmarks.clients.with_{name}"], options)
    except subprocess.TimeoutExpired:
        return Outcome(name, versions, f"not done in {options.timeout_s:.0f} s")
    except subprocess.CalledProcessError as error:
        (options.folder / f"{name}.txt").write_text(error.stdout + error.stderr, encoding="utf-8")
        last = error.stderr.strip().splitlines()[-1:] or ["said nothing"]
        return Outcome(name, versions, f"fails: {last[0]}".replace("|", "\\|"))
    return Outcome(name, versions)


def run(command: list[str | Path], options: Options) -> str:
    """What a command prints.

    Raises:
        CalledProcessError: it fails.
        TimeoutExpired: it takes longer than it may.
    """
    return subprocess.run(
        command, cwd=options.folder, capture_output=True, text=True, check=True, timeout=options.timeout_s
    ).stdout


def page(outcomes: list[Outcome]) -> str:
    """The table with what it is about."""
    heads = ("client", "version", *SHOWN, "what its script asserts", "outcome")
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(outcome.row() for outcome in outcomes),
    ]
    table = "\n".join(lines)
    return f"""# Clients

`ThermalMoETwin-v0` in the libraries that use it, each in a virtual environment of its own. "The plain
environment" is `gymnasium.make` with the same seed and actions. Written by `python -m benchmarks.clients`
on {datetime.now(UTC):%Y-%m-%d} with Python {platform.python_version()}, from the scripts in
`benchmarks/clients`; what to mind with each is in [ecosystem.md](ecosystem.md#libraries-that-train).

{table}
"""


def main(options: Options) -> None:
    """Try all, say how each did, write the page.

    Raises:
        ValueError: an unknown client.
    """
    if unknown := sorted(set(options.clients) - CLIENTS.keys()):
        raise ValueError(f"clients must be of {sorted(CLIENTS)}, got {unknown}")
    options.folder.mkdir(parents=True, exist_ok=True)
    console, outcomes = Console(), []
    for name in options.clients:
        start = time.perf_counter()
        outcomes.append(attempt(name, options))
        seconds = time.perf_counter() - start
        console.print(f"{name}: {outcomes[-1].failure or 'works'} ({seconds:.0f} s)", markup=False)
    if set(options.clients) == CLIENTS.keys():
        PAGE.write_text(page(outcomes), encoding="utf-8")
        console.print(f"results in {PAGE}")
    if any(outcome.failure for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    plain_terminal()
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
