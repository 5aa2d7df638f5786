"""The search for the best constant action keeps what it found, and reads it again only where it is whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from agents.policies import search
from agents.policies.search import best_constant
from moe.errors import DataCorruptError
from tests.thermoe_env.conftest import make_profile
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


@pytest.fixture
def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """Two settings of a few seconds; the search is not the point here."""
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "constant_returns", lambda _, actions: -np.abs(actions - 1).sum(axis=1))
    return Problem.of(load_scenario("vision", episode_s=10, knobs=["expert_count"]), make_profile())


def test_what_was_found_is_kept(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_constant(problem).tolist() == [1]
    monkeypatch.delattr(search, "constant_returns")
    assert best_constant(problem).tolist() == [1]


CONTENTS = ["", '{"action": [1', "[1]", "{}", '{"action": 1}', '{"action": [99]}', '{"action": [0.5]}',
            '{"action": [1, 1]}', '{"action": [null]}', '{"action": [true]}']  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_a_cut_or_foreign_file_is_refused_by_name(problem: Problem, content: str, tmp_path: Path) -> None:
    best_constant(problem)
    (file,) = (tmp_path / "cache" / "best_constant").iterdir()
    assert json.loads(file.read_text())["action"] == [1]
    file.write_text(content)
    with pytest.raises(DataCorruptError, match=rf"{file}.*remove it, it will be searched again"):
        best_constant(problem)


def test_a_cache_that_cannot_be_written_costs_no_result(
    problem: Problem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    with caplog.at_level(logging.WARNING):
        assert best_constant(problem).tolist() == [1]
    assert "THERMALMOE_CACHE" in caplog.text and str(tmp_path / "cache") in caplog.text
