"""The benchmark of the twin of tokens against a card: what it compares, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.live_against_twin import AGAIN, COLUMNS, RUNS, Arguments, main, predict
from moe.token_profile import load_token_profile, save_token_profile
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario


def test_a_twin_that_is_the_recording_is_off_by_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = load_scenario("tokens")
    profile = tmp_path / "profile.json"
    save_token_profile(load_token_profile(config_path("profiles", "h200-generate", ".json")), profile)
    capacity = Problem.of(scenario).capacity_rps
    some = [RUNS[0], RUNS[2], RUNS[-1], AGAIN]
    runs = {
        run.name: {"intervals": predict(scenario, run, capacity, profile, 10), "readings": []} for run in some
    }
    runs[AGAIN.name]["intervals"][3]["output_tokens"] *= 2
    recorded = {"seconds": 10, "capacity_rps": capacity, "device": "a card", "runs": runs}
    (tmp_path / "recorded.json").write_text(json.dumps(recorded))
    main(Arguments(out=tmp_path, seconds=10, json=True))
    document = json.loads(capsys.readouterr().out)
    assert list(document["runs"]) == [run.name for run in some]
    for run in some[:-1]:
        off = document["runs"][run.name]["off"]
        assert set(off) == set(COLUMNS) and all(abs(value) < 1e-9 for value in off.values())
    # Twice: the same requests, of which an interval of one was doubled.
    assert document["own_spread"]["tokens_per_s"] > 0.02 and document["own_spread"]["ttft_s"] == 0.0
    main(Arguments(out=tmp_path, seconds=10))
    shown = capsys.readouterr().out
    assert "| the card against itself |" in shown and "| allowed | +3.0% |" in shown


def test_knobs_change_every_second_and_are_those_of_the_seed() -> None:
    run = RUNS[-1]
    knobs = [run.knobs(second, 128, (1, 2, 4, 8)) for second in range(30)]
    assert knobs == [run.knobs(second, 128, (1, 2, 4, 8)) for second in range(30)]
    assert len(set(knobs)) > 10 and {k.expert_count for k in knobs} == {1, 2, 4, 8}


@pytest.mark.slow
def test_a_recording_of_this_machine_is_kept_and_compared(tmp_path: Path) -> None:
    arguments = Arguments(out=tmp_path, seconds=10, limit_s=0.001)
    main(arguments)
    kept = json.loads((tmp_path / "recorded.json").read_text())
    assert list(kept["runs"]) == [RUNS[0].name]
    with pytest.raises(ValueError, match="as many --seconds"):
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "recorded.json").write_text(json.dumps(kept))
        from benchmarks.live_against_twin import record

        record(load_scenario("tokens"), Arguments(out=tmp_path / "again", seconds=20), lambda: 0.0)
