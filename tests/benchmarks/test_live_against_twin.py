"""The benchmark of the twin of tokens against a card: what it compares, keeps and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.live_against_twin import COLUMNS, STEP_COLUMNS, Arguments, main
from benchmarks.live_against_twin_runs import AGAIN, RUNS, Service, predict, record, twin_of
from moe.token_profile import load_token_profile, save_token_profile
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


def test_a_twin_that_is_the_recording_is_off_by_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = load_scenario("default")
    profile = tmp_path / "profile.json"
    save_token_profile(load_token_profile(config_path("profiles", "h200-generate", ".json")), profile)
    twin = twin_of("tokens", scenario, profile, 10, 0.0)
    some = [RUNS[0], RUNS[2], RUNS[-1], AGAIN]
    runs = {
        run.name: {"intervals": predict("tokens", twin, run, twin.capacity_rps), "readings": []}
        for run in some
    }
    runs[AGAIN.name]["intervals"][3]["output_tokens"] *= 2
    recorded = {"service": "tokens", "seconds": 10, "capacity_rps": twin.capacity_rps, "device": "a card"}
    recorded["runs"] = runs
    (tmp_path / "recorded.json").write_text(json.dumps(recorded))
    main(Arguments(out=tmp_path, seconds=10, json=True))
    document = json.loads(capsys.readouterr().out)
    assert list(document["runs"]) == [run.name for run in some]
    for run in some[:-1]:
        off = document["runs"][run.name]["off"]
        assert set(off) == set(COLUMNS["tokens"]) and all(abs(value) < 1e-9 for value in off.values())
    # Twice: the same requests, of which an interval of one was doubled.
    assert document["own_spread"]["tokens_per_s"] > 0.02 and document["own_spread"]["ttft_s"] == 0.0
    main(Arguments(out=tmp_path, seconds=10))
    shown = capsys.readouterr().out
    assert "| the card against itself |" in shown and "| allowed | +3.0% |" in shown
    of_all = len(some) * len(STEP_COLUMNS)
    assert f"{document_inside(document)} of {of_all} values" in shown and "78% should" in shown
    with pytest.raises(ValueError, match="has runs of tokens"):
        main(Arguments(service="vision", out=tmp_path, seconds=10))


def document_inside(document: dict[str, Any]) -> int:
    return sum(sum(run["within"].values()) for run in document["runs"].values())


def test_single_answers_are_compared_by_their_latencies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, profile = load_scenario("vision"), tmp_path / "profile.json"
    shutil.copy(config_path("profiles", "h100-vision", ".json"), profile)
    twin = twin_of("vision", scenario, profile, 10, 0.0)
    some = [RUNS[1], RUNS[-1]]
    runs = {
        run.name: {"intervals": predict("vision", twin, run, twin.capacity_rps), "readings": []}
        for run in some
    }
    recorded = {"service": "vision", "seconds": 10, "capacity_rps": twin.capacity_rps, "device": "a card"}
    (tmp_path / "recorded.json").write_text(json.dumps(recorded | {"runs": runs}))
    main(Arguments(service="vision", out=tmp_path, seconds=10, json=True))
    document = json.loads(capsys.readouterr().out)
    for run in document["runs"].values():
        assert set(run["off"]) == set(COLUMNS["vision"]) and "within" not in run
        assert all(abs(value) < 1e-9 for value in run["off"].values())
        assert 0.0 < run["live"]["latency_p50_s"] <= run["live"]["latency_p95_s"]


@pytest.mark.parametrize(("service", "name"), [("tokens", "default"), ("vision", "vision")])
def test_knobs_change_every_second_and_are_those_of_the_seed(service: Service, name: str) -> None:
    run, problem = RUNS[-1], Problem.of(load_scenario(name))
    knobs = [run.knobs(service, second, problem) for second in range(30)]
    assert knobs == [run.knobs(service, second, problem) for second in range(30)]
    assert len(set(knobs)) > 10 and {k.expert_count for k in knobs} == {1, 2, 4, 8}


@pytest.mark.slow
def test_a_recording_of_this_machine_is_kept_and_compared(tmp_path: Path) -> None:
    arguments = Arguments(out=tmp_path, seconds=10, limit_s=0.001)
    main(arguments)
    kept = json.loads((tmp_path / "recorded.json").read_text())
    assert list(kept["runs"]) == [RUNS[0].name]
    with pytest.raises(ValueError, match="give --seconds 10"):
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "recorded.json").write_text(json.dumps(kept))
        record("tokens", load_scenario("default"), tmp_path / "again", 20, 1.0, None)
