"""The floors: who may import whom, and what importing the environment must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("moe", "thermoe_env", "agents", "studies")  # each may import itself and those before it
TOP = ("train_agent", "evaluate", "benchmarks", "tests")  # nothing may import these
HEAVY = (
    "torch", "numba", "pynvml", "stable_baselines3", "matplotlib", "pandas", "scipy", "tensorboard",
    "transformers", "mo_gymnasium", "minari", "pygame", "moviepy",
)  # fmt: skip


MOST_FILES = 20
"""In a folder: what is more deserves rooms."""


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    files = (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Dotted names of every import of a file, inside functions and for type checkers as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in whole}
    return names


GRAPH = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """The folder of a module; a file that lies in a floor itself is a room of its own."""
    parts = module.split(".")
    package = MODULES[module].name == "__init__.py"
    if len(parts) == 1 or (len(parts) == 2 and not package):
        return module
    return ".".join(parts if package else parts[:-1])


def circle(graph: dict[str, set[str]]) -> tuple[str, ...]:
    """The nodes that a circle runs through, () where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def test_no_file_imports_in_a_circle() -> None:
    assert circle(GRAPH) == ()


def test_no_folder_imports_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for module, used in GRAPH.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in used)
    assert circle({name: used - {name} for name, used in rooms.items()}) == ()


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert room("moe.model.router") == "moe.model" and room("moe.workload") == "moe.workload"


@pytest.mark.parametrize("floor", [floor for floor in FLOORS if (ROOT / floor).is_dir()])
def test_imports_point_down(floor: str) -> None:
    forbidden = {*FLOORS[FLOORS.index(floor) + 1 :], *TOP}
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files, f"{floor} holds no module"
    broken = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := {name.partition(".")[0] for name in imports(path)} & forbidden)
    }
    assert not broken


def test_no_folder_holds_more_files_than_one_can_look_over() -> None:
    folders = [path for top in (*FLOORS, "benchmarks", "tests") for path in (ROOT / top).rglob("*.py")]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in folders)
    del counts["studies"]  # each stands for itself until one engine runs them all
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_importing_the_environment_only_registers_it() -> None:
    command = (
        "import sys, gymnasium, thermoe_env\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])\n"
        "print(*sorted(id for id in gymnasium.registry if id.startswith('ThermalMoE')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ids = ["", "Live", "LiveMO", "Twin", "TwinMO"]
    assert run.stdout.splitlines() == ["", " ".join(f"ThermalMoE{world}-v0" for world in ids)]


def test_nothing_but_a_checkpoint_needs_transformers() -> None:
    command = (
        "import sys\n"
        "import moe.hf.steering, moe.hf.runner, moe.service.score.live\n"
        "import moe.profiling.command, moe.training.weights\n"
        "import thermoe_env.env, agents.evaluation.command\n"
        "print('transformers' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False"]
