"""What tries the environment in other libraries, without installing any."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.clients.__main__ import CLIENTS, Options, Outcome, attempt, main, page, script


def test_every_client_has_a_script_and_every_script_a_client() -> None:
    assert {
        path.stem.removeprefix("with_") for path in script("x").parent.glob("with_*.py")
    } == CLIENTS.keys()


def test_the_page_says_what_works_and_what_fails() -> None:
    versions = {"skrl": "2.1", "gymnasium": "1.4", "numpy": "2.4", "numba": "0.68"}
    text = page([Outcome("skrl", versions), Outcome("rllib", {}, "fails: no such wheel")])
    heads, _, works, fails = (line.split("|") for line in text.splitlines() if line.startswith("|"))
    assert len(heads) == len(works) == len(fails)
    assert [cell.strip() for cell in works[1:6]] == list(versions)[:1] + list(versions.values())
    assert works[-2].strip() == "works" and fails[-2].strip() == "fails: no such wheel"
    assert fails[1].strip() == "ray"


def test_an_unknown_client_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clients must be of .*, got \['x'\]"):
        main(Options(clients=("x",)))


def test_a_failure_is_an_outcome_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.clients.__main__.torch_build", lambda: str(tmp_path / "no.whl"))
    outcome = attempt("skrl", Options(folder=tmp_path))
    assert outcome.failure.startswith("fails: ") and "no.whl" in outcome.failure
    assert "no.whl" in (tmp_path / "skrl.txt").read_text()
