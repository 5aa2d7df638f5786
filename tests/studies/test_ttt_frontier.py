"""The frontier of accuracy against energy: a small run end to end, its tables against second copies."""

from __future__ import annotations

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moe import ttt
from moe.device.base import PERIOD_S, Tick
from moe.device.meter import EnergyMeter
from studies import ttt_frontier as command
from studies.repeats import load_repeats, select
from studies.ttt_energy import Scale
from studies.ttt_frontier import Arguments
from studies.ttt_frontier_config import load_frontier
from studies.ttt_frontier_report import costs_table, frontier_table, visits_table
from thermoe_env.errors import ScenarioError

SETTINGS: dict[str, Any] = {
    "methods": {
        "neo": {"method": "neo"},
        "bank": {"method": "bank", "base": {"method": "neo", "base": {"method": "batch_statistics"}}},
        "eata": {"method": "eata", "settings": {"entropy_margin": 1.0}},
        "tent": {"method": "tent"},
    },
    "models": {"plain": {}, "stem": {"stem": True, "augment": 0.5}},
    "streams": {
        "short": {"schedule": "per_shift", "kinds": ["contrast", "blur"], "step": 2},
        "returning": {"schedule": "recurring", "kinds": ["contrast", "blur"], "cycles": 2, "step": 3},
        "like_labels": {"schedule": "label_correlated", "kinds": ["clean"], "step": 3},
    },
    "source_batches": 1,
    "sizes": {"tiny": {"steps": 2, "train_batch_size": 8, "batch_size": 8, "window_s": 0.02}},
    "small": {
        "models": ["plain"],
        "methods": ["neo", "tent"],
        "steps": 1,
        "batch_size": 4,
        "step": 2,
        "window_s": 0.01,
    },
}


def write_settings(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    config = write_settings(tmp_path_factory.mktemp("settings"), SETTINGS)
    out = tmp_path_factory.mktemp("frontier")
    arguments = Arguments(device="cpu", seeds=(0, 1), out=out, config=config)
    command.main(arguments)
    return arguments


@pytest.fixture(scope="module")
def repeats(finished: Arguments) -> list[dict[str, Any]]:
    return [r for name in ("plain", "stem") for r in load_repeats(finished.out / name, "vision", "tiny")]


def only(repeat: dict[str, Any], stream: str, method: str) -> dict[str, Any]:
    (run,) = [r for r in repeat["runs"] if (r["stream"], r["method"]) == (stream, method)]
    return run


def test_repeats_that_are_there_are_not_run_again_and_report_the_same(finished, monkeypatch):
    before = {path.name: path.read_bytes() for path in finished.out.glob("*.*")}
    assert set(before) == {
        "runs.csv", "frontier.csv", "visits.csv", "costs.csv", "report.md", "frontier.png"
    }  # fmt: skip
    monkeypatch.setattr(command, "run_repeat", lambda *_: pytest.fail("ran again"))
    command.main(finished)
    assert {path.name: path.read_bytes() for path in finished.out.glob("*.*")} == before


def test_every_model_serves_every_stream_by_every_method_and_without(repeats):
    wanted = set(itertools.product(SETTINGS["streams"], ("never", *SETTINGS["methods"])))
    for repeat in repeats:
        assert {(run["stream"], run["method"]) for run in repeat["runs"]} == wanted
        assert len(repeat["runs"]) == len(wanted)
        lengths = {name: len(shifts) for name, shifts in repeat["shifts"].items()}
        assert lengths == {"short": 4, "returning": 12, "like_labels": 3}
        assert all(len(r["quality"]) == len(r["steps"]) == lengths[r["stream"]] for r in repeat["runs"])
    assert [("stem" in repeat["config"]) for repeat in repeats] == [False, False, True, True]


def test_the_first_batch_is_scored_before_anything_is_learned(repeats):
    for repeat, stream in itertools.product(repeats, SETTINGS["streams"]):
        first = {run["quality"][0] for run in repeat["runs"] if run["stream"] == stream}
        assert len(first) == 1


def test_the_frontier_follows_from_the_runs(repeats):
    table = frontier_table(repeats)
    repeat = repeats[0]
    tent, never, neo = (only(repeat, "short", method) for method in ("tent", "never", "neo"))
    row = select(table, model="plain", seed=0, stream="short", method="tent").iloc[0]
    gained = np.mean(tent["quality"]) - np.mean(never["quality"])
    assert row["gain"] == pytest.approx(100 * gained)
    phases, steps = repeat["costs"]["phases"], repeat["costs"]["steps"]
    spent = phases["guard"] + np.mean(tent["steps"]) * steps["tent"]
    assert row["cost"] == pytest.approx((phases["serve"] + spent) / 8)
    lost = repeat["clean"] - np.mean(never["quality"])
    if lost > 0:
        assert row["recovered"] == pytest.approx(gained / lost)
    cheap = select(table, model="plain", seed=0, stream="short", method="neo").iloc[0]
    own, tents = (phases["guard"] + np.mean(neo["steps"]) * steps[name] for name in ("neo", "tent"))
    assert cheap["of_tent"] == pytest.approx(own / tents)
    unadapted = select(table, model="plain", seed=0, stream="short", method="never").iloc[0]
    assert unadapted["cost"] == pytest.approx(phases["serve"] / 8) and unadapted["gain"] == 0.0


def test_visits_are_those_of_the_stream_that_returns(repeats):
    table = visits_table(repeats)
    assert set(table["stream"]) == {"returning"} and set(table["visit"]) == {0, 1}
    quality = np.array(only(repeats[0], "returning", "tent")["quality"]).reshape(
        2, 2, 3
    )  # visit, kind, batch
    row = select(table, model="plain", seed=0, method="tent", visit=1).iloc[0]
    assert row["second"] == pytest.approx(quality[1, :, 1].mean() / quality[:, :, 1:].mean())


def test_what_adds_up_is_said_of_every_model(finished, repeats):
    costs = costs_table(repeats)
    assert len(costs) == 4 and costs[["of_mixed", "of_step"]].to_numpy().min() > 0
    report = (finished.out / "report.md").read_text()
    assert "no energy meter" in report and "of_mixed" in report and "J per image" not in report


class SteadyGpu:
    """A device that always draws 100 W and whose counter moves in ticks."""

    name, power_limit_w, averages = "steady", 200.0, True

    def energy(self) -> Tick:
        now_s = time.perf_counter()
        return Tick(100.0 * PERIOD_S * (now_s // PERIOD_S), now_s)

    def power_w(self) -> float:
        return 100.0


def test_a_load_is_weighed_over_many_ticks_by_its_repetitions():
    steady: Any = SteadyGpu()
    scale = Scale(EnergyMeter(steady), torch.device("cpu"), window_s=1.0)
    short, long = (scale.weigh(lambda seconds=seconds: time.sleep(seconds)) for seconds in (0.002, 0.02))
    assert short == pytest.approx(0.2, rel=0.25) and long == pytest.approx(2.0, rel=0.1)


def test_the_small_form_is_what_the_settings_say(tmp_path):
    config = write_settings(tmp_path, SETTINGS)
    small = load_frontier(config).made_small()
    assert tuple(small.models) == ("plain",) and tuple(small.methods) == ("neo", "tent")
    assert small.stream_config("short", "tiny").batches == 4 and small.sizes["tiny"].batch_size == 4
    command.main(Arguments(device="cpu", seeds=(0,), out=tmp_path / "out", config=config, small=True))
    assert (tmp_path / "out" / "report.md").exists()


def test_the_shipped_settings_hold_eight_methods_and_both_lengths_of_stream():
    study = load_frontier()
    assert len(study.methods) >= 8 and {s.step for s in study.streams.values()} >= {8, 32}
    kinds = {type(method.make_settings()) for method in study.methods.values()}
    assert kinds >= {ttt.Neo, ttt.Bank, ttt.Eva, ttt.Roid, ttt.Tent, ttt.Eata, ttt.BatchStatistics}
    assert json.dumps(study.settings("plain", "base", "cuda"))
    for size, name in itertools.product(study.sizes, study.streams):
        assert study.stream_config(name, size).batch_size * study.streams[name].step <= 5000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("methods", "tent"), {"method": "sar"}, "methods must have TENT"),
        (("methods", "neo", "base"), {"method": "bank"}, "base Bank"),
        (("methods", "tent", "base"), {"method": "neo"}, "stands on no other method"),
        (("small", "models"), ["rain"], r"small.models: unknown \['rain'\]"),
        (("streams", "short", "step"), 0, "shorter than its schedule"),
        (("sizes", "tiny", "steps"), 0, "must be positive"),
        (("models", "plain"), {"norm": "batch"}, "known keys"),
    ],
)
def test_settings_that_mean_nothing_are_refused(path, value, message, tmp_path):
    settings = copy.deepcopy(SETTINGS)
    place: Any = settings
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ScenarioError, match=message):
        load_frontier(write_settings(tmp_path, settings))
