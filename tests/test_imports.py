"""The floors: who may import whom, and what importing the environment must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("moe", "thermoe_env", "agents", "studies")  # each may import itself and those before it
TOP = ("train_agent", "evaluate", "benchmarks", "tests")  # nothing may import these
HEAVY = (
    "torch", "numba", "pynvml", "stable_baselines3", "matplotlib", "pandas", "scipy", "tensorboard",
    "transformers", "mo_gymnasium", "minari", "pygame", "moviepy",
)  # fmt: skip


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every import of a file, inside functions and for type checkers as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(ROOT).parts) - node.level
            assert depth > 0, f"{path}: relative import out of its package"
    return names


@pytest.mark.parametrize("floor", [floor for floor in FLOORS if (ROOT / floor).is_dir()])
def test_imports_point_down(floor: str) -> None:
    forbidden = {*FLOORS[FLOORS.index(floor) + 1 :], *TOP}
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files, f"{floor} holds no module"
    broken = {
        str(path.relative_to(ROOT)): found for path in files if (found := imported_packages(path) & forbidden)
    }
    assert not broken


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
        "import moe.hf, moe.hf_runner, moe.live, moe.profile, moe.weights\n"
        "import thermoe_env.env, agents.evaluation\n"
        "print('transformers' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False"]
