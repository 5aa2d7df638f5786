"""Earlier results taken into a comparison: equal to playing again, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from agents.evaluation import command as evaluation
from agents.evaluation.command import EvaluateConfig, evaluate
from agents.evaluation.tables import ResultsError
from agents.learning.seeds import seed_folder

pytestmark = pytest.mark.usefixtures("own_cache")

Frame = Any


def compare(scenario: str, out: Path, *policy: Any, **options: Any) -> evaluation.Results:
    config: dict[str, Any] = {"scenario": scenario, "seeds": 3, "out": out, **options}
    return evaluate(EvaluateConfig(policy=tuple(map(str, policy)), **config), Console(quiet=True))


@pytest.fixture(scope="module")
def results(
    own_cache: None, scenario: str, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders of earlier evaluations: two with a part of the policies each, and one with all."""
    folder = tmp_path_factory.mktemp("results")
    played = {"a": ["rule_based"], "b": ["random", run_folder], "all": ["rule_based", "random", run_folder]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "write_figures", lambda *_: [])
        for name, policies in played.items():
            compare(scenario, folder / name, *policies)
    return {name: folder / name for name in played}


def copy_with(folder: Path, copy: Path, change: Any) -> Path:
    """A copy of results with other episodes."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    change(pd.read_csv(folder / "episodes.csv")).to_csv(copy / "episodes.csv", index=False)
    return copy


def test_comparing_folders_equals_playing(
    scenario: str, results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "play_twin", None)  # nothing is played
    out = tmp_path / "out"
    compare(scenario, out, results["a"], results["b"], baseline="random")
    for name in ("summary.csv", "episodes.csv", "steps.csv.gz"):
        found, expected = (pd.read_csv(folder / name) for folder in (out, results["all"]))
        pd.testing.assert_frame_equal(found, expected, rtol=1e-8)
    tables: list[Frame] = [pd.read_csv(folder / "results.csv") for folder in (out, results["all"])]
    assert [set(table.baseline) for table in tables] == [{"random"}, {"static"}]
    found, expected = (table[[c for c in table if c != "baseline" and c[:2] != "p_"]] for table in tables)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-8)
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {"energy_quality", "intervals", "performance_profile", "tradeoff"}


@pytest.mark.usefixtures("no_figures")
def test_folders_and_names_in_one_comparison(
    scenario: str, results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = f"--compare {results['a']} random --scenario {scenario} --seeds 3 --out {out}"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options.split()])
    evaluation.main()
    found, expected = pd.read_csv(out / "episodes.csv"), pd.read_csv(results["all"] / "episodes.csv")
    assert set(found.policy) == {"static", "best_constant", "rule_based", "random"}
    pd.testing.assert_frame_equal(found, expected.query("policy != 'trained'"), rtol=1e-8)


@pytest.mark.usefixtures("no_figures")
def test_other_numbers_are_another_policy(scenario: str, results: dict[str, Path], tmp_path: Path) -> None:
    def cheaper(policy: str) -> Any:
        names = ["j_per_good", "energy_j", "mean_power_w"]
        return lambda table: table.assign(
            **{name: table[name].where(table.policy != policy, 0.9 * table[name]) for name in names}
        )

    changed = copy_with(results["a"], tmp_path / "changed", cheaper("rule_based"))
    summary: Frame = compare(scenario, tmp_path / "out", results["a"], changed).summary
    assert set(summary.policy) == {"static", "best_constant", "rule_based", "changed/rule_based"}
    energy = summary.set_index("policy").j_per_good
    assert energy["changed/rule_based"] == pytest.approx(0.9 * energy["rule_based"])
    copy_with(results["a"], changed, cheaper("static"))
    with pytest.raises(ResultsError, match=r"changed: static has other numbers than in .*/a, so its twin"):
        compare(scenario, tmp_path / "out2", results["a"], changed)


def test_what_does_not_compare_is_refused(scenario: str, results: dict[str, Path], tmp_path: Path) -> None:
    a, out = results["a"], tmp_path / "out"
    with pytest.raises(ResultsError, match=r"/a was played on another scenario: episode_s 20 there, 30"):
        compare(scenario, out, a, duration=30)
    with pytest.raises(ResultsError, match=r"/a: static was played on 3 seeds, 1000 to 1002, .* on 2, 1000 "):
        compare(scenario, out, a, seeds=2)
    with pytest.raises(ValueError, match="rule_based: in the earlier results already"):
        compare(scenario, out, a, "rule_based")
    with pytest.raises(ValueError, match="baseline 'ppo' is not among what is compared: best_constant, "):
        compare(scenario, out, a, baseline="ppo")
    live = copy_with(a, tmp_path / "live", lambda table: table.assign(world="live"))
    for other in (a, "random"):
        with pytest.raises(ResultsError, match=r"played in world 'live' .* compared with in 'twin'"):
            compare(scenario, out, other, live)
    copy_with(a, live, lambda table: table.drop(columns="run"))
    with pytest.raises(ResultsError, match="another version: its tables lack run"):
        compare(scenario, out, live)
    (live / "config.yaml").unlink()
    copy_with(a, live, lambda table: table)
    (live / "config.yaml").write_text("train: {}\n")
    with pytest.raises(ResultsError, match="does not name the scenario"):
        compare(scenario, out, live)
    assert not out.exists()


@pytest.mark.usefixtures("no_figures")
def test_trainings_of_an_algorithm_are_one_policy(
    scenario: str, run_folder: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    for seed in (0, 1, 10):
        shutil.copytree(run_folder, seed_folder(tmp_path / "ppo", seed))
    found = compare(scenario, tmp_path / "out", tmp_path / "ppo")
    own: Frame = found.episodes[found.episodes.policy == "ppo"]
    assert own.run.tolist() == np.repeat(["seed-0", "seed-1", "seed-10"], 3).tolist()
    row: Frame = found.summary.set_index("policy").loc["ppo"]
    assert (row.unit, row.units, row.episodes) == ("training seed", 3, 9)
    # Three copies of one model do not differ, however its episodes do.
    summary: Frame = pd.read_csv(results["all"] / "summary.csv").set_index("policy")
    alone = summary.loc["trained"]
    assert row.j_per_good == pytest.approx(alone.j_per_good) and alone.unit == "episode seed"
    assert row.j_per_good_low == pytest.approx(row.j_per_good_high)
    assert alone.j_per_good_low < alone.j_per_good < alone.j_per_good_high
    again = compare(scenario, tmp_path / "again", tmp_path / "out")
    pd.testing.assert_frame_equal(again.summary, found.summary, rtol=1e-8)
