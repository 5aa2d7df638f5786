"""Tables of results against values worked out by hand, and as what reads them sees them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agents.evaluation.report import rows
from agents.evaluation.results import (
    latex_text,
    ratios_to_static,
    results_table,
    statistics_table,
    unit_notes,
    write_results,
)
from agents.play.metrics import KPIS, summarize
from agents.play.statistics import iqm
from thermoe_env.problem.scenario import Feasibility

Frame = Any
ENERGY = np.array([0.010, 0.020, 0.040, 0.010, 0.030, 0.050])


def episodes_of(policy: str, runs: int = 1, **changed: Any) -> Frame:
    """Rows of an episodes table; of several runs, run by run."""
    seeds = len(ENERGY)
    frame = pd.DataFrame({name: np.full(runs * seeds, 0.5) for name in KPIS})
    frame = frame.assign(
        policy=policy, run=np.repeat([f"seed-{i}" if runs > 1 else "" for i in range(runs)], seeds),
        seed=np.tile(np.arange(seeds), runs), whole=True, shut_down=False,
        late_fraction=0.0, late_interactive=0.0, late_deferrable=0.0, above_limit_s=0.0, time_s=300.0,
        j_per_good=np.tile(ENERGY, runs),
    )  # fmt: skip
    return frame.assign(**changed)


@pytest.fixture
def episodes() -> Frame:
    """A rule, an algorithm of three trainings and one of two, beside static."""
    three = np.concatenate([0.5 * ENERGY, 0.25 * ENERGY, 1.5 * ENERGY])
    signed = np.tile([-50.0, 10.0, -20.0, 0.0, 5.0, 40.0], 3)
    return pd.concat([
        episodes_of("static", ttt_time_share=0.0, quality=[0.5] * 5 + [np.nan]),
        episodes_of("rule", j_per_good=ENERGY * [0.9, 0.9, 0.9, 1.2, 1.0, 0.9]),
        episodes_of("100% a_b", 3, j_per_good=three, **{"return": signed}),
        episodes_of("sac", 2, j_per_good=np.tile(0.8 * ENERGY, 2), late_fraction=0.5, late_interactive=0.5),
    ], ignore_index=True)  # fmt: skip


def tables(episodes: Frame, baseline: str = "static") -> tuple[Frame, Frame, Frame]:
    summary = summarize(episodes, Feasibility())
    statistics = pd.concat([statistics_table(episodes, name) for name in dict.fromkeys(("static", baseline))])
    return summary, statistics, results_table(summary, statistics)


def test_statistics_by_hand(episodes: Frame) -> None:
    statistics = statistics_table(episodes).set_index(["policy", "indicator"])
    rule = statistics.loc[("rule", "j_per_good")]
    assert (rule.unit, rule.units, rule.baseline) == ("episode seed", 6, "static")
    assert rule.ratio == pytest.approx(0.925)  # of 0.9, 0.9, 1.0 and 0.9, without the lowest and the highest
    assert rule.p_lower == pytest.approx(4.5 / 6)
    assert rule.ratio_low <= rule.ratio <= rule.ratio_high and rule.p_lower_high < 1.0

    trained = statistics.loc[("100% a_b", "j_per_good")]
    assert (trained.unit, trained.units) == ("training seed", 3)
    assert trained.iqm == pytest.approx(0.75 * ENERGY.mean()) and trained.ratio == pytest.approx(0.75)
    assert trained.p_lower == pytest.approx(2 / 3)
    assert trained.iqm_low == pytest.approx(
        0.25 * ENERGY.mean()
    )  # of three, the lowest comes up often enough
    assert trained.difference == pytest.approx(-0.25 * ENERGY.mean())

    two = statistics.loc[("sac", "j_per_good")]
    assert two.iqm == pytest.approx(0.8 * ENERGY.mean()) and two.units == 2
    limits = [name for name in statistics if name.endswith(("_low", "_high"))]
    assert two[limits].isna().all() and statistics.loc[("sac", "return"), limits].isna().all()

    assert np.isnan(statistics.loc[("rule", "ttt_time_share"), "ratio"])  # over nothing
    assert statistics.loc[("rule", "ttt_time_share"), "difference"] == 0.5
    assert np.isnan(statistics.loc[("static", "quality"), "iqm"])  # one episode has none
    assert statistics.loc["static"].filter(regex="ratio|difference|p_lower").isna().all(axis=None)


def test_results_by_hand(episodes: Frame) -> None:
    summary, statistics, results = tables(episodes, "sac")
    assert results.policy.tolist() == summary.policy.tolist()
    by = results.set_index("policy")
    assert by.units.to_dict() == {"static": 6, "rule": 6, "100% a_b": 3, "sac": 2}
    assert by.loc["static", "j_per_good"] == iqm(ENERGY) and np.isnan(by.loc["static", "vs_static"])
    assert by.loc["sac", "vs_static"] == pytest.approx(0.8) and np.isnan(by.loc["sac", "vs_static_low"])
    assert "late" in by.loc["sac", "infeasible"] and pd.isna(by.loc["sac", "rank"])
    # Against an algorithm of two trainings: all pairs of trainings, or the rule beside each of them.
    assert by.loc["100% a_b", "p_improvement"] == pytest.approx(2 / 3) and np.isnan(
        by.loc["sac", "p_improvement"]
    )
    assert by.loc["rule", "p_improvement"] == 0.0 and np.isnan(by.loc["rule", "p_improvement_low"])
    assert (by.baseline == "sac").all() and set(statistics.baseline) == {"static", "sac"}
    ratios = ratios_to_static(episodes)
    assert {name: len(values) for name, values in ratios.items()} == {"rule": 6, "100% a_b": 3, "sac": 2}
    np.testing.assert_allclose(ratios["100% a_b"], [0.5, 0.25, 1.5])


def test_summary_means_over_units(episodes: Frame) -> None:
    by = summarize(episodes, Feasibility()).set_index("policy")
    assert by.episodes["100% a_b"] == 18 and by.j_per_good["100% a_b"] == pytest.approx(0.75 * ENERGY.mean())
    assert by.j_per_good_vs_static_high["100% a_b"] == pytest.approx(1.5)
    assert np.isnan(by.j_per_good_low["sac"]) and np.isnan(by.j_per_good_vs_static_low["sac"])
    shown = {row.policy: row.cells for row in rows(by.reset_index(), wide=False)}
    assert shown["sac"][2].interval == "-" and shown["rule"][2].interval.count("-") == 1
    notes = " ".join(unit_notes(by.reset_index()))
    assert "training seed" in notes and "No intervals for sac: they take at least 3 units" in notes


def test_tables_for_a_paper(episodes: Frame, tmp_path: Path) -> None:
    _, _, results = tables(episodes)
    write_results(tmp_path, results, "simulated (twin), A_B", ["50% & more"])
    read: Any = pd.read_csv(tmp_path / "results.csv")
    assert read.policy.tolist() == results.policy.tolist()
    np.testing.assert_allclose(read.j_per_good, results.j_per_good, rtol=1e-8)
    assert np.isnan(read.set_index("policy").j_per_good_low["sac"])

    lines = (tmp_path / "results.md").read_text().splitlines()
    table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(results) and {len(row) for row in table} == {11}
    by = {row[0].strip(): [cell.strip() for cell in row] for row in table}
    assert by["sac"][1:4] == ["2 training seeds", "21.33 [-]", "0.800 [-]"] and by["sac"][-1].startswith(
        "interactive late"
    )
    assert by["static"][3] == by["static"][9] == "-" and by["rule"][-1] == "yes"
    assert "simulated (twin), A_B." in lines

    tex = (tmp_path / "results.tex").read_text()
    spec = re.search(r"\\begin\{tabular\}\{(\w+)\}", tex)
    assert spec and spec[1] == "ll" + "r" * 8 + "l"
    body = tex[tex.index("\\toprule") : tex.index("\\bottomrule")].splitlines()
    cells = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in body if line.endswith(r" \\")]
    assert len(cells) == 1 + len(results) and {len(row) for row in cells} == {11}
    assert r"100\% a\_b" in tex and r"50\% \& more" in tex and r"peak \textdegree{}C" in tex
    depth = np.cumsum([(c == "{") - (c == "}") for c in re.sub(r"\\[{}]", "", tex)])
    assert depth.min() == 0 and depth[-1] == 0
    uncommented = tex.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)[%#_]", uncommented) and tex.isascii()
    for name in ("table", "tabular"):
        assert tex.count(rf"\begin{{{name}}}") == tex.count(rf"\end{{{name}}}") == 1


def test_latex_escapes() -> None:
    assert latex_text(r"a_b & 5% $x #1 {y} ~^\ [1] < 2 ∞ °") == (
        r"a\_b \& 5\% \$x \#1 \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{} "
        r"{[}1{]} \textless{} 2 $\infty$ \textdegree{}"
    )
