"""The commands that train and evaluate, as console scripts and as scripts of a checkout call them.

They are in `agents`, which lies above and whose name other packages have too. So what runs first lies here:
it looks whose `agents` Python finds, and imports the command by name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from moe.errors import one_line_errors


def train() -> None:
    """`thermalmoe-train`, `python train_agent.py`."""
    _run("agents.learning.command")


def evaluate() -> None:
    """`thermalmoe-evaluate`, `python evaluate.py`."""
    _run("agents.evaluation.command")


def _run(module: str) -> None:
    with one_line_errors():
        if other := other_agents():
            owners = set(packages_distributions().get("agents", [])) - {"thermalmoe"}
            named = f", of {', '.join(sorted(owners))}" if owners else ""
            sys.exit(
                f"Python finds another package called `agents` in place of ThermalMoE's: {other}{named}; "
                "uninstall it, or install thermalmoe in an environment of its own"
            )
        import_module(module).main()


def other_agents() -> str | None:
    """Where the package `agents` lies that Python finds; None where it is ours, beside this package."""
    ours, spec = Path(__file__).resolve().parents[1] / "agents" / "__init__.py", find_spec("agents")
    found = "none" if spec is None else str(spec.origin or list(spec.submodule_search_locations or ()))
    if Path(found).resolve() != ours:
        return found
    try:  # a package installed later may have overwritten ours
        name = getattr(import_module("agents"), "DISTRIBUTION", None)
    except ImportError:
        name = None
    return None if name == "thermalmoe" else found
