"""What a terminal cannot show is written in ASCII; commands end well on any of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.terminal import as_shown, plain_terminal

ROOT = Path(__file__).parents[2]
COMMANDS = (
    ["thermoe_env.calibration", "--help"], ["evaluate.py", "--help"], ["train_agent.py", "--help"],
    ["moe.profiling", "--help"], ["studies.run", "--help"],
    ["thermoe_env.calibration", "validate", "configs/traces/h100_profiling_telemetry.csv"],
)  # fmt: skip


def test_signs_of_the_tables_have_an_ascii_form() -> None:
    assert as_shown("peak °C, 3 µJ ±1, ∞ ≥ 5% − 2 × é", "ascii") == "peak degC, 3 uJ +-1, inf >= 5% - 2 x e"
    assert as_shown("peak °C, ∞", "latin-1") == "peak °C, inf"
    assert as_shown("peak °C, ∞ 熱", "utf-8") == "peak °C, ∞ 熱"


@given(st.text(st.characters(codec=None)))
def test_every_text_can_be_shown_everywhere(text: str) -> None:
    for encoding in ("ascii", "cp437", "latin-1", "utf-8"):
        shown = as_shown(text, encoding)
        assert shown.encode(encoding).decode(encoding) == shown
    assert as_shown(text, "ascii").isascii()


def test_a_command_writes_to_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, "ascii", write_through=True))
    plain_terminal()
    print("40 °C")
    assert file.getvalue().split() == [b"40", b"degC"]
    monkeypatch.setattr(sys, "stdout", None)  # as of a process without a terminal
    plain_terminal()


FORKED = """
import json, os, runpy, sys
import agents.evaluation.command, agents.learning.command, moe.profiling.cli, studies.run
sys.path.insert(0, os.getcwd())
for first, *rest in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = [first, *rest]
        if first.endswith(".py"):
            runpy.run_path(first, run_name="__main__")
        else:
            runpy.run_module(first, run_name="__main__", alter_sys=True)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code:
        sys.exit(f"{first} {rest} ended by {code}")
"""
"""Commands in processes of their own, for which what they share is imported once."""


def test_commands_end_well_on_an_ascii_terminal() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LANG"} | {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii", "COLUMNS": "40",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", FORKED, json.dumps(COMMANDS)],
        cwd=ROOT, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.isascii() and b"\\u" not in run.stdout, run.stderr.decode()
    assert run.stdout.count(b"usage: ") == sum("--help" in command for command in COMMANDS)
