"""Edited tables are refused by file, line and column; odd names are shown as they are, everywhere."""

from __future__ import annotations

import csv
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from agents.evaluation.command import EvaluateConfig, evaluate
from agents.evaluation.tables import ResultsError, read_tables
from agents.load import policy_label
from tests.conftest import ONE_THREAD

ROOT = Path(__file__).parents[3]
NAMES = (
    "a[bold]b[red]", "x|<b>y & `z*", "50% $a_b^c$ {d} #1", "link[u](v)", "null", "long" + 8 * " and longer",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def played(
    own_cache: None, scenario: str, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Results of policies with odd names, and what the command printed on a narrow ASCII terminal."""
    folder = tmp_path_factory.mktemp("names")
    for name in NAMES:
        shutil.copytree(run_folder, folder / name)
    command = [sys.executable, str(ROOT / "evaluate.py"), "--scenario", scenario, "--seeds", "3"]
    environment = os.environ | ONE_THREAD | {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    environment["PYTHONWARNINGS"] = "default"
    run = subprocess.run(
        [*command, "--out", str(folder / "out"), "--policy", *(str(folder / name) for name in NAMES)],
        capture_output=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    return folder / "out", run.stdout.decode("ascii")


def test_an_ascii_terminal_gets_every_name_and_number(played: tuple[Path, str]) -> None:
    folder, shown = played
    lines = shown.splitlines()
    assert any("peak degC" in line for line in lines)
    summary: Any = pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values=[""])
    assert {*NAMES} < {*summary.policy}
    for row in summary.to_dict("records"):
        name = str(row["policy"]).strip()
        line = next(line for line in lines if f"|{name} " in line)
        assert f"{row['quality']:.3f}" in line and f"{row['peak_c']:.1f}" in line and "..." not in line
    assert "virtual temperature limit" in shown and str(folder / "report.html") in shown


def test_reports_show_names_as_text(played: tuple[Path, str]) -> None:
    folder, _ = played
    report = (folder / "report.html").read_text(encoding="utf-8")
    markdown = (folder / "results.md").read_text(encoding="utf-8")
    tex = (folder / "results.tex").read_text(encoding="utf-8")
    assert "<b>y" not in report and all(html.escape(name) in report for name in NAMES)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {13}
    assert not re.search(r"(?<!\\)<b>|\]\(|(?<!\\)`", markdown)
    assert r"50\% \$a\_b\textasciicircum{}c\$ \{d\} \#1" in tex and tex.isascii()


def test_no_cell_is_a_formula(played: tuple[Path, str], run_folder: Path, tmp_path: Path) -> None:
    for path in played[0].glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [
            c for c in cells if c[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"-?[\d.e+-]+|-inf", c)
        ]
    for name in ("=1+1", "+1", "@SUM(A1)", "-1", "_hidden", "two\nlines", "tab\t", "\udcff", "\uff1d1"):
        with pytest.raises(ValueError, match=r"cannot stand in tables: .* rename its folder"):
            policy_label(tmp_path / name)


def test_results_with_odd_names_are_read_back(
    played: tuple[Path, str], scenario: str, tmp_path: Path, no_figures: None
) -> None:
    config = EvaluateConfig(policy=(str(played[0]),), scenario=scenario, seeds=3, out=tmp_path / "out")
    again: Any = evaluate(config, Console(quiet=True)).summary
    expected = pd.read_csv(played[0] / "summary.csv", keep_default_na=False, na_values=[""])
    assert again.policy.tolist() == expected.policy.tolist()


def edited(folder: Path, copy: Path, column: str, value: object, row: int = 4) -> Path:
    """A copy of results with another text in a cell of episodes.csv."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    with (folder / "episodes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[row - 1][rows[0].index(column)] = str(value)
    with (copy / "episodes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return copy


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("j_per_good", -1, "line 4: j_per_good -1.0 lies outside of 0 to inf"),
        ("j_per_good", 0, "line 4: j_per_good 0.0 lies outside"),
        ("j_per_good", "", "line 4: j_per_good nan lies outside"),
        ("j_per_good", 1e-3, "line 4: j_per_good 0.001 contradicts energy_j, time_s and goodput_rps"),
        ("j_per_good", "=1/0", "line 4: j_per_good =1/0 is not a number"),
        ("j_per_good", "cheap", "line 4: j_per_good cheap is not a number"),
        ("energy_j", -5, "line 4: energy_j -5.0 lies outside of 0 to inf"),
        ("energy_j", "inf", "line 4: energy_j inf lies outside"),
        ("energy_j", 5, "line 4: mean_power_w .* contradicts energy_j"),
        ("goodput_rps", 1e9, "line 4: j_per_good .* contradicts energy_j, time_s and goodput_rps"),
        ("quality", 1.5, "line 4: quality 1.5 lies outside of 0 to 1"),
        ("late_fraction", -0.1, "line 4: late_fraction -0.1 lies outside of 0 to 1"),
        ("peak_c", 1e6, "line 4: peak_c 1000000.0 lies outside of -60 to 300"),
        ("return", "", "line 4: return nan lies outside"),
        ("time_s", 0, "line 4: time_s 0 lies outside"),
        ("seed", 1000, "line 4: seed 1000 is there twice for this policy"),
        ("seed", -1, "line 4: seed -1 is no seed"),
        ("seed", 1000.5, "line 4: seed 1000.5 is no seed"),
        ("seed", 7, "static, seed (7|1002) is in one of episodes.csv and steps.csv.gz only"),
        ("whole", "perhaps", "whole must be True or False"),
        ("world", "live", "line 4: world live is another one than in the first row"),
        ("device", "toaster", "line 4: device toaster is another one than in the first row"),
        ("policy", "=cmd", "policy '=cmd' cannot stand in tables"),
    ],
)
def test_an_edited_table_is_refused(
    played: tuple[Path, str], tmp_path: Path, column: str, value: object, message: str
) -> None:
    assert len(read_tables(played[0]).episodes)
    copy = edited(played[0], tmp_path / "copy", column, value)
    with pytest.raises(ResultsError, match=message) as caught:
        read_tables(copy)
    assert str(copy) in str(caught.value)


def test_what_is_no_table_is_refused(played: tuple[Path, str], tmp_path: Path) -> None:
    copy = edited(played[0], tmp_path / "copy", "quality", 0.5)
    table = pd.read_csv(played[0] / "episodes.csv")
    table.assign(note="=1+1").to_csv(copy / "episodes.csv", index=False)
    with pytest.raises(ResultsError, match=r"episodes\.csv: unknown columns note"):
        read_tables(copy)
    table.iloc[:0].to_csv(copy / "episodes.csv", index=False)
    with pytest.raises(ResultsError, match=r"episodes\.csv holds no rows"):
        read_tables(copy)
    for content in (b"", b"\xff\xfe\x00", b'"'):
        (copy / "episodes.csv").write_bytes(content)
        with pytest.raises(ResultsError, match=r"episodes\.csv cannot be read|lack"):
            read_tables(copy)
    (copy / "steps.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ResultsError, match="cannot be read"):
        read_tables(copy)
