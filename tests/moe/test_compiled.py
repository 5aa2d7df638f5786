"""Compiled code is kept from process to process, and never played when a source has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PACKAGE = {
    "prices.py": "PRICE = 3.0\n",
    "inner.py": """
from moe.compiled import inlined, jit
from thermoe_env.prices import PRICE

@jit
def cost(x):
    return PRICE * x

@inlined
def doubled(x):
    return 2.0 * x
""",
    "outer.py": """
import numba
from moe.compiled import jit, parallel
from thermoe_env.inner import cost, doubled

@jit
def total(x):
    return doubled(cost(x)) + 1.0

@parallel
def fill_all(out, x):
    for i in numba.prange(out.shape[0]):
        out[i] = total(x)
""",
}
SEAM = {
    "thermoe_env/seam.py": """
from numba.core import types
from numba.extending import overload
from moe.compiled import jit

def serve(service, x):
    raise NotImplementedError

def implement(kind, function):
    @overload(serve)
    def chosen(service, x):
        if isinstance(service, types.BaseNamedTuple) and service.instance_class is kind:
            return function

@jit
def run(service, x):
    return serve(service, x)
""",
    "other/__init__.py": """
from typing import NamedTuple
from thermoe_env.seam import implement
from other.served import served

class Other(NamedTuple):
    factor: float

implement(Other, served)
""",
    "other/served.py": """
def served(service, x):
    return service.factor * x
""",
}
RUN = """
from other import Other
from thermoe_env.seam import run
print(run(Other(2.0), 5.0), "kept" if run.stats.cache_hits else "compiled", run.stats.cache_path)
"""
TYPED = """
from typing import NamedTuple
from thermoe_env.seam import implement

class Other(NamedTuple):
    factor: float

implement(Other, lambda service, x: FACTOR * x)
""" + RUN.replace("from other import Other", "")
CLOSED = """
import functools
from numba.core import types
from moe.compiled import jit

@functools.cache
def widened(kind):
    @jit
    def wide(x):
        kind
        return x * 2.5
    return wide
"""
PLAY_CLOSED = """
from numba.core import types
from thermoe_env.closed import widened
run = widened(KIND)
print(run(2), "kept" if run.stats.cache_hits else "compiled", run.stats.cache_path)
"""
PLAY = """
import numpy as np
from thermoe_env.outer import fill_all, total
out = np.zeros(2)
fill_all(out, 5.0)
assert out[0] == out[1] == total(5.0)
hits = sum(sum(f.stats.cache_hits.values()) for f in (fill_all, total))
print(total(5.0), "kept" if hits == 2 else "compiled", total.stats.cache_path)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A product of three compiled functions in two modules, with a constant in a third."""
    root = tmp_path / "root"
    for folder in ("moe", "thermoe_env"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    shutil.copy(ROOT / "moe" / "compiled.py", root / "moe")
    for name, text in PACKAGE.items():
        (root / "thermoe_env" / name).write_text(text)
    return root


def start(root: Path, program: str = PLAY, **environment: str) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, env=own | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def play(root: Path, program: str = PLAY, **environment: str) -> tuple[float, str, Path, list[str]]:
    """Value, whether the code was kept, where it is, and what was logged."""
    process = start(root, program, **environment)
    out, logged = process.communicate()
    assert process.returncode == 0, logged
    value, kept, folder = out.split()
    return float(value), kept, Path(folder), logged.splitlines()


def edit(path: Path, old: str, new: str) -> None:
    before = path.read_text()
    assert old in before and len(old) != len(new)  # Python's own cache goes by size and whole seconds
    path.write_text(before.replace(old, new))


def test_an_edit_of_any_source_is_played(root: Path) -> None:
    """The function's own file, one it calls or has inlined, a constant. What was kept before is no more."""
    edits = [
        ("outer.py", "+ 1.0", "+ 10.0", 40.0),
        ("inner.py", "PRICE * x", "(PRICE * x + 1.0)", 42.0),
        ("inner.py", "2.0 * x", "3.00 * x", 58.0),
        ("prices.py", "3.0", "4.00", 73.0),
        ("prices.py", "4.00", "3.0", 58.0),  # back again
    ]
    folder = root / "thermoe_env" / "__pycache__"
    assert play(root) == (31.0, "compiled", folder, [])
    assert play(root) == (31.0, "kept", folder, [])
    files = len([*folder.glob("*.nb[ci]")])
    for name, old, new, value in edits:
        edit(root / "thermoe_env" / name, old, new)
        assert play(root) == (value, "compiled", folder, [])
        assert len([*folder.glob("*.nb[ci]")]) == files
    assert play(root) == (58.0, "kept", folder, [])


def test_an_edit_of_another_package_that_is_called_by_its_type_is_played(root: Path) -> None:
    (root / "other").mkdir()
    for name, text in SEAM.items():
        (root / name).write_text(text)
    assert play(root, RUN)[:2] == (10.0, "compiled")
    assert play(root, RUN)[:2] == (10.0, "kept")
    edit(root / "other" / "served.py", "* x", "* x + 1.0")
    assert play(root, RUN)[:2] == (11.0, "compiled")
    assert play(root, RUN)[:2] == (11.0, "kept")
    for factor in (2.0, 3.0):  # a type of no file is of this process alone
        typed = TYPED.replace("FACTOR", str(factor))
        assert play(root, typed)[:2] == (5.0 * factor, "compiled")


def test_a_type_that_is_closed_over_is_known_again_however_many_were_made_before(root: Path) -> None:
    (root / "thermoe_env" / "closed.py").write_text(CLOSED)
    first = PLAY_CLOSED.replace("KIND", "types.UniTuple(types.int8, 4)")
    later = first.replace("run =", "made = [types.UniTuple(types.int16, n) for n in range(9)]\nrun =")
    assert play(root, first)[:2] == (5.0, "compiled")
    assert play(root, later)[:2] == (5.0, "kept")
    assert play(root, later.replace("int8, 4", "int8, 5"))[:2] == (5.0, "compiled")


def test_where_sources_cannot_be_written_code_is_kept_with_the_user(root: Path, tmp_path: Path) -> None:
    (root / "thermoe_env" / "__pycache__").touch()  # no folder can be made
    own = {"XDG_CACHE_HOME": str(tmp_path / "user")}
    value, kept, folder, logged = play(root, **own)
    assert (value, kept, logged) == (31.0, "compiled", []) and tmp_path / "user" in folder.parents
    assert play(root, **own)[1:] == ("kept", folder, [])
    edit(root / "thermoe_env" / "prices.py", "3.0", "30.0")
    assert play(root, **own)[:2] == (301.0, "compiled")


def test_the_folder_may_be_named(root: Path, tmp_path: Path) -> None:
    named = {"NUMBA_CACHE_DIR": str(tmp_path / "named")}
    assert tmp_path / "named" in play(root, **named)[2].parents
    assert play(root, **named)[1] == "kept"


def test_the_last_resort_is_a_temporary_folder_of_the_users_own_and_one_line_says_so(
    root: Path, tmp_path: Path
) -> None:
    nowhere, temporary = tmp_path / "nowhere", tmp_path / "temporary"
    nowhere.touch()
    temporary.mkdir()
    (root / "thermoe_env" / "__pycache__").symlink_to(nowhere)
    (root / "moe" / "__pycache__").symlink_to(nowhere)
    places = {"XDG_CACHE_HOME": str(nowhere), "TMPDIR": str(temporary)}
    for expected in ("compiled", "kept"):
        value, kept, folder, logged = play(root, **places)
        assert (value, kept) == (31.0, expected) and temporary in folder.parents
        assert len(logged) == 1 and "set NUMBA_CACHE_DIR to a folder that can be written" in logged[0]
    (own,) = temporary.iterdir()
    assert own.stat().st_mode & 0o077 == 0
    shutil.rmtree(own)
    own.touch()  # not even that
    value, kept, folder, logged = play(root, **places)
    assert (value, kept, folder) == (31.0, "compiled", Path("None"))
    assert len(logged) == 1 and "no folder can be written" in logged[0]


def test_processes_that_compile_at_once_do_not_disturb_each_other(root: Path) -> None:
    processes = [start(root) for _ in range(3)]
    for process in processes:
        out, logged = process.communicate()
        assert process.returncode == 0 and out.startswith("31.0 "), logged
    assert play(root)[:2] == (31.0, "kept")


HOT_INTERVAL = """
import gymnasium, thermoe_env
env = gymnasium.make("ThermalMoETwin-v0", overrides={"limits": {"temperature_c": 10.0}})
env.reset(seed=0)
info = env.step(env.action_space.sample() * 0)[-1]
stats = env.unwrapped._settle_one.stats
hits = sum(stats.cache_hits.values())
print(info["reward_terms"]["heat"], "kept" if hits else "compiled", stats.cache_path)
"""


@pytest.mark.slow
def test_an_edited_reward_is_played_by_the_environment(tmp_path: Path) -> None:
    for package in ("moe", "thermoe_env"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    plain = play(tmp_path, HOT_INTERVAL)[0]
    assert play(tmp_path, HOT_INTERVAL)[:2] == (plain, "kept")
    edit(tmp_path / "thermoe_env" / "mdp" / "reward.py", "-prices.heat * (1.0", "-2.0 * prices.heat * (1.0")
    heat, kept, _, _ = play(tmp_path, HOT_INTERVAL)
    assert plain < 0.0 and heat == pytest.approx(2.0 * plain) and kept == "compiled"
