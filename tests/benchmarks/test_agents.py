"""The comparison of algorithms, end to end at tiny scale."""

from __future__ import annotations

from pathlib import Path

from benchmarks.agents import Options, main


def test_the_page_holds_a_row_per_policy(tmp_path: Path) -> None:
    options = Options(
        algos=("a2c", "td3"), scale=1e-4, episodes=2, log_folder=tmp_path / "runs", out=tmp_path / "agents.md"
    )
    page = main(options)
    assert (tmp_path / "agents.md").read_text() == page
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:2] == "| "
    ]
    assert all(len(row) == 13 for row in rows)
    names = [row[0] for row in rows]
    names.remove("---")
    assert sorted(names[1:]) == ["a2c", "random", "static", "td3"]
    cells = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert cells["static"]["over `static`'s"] == cells["random"]["over `random`'s"] == "1.000"
    assert cells["td3"]["action mode"] == "box" and cells["td3"]["steps"] == "4,800"
    returns = [float(cells[name]["return"].split()[0]) for name in names[1:]]
    assert returns == sorted(returns, reverse=True)
