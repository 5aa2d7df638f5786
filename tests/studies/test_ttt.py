"""The study of test-time training: a small repeat end to end, its numbers against second copies of them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from moe.data import datasets as data
from moe.data.streams import StreamConfig, StreamError, draw_shifts
from moe.model.config import model_config
from moe.model.transformer import MoEModel, initialise
from moe.service.gates import Always
from studies import ttt as study_command
from studies.repeats import StudyError, load_repeats, select
from studies.ttt import Arguments
from studies.ttt_config import METHODS, Adaptation, load_study
from studies.ttt_measure import run_repeat
from studies.ttt_meter import PHASES, PhaseClock
from studies.ttt_play import Learner, play
from studies.ttt_results import recovered_table, runs_table, shifts_table
from studies.ttt_streams import load_pool, make_stream
from thermoe_env.errors import ScenarioError

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "adaptations": {
        "batch_statistics": {"method": "batch_statistics"},
        "tent": {"method": "tent", "settings": {"learning_rate": 0.01}},
        "eata": {"method": "eata", "settings": {"entropy_margin": 1.0}},
        "router": {"method": "dynamic_evaluation", "group": "router"},
    },
    "gates": {
        "vision": {
            "always": {"rule": "always"},
            "periodic": {"rule": "periodic", "settings": {"every": 2}},
        },
        "language": {"always": {"rule": "always"}},
    },
    "streams": {
        "shifts": {"task": "vision", "schedule": "per_shift", "kinds": ["contrast", "clean", "blur"]},
        "correlated": {"task": "vision", "schedule": "label_correlated", "kinds": ["contrast"]},
        "text": {"task": "language", "schedule": "recurring", "kinds": ["clean", "code"]},
    },
    "grids": [
        {
            "stream": "shifts",
            "norms": ["batch", "layer"],
            "adaptations": ["tent", "eata"],
            "guarded": [False],
        },
        {
            "stream": "shifts",
            "norms": ["batch"],
            "adaptations": ["tent"],
            "gates": ["always", "periodic"],
            "budgets": [0.5, None],
            "guarded": [False],
        },
        {
            "stream": "correlated",
            "norms": ["batch"],
            "adaptations": ["batch_statistics", "tent"],
            "guarded": [True, False],
        },
        {"stream": "text", "norms": ["rms"], "adaptations": ["router"], "budgets": [0.5, None]},
    ],
    "rotation_head": False,
    "source_batches": 1,
    "window_batches": 4,
    "bank_windows": 1,
    "sizes": {
        "tiny": {
            "steps": {"vision": 3, "language": None},
            "train_batch_size": {"vision": 16, "language": 4},
            "batch_size": {"vision": 8, "language": 2},
            "batches": {"shifts": 9, "correlated": 5, "text": 8},
            "learning_rates": {"router": 0.5},
            "window_s": 0.1,
        },
    },
}


def write_settings(folder: Path, **changes: Any) -> str:
    settings = copy.deepcopy(SETTINGS) | changes
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """A study of both tasks, two repeats each, that has run."""
    out = tmp_path_factory.mktemp("study")
    config = write_settings(tmp_path_factory.mktemp("settings"))
    arguments = Arguments(device="cpu", seeds=(0, 1), out=out, config=config)
    study_command.main(arguments)
    return arguments


@pytest.fixture(scope="module")
def repeats(finished: Arguments) -> list[dict[str, Any]]:
    return [r for task in ("vision", "language") for r in load_repeats(finished.out, task, "tiny")]


def quality(repeat: dict[str, Any]) -> list[tuple[Any, ...]]:
    kept = ("quality_of_batch", "adapted", "selected", "refused", "guard", "price")
    return [tuple(run[key] for key in kept) for run in repeat["runs"]]


def find(repeat: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [run for run in repeat["runs"] if all(run[key] == value for key, value in values.items())]


def test_a_repeat_that_is_there_is_not_run_again_and_reports_the_same(finished, monkeypatch):
    before = {path.name: path.read_bytes() for path in finished.out.iterdir()}
    assert {"runs.csv", "summary.csv", "shifts.csv", "recovered.csv", "report.md"} <= set(before)
    assert {"budgets.png", "norms.png", "guards.png", "stream.png"} <= set(before)
    monkeypatch.setattr(study_command, "run_repeat", lambda *_: pytest.fail("ran again"))
    study_command.main(finished)
    assert {path.name: path.read_bytes() for path in finished.out.iterdir()} == before


def test_the_same_repeat_twice_is_the_same_bit_for_bit(finished, repeats):
    study = load_study(finished.config)
    for first, other in (repeats[:2], repeats[2:]):
        again = json.loads(json.dumps(run_repeat(study, first["task"], "tiny", CPU, 0)))
        assert quality(again) == quality(first) != quality(other)


def test_no_joules_on_a_cpu(finished, repeats):
    assert {repeat["cost_unit"] for repeat in repeats} == {"s"}
    for run in (run for repeat in repeats for run in repeat["runs"]):
        assert run["counter_j"] is None and run["phase_cost"] == run["phase_s"]
    report = (finished.out / "report.md").read_text()
    assert "no energy meter" in report and "J per request" not in report


def test_every_phase_is_timed_where_it_happens_and_nowhere_else(repeats):
    for run in (run for repeat in repeats for run in repeat["runs"]):
        seconds = run["phase_s"]
        assert tuple(seconds) == PHASES and seconds["serve"] > 0.0
        learned = any(run["adapted"])
        assert (seconds["adapt_forward"] > 0.0) >= learned and (seconds["adapt_update"] > 0.0) >= learned
        assert (seconds["guard"] > 0.0) == run["guarded"]  # also where it leaves all batches out
        if run["adaptation"] == "never":
            assert seconds["adapt_forward"] == seconds["adapt_update"] == seconds["guard"] == 0.0


def test_a_budget_is_kept_and_no_budget_refuses_nothing(repeats):
    for run in (run for repeat in repeats for run in repeat["runs"]):
        if run["price"] is None:
            assert run["refused"] == 0
            continue
        charged = run["price"]["adapt"] * sum(run["adapted"])
        earned = run["budget"] * run["price"]["serve"] * len(run["adapted"])
        assert 0.0 < charged <= earned
        assert run["price"]["adapt"] > 1.5 * run["price"]["serve"]  # a forward pass and a backward one


def test_a_periodic_gate_without_limit_learns_every_other_batch(repeats):
    (run,) = find(repeats[0], gate="periodic", budget=None)
    assert run["adapted"] == [i % 2 == 0 for i in range(9)]


def test_a_batch_is_scored_before_it_is_learned_from(repeats):
    """The first batch of every run scores as the unadapted model's, whatever is learned from it."""
    for repeat in repeats:
        first = {(run["stream"], run["norm"]): set() for run in repeat["runs"]}
        for run in repeat["runs"]:
            first[run["stream"], run["norm"]].add(run["quality_of_batch"][0])
        assert {len(values) for values in first.values()} == {1}
        assert len({tuple(run["quality_of_batch"]) for run in repeat["runs"]}) > len(first)


def test_a_language_run_is_dynamic_evaluation_written_out(finished, repeats):
    """A second copy: score all bytes, then a plain SGD step of the routers on the bytes seen."""
    from moe.training.weights import load_model

    study, model = load_study(finished.config), load_model("language", "tiny", "cpu")
    config = study.stream_config("text", "tiny")
    batches = make_stream(config, load_pool("language", "tiny", CPU), 0)
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    found = []
    for batch in batches:
        text = torch.cat([batch.inputs.long(), batch.targets[:, None]], dim=1)  # [B, S + 1]
        for parameter in routers:
            parameter.requires_grad_(True)
        log_p = model(batch.inputs).logits.log_softmax(dim=-1)
        nats = -log_p.gather(-1, text[:, 1:, None])[..., 0]  # [B, S]
        found.append(nats.mean().item() / math.log(2))
        gradients = torch.autograd.grad(nats[:, :-1].mean(), routers)
        with torch.no_grad():
            for parameter, gradient in zip(routers, gradients, strict=True):
                parameter -= 0.5 * gradient
    (run,) = find(repeats[2], adaptation="router", budget=None)
    assert run["guard"]["steps"] == len(batches)
    np.testing.assert_allclose(run["quality_of_batch"], found, rtol=1e-5)


def test_a_run_leaves_the_model_as_it_was():
    model = initialise(MoEModel(model_config("vision", "tiny")), torch.Generator().manual_seed(0)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pool = load_pool("vision", "tiny", CPU)
    batches = make_stream(StreamConfig(task="vision", kinds=("blur",), batches=3, batch_size=4), pool, 0)
    learner = Learner(model, Adaptation(method="tent"), PhaseClock(CPU), guarded=True)
    assert sum(play(learner, batches, Always(), None, None).adapted) == 3
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    learner.state.reset(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def only(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of seed 0 in which TENT adapts a batch norm to every batch of one shift after another."""
    return select(
        table, seed=0, stream="shifts", norm="batch", adaptation="tent", gate="always", budget=math.inf
    )


def test_tables_follow_from_the_runs(repeats):
    runs, shifts = runs_table(repeats), shifts_table(repeats)
    vision = repeats[0]
    (never,) = find(vision, stream="shifts", norm="batch", adaptation="never")
    (tent,) = find(vision, stream="shifts", norm="batch", adaptation="tent", gate="always", budget=None)
    row = only(runs).iloc[0]
    gained = 100 * (np.mean(tent["quality_of_batch"]) - np.mean(never["quality_of_batch"]))
    assert row["gain"] == pytest.approx(gained)
    spent = sum(tent["phase_s"][phase] for phase in ("adapt_forward", "adapt_update", "guard"))
    assert row["adapt_cost"] == pytest.approx(spent / (9 * 8))
    assert row["adapt_ratio"] == pytest.approx(spent / tent["phase_s"]["serve"])
    by_step = only(shifts)
    assert list(by_step["shift"]) == ["contrast@5", "clean", "blur@5"]
    assert np.mean(by_step["gain"]) == pytest.approx(gained)
    kept = np.r_[0:3, 6:9]  # the corrupted batches
    own, before = (float(np.mean(np.array(r["quality_of_batch"])[kept])) for r in (tent, never))
    recovered = only(recovered_table(repeats, shifts))
    expected = (own - before) / (vision["models"]["batch"]["clean"] - before)
    assert list(recovered["recovered"]) == pytest.approx([expected])
    text = select(runs, task="language", seed=0, adaptation="router", budget=math.inf).iloc[0]
    (plain,) = find(repeats[2], adaptation="never")
    assert text["gain"] == pytest.approx(100 * (1 - text["quality"] / np.mean(plain["quality_of_batch"])))


def test_every_run_of_the_grids_is_made_once(finished):
    study = load_study(finished.config)
    runs = study.runs("vision")
    assert len(runs) == len(set(runs)) == 3 + 2 * 2 + 3 + 4
    assert {run.reference for run in runs} <= set(runs)


def test_the_settings_of_the_shipped_models_train_nothing():
    assert set(load_study("ttt-shipped").sizes["tiny"].steps.values()) == {None}


def test_the_shipped_settings_are_complete():
    study = load_study()
    assert {run.budget for run in study.runs("vision")} == {0.0, 0.05, 0.1, 0.2, 0.5, None}
    assert {run.norm for run in study.runs("vision")} == {"batch", "group", "layer", "rms"}
    used = {study.adaptations[r.adaptation].method for t in ("vision", "language") for r in study.runs(t)
            if r.adaptation != "never"}  # fmt: skip
    assert used == set(METHODS)


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_the_shipped_streams_fit_the_shipped_data(size):
    study = load_study()
    labels = data.load_vision("test", full=False)[1]
    for name, stream in study.streams.items():
        config = study.stream_config(name, size)
        if stream.task == "vision":
            assert len(draw_shifts(config, labels, 0)) == config.batches
        else:
            pool = load_pool("language", size, CPU)
            assert len(make_stream(config, pool, 0)) == config.batches


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    place: Any = settings
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return settings


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("adaptations", "tent", "method"), "prayer", "unknown method 'prayer'; known: .*'tent'"),
        (("adaptations", "tent", "settings"), {"rho": 1.0}, r"tent has no settings \['rho'\]"),
        (("adaptations", "tent", "settings"), {"momentum": 2.0}, "momentum must be within"),
        (("gates", "vision", "always", "rule"), "often", "unknown rule 'often'"),
        (("gates", "vision", "periodic", "settings"), {"every": 0}, "every must be at least 1"),
        (("gates", "vision", "periodic", "settings"), {"each": 2}, "periodic: .*each"),
        (("grids", 0, "adaptations"), ["batch_statistics"], "norms .'batch',.*and norm 'layer'"),
        (("grids", 0, "adaptations"), ["router"], "models of task 'language'"),
        (("grids", 0, "stream"), "rain", r"unknown streams \['rain'\]"),
        (("grids", 3, "gates"), ["periodic"], r"unknown language gates \['periodic'\]"),
        (("grids", 1, "budgets"), [0.0], "budgets are fractions"),
        (("sizes", "tiny", "batches", "shifts"), 2, "2 batches is shorter than its schedule"),
        (("sizes", "tiny", "batches"), {"shifts": 9}, "number of batches of stream 'correlated'"),
        (("sizes", "tiny", "steps", "vision"), None, "model has norm 'batch', others are trained"),
        (("sizes", "tiny", "learning_rates"), {"tent": -1.0}, "learning_rate must be positive"),
        (("sizes", "tiny", "learning_rates"), {"rain": 1.0}, r"unknown adaptations \['rain'\]"),
        (("adaptations", "tent", "method"), "rotation", "'rotation' needs models trained for it"),
        (("anchor",), 3, "known keys"),
    ],
)
def test_settings_that_mean_nothing_are_refused(path, value, message, tmp_path):
    with pytest.raises(ScenarioError, match=message):
        load_study(write_settings(tmp_path, **changed(path, value)))


def test_bad_folders_are_refused(finished, tmp_path):
    with pytest.raises(StudyError, match="holds no repeat"):
        study_command.main(Arguments(out=tmp_path, report_only=True))
    other = write_settings(tmp_path, window_batches=5)
    with pytest.raises(StudyError, match="other settings"):
        study_command.main(Arguments(task="vision", device="cpu", seeds=(0,), out=finished.out, config=other))
    with pytest.raises(StudyError, match="no size 'base'"):
        study_command.main(Arguments(size="base", device="cpu", out=tmp_path, config=finished.config))


def test_a_stream_that_needs_more_text_than_there_is_is_refused():
    config = StreamConfig(
        task="language", kinds=("clean", "code"), schedule="recurring", batches=64, batch_size=64
    )
    with pytest.raises(
        StreamError, match="64 lanes of 32 chunks of 'clean' need 2048 chunks, the pool holds 1"
    ):
        make_stream(config, load_pool("language", "tiny", CPU), 0)
