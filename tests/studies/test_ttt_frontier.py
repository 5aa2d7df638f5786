"""The frontier of accuracy against energy: a small run end to end, its tables against second copies."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moe import ttt
from moe.data.datasets import load_vision
from moe.device.base import PERIOD_S, Tick
from moe.device.meter import EnergyMeter
from moe.training.recipes import RECIPES
from studies import ttt_frontier as command
from studies.repeats import select
from studies.tasks import StudyError, read_result
from studies.ttt_energy import Scale
from studies.ttt_frontier import Arguments
from studies.ttt_frontier_config import load_frontier
from studies.ttt_frontier_play import trained
from studies.ttt_frontier_tables import (
    costs_table,
    frontier_table,
    load_results,
    training_table,
    visits_table,
)
from thermoe_env.errors import ScenarioError

SETTINGS: dict[str, Any] = {
    "methods": {
        "neo": {"method": "neo"},
        "bank": {"method": "bank", "base": {"method": "neo", "base": {"method": "batch_statistics"}}},
        "eata": {"method": "eata", "settings": {"entropy_margin": 1.0}},
        "tent": {"method": "tent"},
    },
    "models": {
        "plain": {},
        "stem": {"stem": True, "augment": 0.5},
        "layer": {"norm": "layer", "methods": ["neo", "tent"]},
    },
    "streams": {
        "short": {"schedule": "per_shift", "kinds": ["contrast", "blur"], "step": 2},
        "returning": {"schedule": "recurring", "kinds": ["contrast", "blur"], "cycles": 2, "step": 3},
        "like_labels": {"schedule": "label_correlated", "kinds": ["clean"], "step": 3},
    },
    "source_batches": 1,
    "sizes": {
        "tiny": {
            "steps": 2,
            "train_batch_size": 8,
            "batch_size": 8,
            "weighed_batch_size": 16,
            "window_s": 0.02,
        }
    },
    "small": {
        "models": ["plain", "layer"],
        "methods": ["tent", "eata"],
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
    return load_results(finished.out, tuple(SETTINGS["models"]), "tiny")[0]


@pytest.fixture(scope="module")
def weighings(finished: Arguments) -> dict[str, dict[str, Any]]:
    return load_results(finished.out, tuple(SETTINGS["models"]), "tiny")[1]


def only(repeat: dict[str, Any], stream: str, method: str) -> dict[str, Any]:
    (run,) = [r for r in repeat["runs"] if (r["stream"], r["method"]) == (stream, method)]
    return run


def test_repeats_that_are_there_are_not_run_again_and_report_the_same(finished, monkeypatch):
    before = {path.name: path.read_bytes() for path in finished.out.glob("*.*")}
    assert set(before) == {
        "runs.csv", "frontier.csv", "visits.csv", "training.csv", "costs.csv", "report.md", "frontier.png"
    }  # fmt: skip
    for made in ("ensure_trained", "run_part", "weigh"):
        monkeypatch.setattr(command, made, lambda *_: pytest.fail("ran again"))
    command.main(finished)
    assert {path.name: path.read_bytes() for path in finished.out.glob("*.*")} == before


def test_every_model_serves_every_stream_by_every_method_that_it_takes_and_without(repeats):
    for repeat in repeats:
        methods = SETTINGS["models"][repeat["model"]].get("methods", SETTINGS["methods"])
        wanted = set(itertools.product(SETTINGS["streams"], ("never", *methods)))
        assert {(run["stream"], run["method"]) for run in repeat["runs"]} == wanted
        assert len(repeat["runs"]) == len(wanted)
        lengths = {name: len(shifts) for name, shifts in repeat["shifts"].items()}
        assert lengths == {"short": 4, "returning": 12, "like_labels": 3}
        assert all(len(r["quality"]) == len(r["steps"]) == lengths[r["stream"]] for r in repeat["runs"])
    shapes = [("stem" in repeat["config"], repeat["config"]["norm"]) for repeat in repeats[::2]]
    assert shapes == [(False, "batch"), (True, "batch"), (False, "layer")]


def test_the_first_batch_is_scored_before_anything_is_learned_unless_a_bank_answers_again(repeats):
    for repeat, stream in itertools.product(repeats, SETTINGS["streams"]):
        runs = [run for run in repeat["runs"] if run["stream"] == stream]
        assert len({run["quality"][0] for run in runs if not run["again"][0]}) == 1
        assert {run["method"] for run in runs if any(run["again"])} <= {"bank"}


def test_the_frontier_follows_from_runs_and_costs(repeats, weighings):
    table = frontier_table(repeats, weighings)
    repeat = repeats[0]
    tent, never, neo = (only(repeat, "short", method) for method in ("tent", "never", "neo"))
    row = select(table, model="plain", seed=0, stream="short", method="tent").iloc[0]
    gained = np.mean(tent["quality"]) - np.mean(never["quality"])
    assert row["gain"] == pytest.approx(100 * gained)
    weighed = weighings["plain"]["weighings"]
    serve, guard = (np.mean([own["phases"][phase] for own in weighed]) for phase in ("serve", "guard"))
    steps = {name: np.mean([own["steps"][name] for own in weighed]) for name in ("tent", "neo")}
    assert row["cost"] == pytest.approx((serve + guard + np.mean(tent["steps"]) * steps["tent"]) / 16)
    bank = copy.deepcopy(only(repeat, "short", "bank"))
    bank["again"] = [1, 0, 0, 0]
    changed = {**repeat, "runs": [*(r for r in repeat["runs"] if r["method"] == "never"), bank]}
    once = select(frontier_table([changed], weighings), stream="short", method="bank").iloc[0]
    step = np.mean([own["steps"]["bank"] for own in weighed])
    assert once["cost"] == pytest.approx((1.25 * serve + guard + np.mean(bank["steps"]) * step) / 16)
    lost = repeat["clean"] - np.mean(never["quality"])
    if lost > 0:
        assert row["recovered"] == pytest.approx(gained / lost)
    cheap = select(table, model="plain", seed=0, stream="short", method="neo").iloc[0]
    own, tents = (guard + np.mean(neo["steps"]) * steps[name] for name in ("neo", "tent"))
    assert cheap["of_tent"] == pytest.approx(own / tents)
    unadapted = select(table, model="plain", seed=0, stream="short", method="never").iloc[0]
    assert unadapted["cost"] == pytest.approx(serve / 16) and unadapted["gain"] == 0.0


def test_visits_are_those_of_the_stream_that_returns(repeats):
    table = visits_table(repeats)
    assert set(table["stream"]) == {"returning"}
    quality = np.array(only(repeats[0], "returning", "tent")["quality"]).reshape(
        2, 2, 3
    )  # visit, kind, batch
    row = select(table, model="plain", seed=0, method="tent").iloc[0]
    settled = quality[:, :, 1:].mean()
    found = [row[name] * settled for name in ("new", "returned", "second")]
    assert found == pytest.approx([quality[0, :, 0].mean(), quality[1, :, 0].mean(), quality[1, :, 1].mean()])


def test_what_adapting_adds_to_training_is_told_from_what_training_adds(repeats):
    row = select(training_table(repeats), model="stem", seed=1, stream="short", method="tent").iloc[0]
    plain, stem = (
        next(r for r in repeats if (r["model"], r["seed"]) == (name, 1)) for name in ("plain", "stem")
    )
    before, after = (100 * np.mean(only(stem, "short", method)["quality"]) for method in ("never", "tent"))
    bare = 100 * np.mean(only(plain, "short", "never")["quality"])
    assert (row["training"], row["adapting"]) == pytest.approx((before - bare, after - before))
    assert row["together"] == pytest.approx(after - bare)


def test_every_model_is_weighed_once_and_more_than_once_over(finished, weighings):
    assert {name: own["seed"] for name, own in weighings.items()} == dict.fromkeys(SETTINGS["models"], 0)
    for own in weighings.values():
        assert len(own["weighings"]) == 3 and own["cost_unit"] == "s"
    spread = costs_table(weighings)
    serve = [own["phases"]["serve"] / 16 for own in weighings["stem"]["weighings"]]
    row = select(spread, model="stem", phase="serve").iloc[0]
    assert (row["low"], row["mean"], row["high"]) == pytest.approx((min(serve), np.mean(serve), max(serve)))
    report = (finished.out / "report.md").read_text()
    assert "no energy meter" in report and "of_mixed" in report and "J per image" not in report


def test_the_report_says_what_is_asked_beside_what_was_found(finished, repeats):
    report = (finished.out / "report.md").read_text()
    never, tent = (
        np.array([100 * np.mean(only(repeat, "like_labels", name)["quality"]) for repeat in repeats[:2]])
        for name in ("never", "tent")
    )
    gains = tent - never
    (line,) = [line for line in report.splitlines() if line.startswith("| plain | like_labels | tent |")]
    met = sum(gain >= -2 for gain in gains)
    assert line.endswith(f"| {min(gains):+.1f} | {met} of 2 |")
    for asked in ("never more than 2 points below", "at least 90", "within 2 of 100"):
        assert asked in report
    norms = report.split("## Norm against norm")[1].split("## ")[0]
    assert "| layer | short | tent |" in norms and "| layer | short | neo |" in norms and "eata" not in norms


def test_what_is_served_is_what_was_trained(finished):
    study, device = load_frontier(finished.config), torch.device("cpu")
    folder, images = finished.out / "plain", load_vision("test")[0][:16]
    kept, clean = trained(study, folder, "plain", "tiny", device, seed=0)
    anew, clean_anew = trained(study, folder / "elsewhere", "plain", "tiny", device, seed=0)
    assert torch.equal(kept(images).logits, anew(images).logits) and clean == clean_anew


def test_parts_in_processes_are_those_of_one(finished, tmp_path):
    """Trained anew; nothing but date and time spent may differ."""
    out, names = tmp_path / "layer", ("never", "neo", "tent")
    out.mkdir()
    shutil.copy(finished.out / "layer" / "costs-tiny.json", out)
    arguments = replace(finished, out=tmp_path, models=("layer",), jobs=2)
    command.main(arguments)
    for seed, name in itertools.product((0, 1), names):
        own, same = (
            read_result(folder / "layer" / f"vision-tiny-seed{seed}-{name}.json")
            for folder in (tmp_path, finished.out)
        )
        for part in (own, same):
            del part["date"], part["spent_s"]
        assert own == same


def test_a_cut_run_goes_on_and_what_lacks_a_part_is_left_out(finished, tmp_path, monkeypatch):
    folder = tmp_path / "layer"
    shutil.copytree(finished.out / "layer", folder)
    lost = folder / "vision-tiny-seed1-neo.json"
    before = lost.read_text()
    lost.unlink()
    assert [repeat["seed"] for repeat in load_results(tmp_path, ("layer",), "tiny")[0]] == [0]
    arguments = replace(finished, out=tmp_path, models=("layer",))
    run, ran = command.run_part, []

    def counted(*given: Any) -> dict[str, Any]:
        ran.append(given[-2:])
        return run(*given)

    monkeypatch.setattr(command, "run_part", counted)
    command.main(arguments)
    assert ran == [(1, "neo")]
    assert json.loads(before)["runs"] == read_result(lost)["runs"]
    lost.write_text(json.dumps({"settings": {}}))
    with pytest.raises(StudyError, match=r"seed1-neo.json was made with other settings"):
        command.main(arguments)


def test_costs_of_other_settings_are_refused(finished, tmp_path):
    folder = tmp_path / "layer"
    shutil.copytree(finished.out / "layer", folder)
    path = folder / "costs-tiny.json"
    costs = read_result(path)
    costs["settings"]["repeats"]["steps"] += 1
    path.write_text(json.dumps(costs))
    arguments = replace(finished, out=tmp_path, models=("layer",))
    with pytest.raises(StudyError, match=r"costs-tiny.json was made with other settings"):
        command.main(arguments)
    with pytest.raises(StudyError, match="other settings than the repeats beside it"):
        command.main(replace(arguments, report_only=True))
    path.unlink()
    with pytest.raises(StudyError, match=r"costs-tiny.json is missing"):
        command.main(replace(arguments, report_only=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("rain",)}, r"unknown models \['rain'\]; known"),
        ({"seeds": ()}, "seeds must name at least one"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_arguments_that_run_nothing_are_refused(finished, change, message):
    with pytest.raises(StudyError, match=message):
        command.main(replace(finished, **change))


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
    above_idle = Scale(EnergyMeter(steady), torch.device("cpu"), window_s=1.0, idle_w=60.0)
    assert above_idle.weigh(lambda: time.sleep(0.02)) == pytest.approx(0.8, rel=0.1)


def test_the_small_form_is_what_the_settings_say(tmp_path):
    config = write_settings(tmp_path, SETTINGS)
    small = load_frontier(config).made_small()
    assert tuple(small.models) == ("plain", "layer") and tuple(small.methods) == ("tent", "eata")
    assert tuple(small.methods_of("layer")) == ("tent",)
    assert small.stream_config("short", "tiny").batches == 4 and small.sizes["tiny"].batch_size == 4


def test_the_shipped_settings_hold_eight_methods_and_both_lengths_of_stream():
    study = load_frontier()
    assert len(study.methods) >= 8 and {s.step for s in study.streams.values()} >= {8, 32}
    kinds = {type(method.make_settings()) for method in study.methods.values()}
    assert kinds >= {ttt.Neo, ttt.Bank, ttt.Eva, ttt.Roid, ttt.Tent, ttt.Eata, ttt.BatchStatistics}
    assert {trained.norm for trained in study.models.values()} == {"batch", "group", "layer", "rms"}
    for size, own in study.sizes.items():
        assert own.steps == RECIPES["vision", size].steps  # trained as what is shipped
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
        (("models", "plain"), {"norms": "batch"}, "known keys"),
        (("models", "layer", "methods"), ["neo"], "'tent' among them"),
        (("models", "layer", "methods"), ["tent", "rain"], "models.layer.methods must be of"),
        (("models", "layer", "methods"), ["tent", "bank"], r"'bank' adapts models with norms \('batch',\)"),
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
