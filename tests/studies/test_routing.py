"""The routing study: a small repeat end to end, and its tables against second copies of them."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

from agents.play.metrics import student_interval
from moe.data import datasets as data
from moe.errors import DataCorruptError
from moe.model.config import model_config
from moe.model.transformer import MoEModel, initialise
from moe.model.usage import BYTE_CLASSES
from moe.training.evaluate import evaluate_language
from moe.training.recipes import Recipe
from studies import routing
from studies.repeats import StudyError, load_repeats, summarize
from studies.routing import Arguments
from studies.routing_config import load_study
from studies.routing_measure import load_inputs, score_cell
from studies.routing_results import Key, cells_table, claims, pareto_front
from thermoe_env.errors import ScenarioError

SETTINGS: dict[str, Any] = {
    "variants": {
        "standard": {"experts": "even", "fixed_k": 2},
        "uneven": {"experts": "uneven"},
        "free": {"experts": "zero-computation"},
        "frugal": {"experts": "uneven", "recipe": {"energy_lambda": 0.3}},
    },
    "zero_computation": ["zero"],
    "expert_counts": [1, 2],
    "routing_biases": [0.0, 1.0],
    "usage_expert_count": 2,
    "shift": {"vision": "blur@3", "language": "code"},
    "quality_margin": 0.01,
    "sizes": {
        "tiny": {
            "steps": {"vision": 3, "language": 3},
            "batch_size": {"vision": 16, "language": 4},
            "window_s": 0.01,
            "rounds": 1,
            "test_samples": {"vision": 50, "language": 50},
        },
    },
}


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "small.yaml"
    path.write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(settings_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """A study of one vision repeat that has run."""
    out = tmp_path_factory.mktemp("study")
    arguments = Arguments(task="vision", device="cpu", seeds=(0,), out=out, config=str(settings_file))
    routing.main(arguments)
    return arguments


@pytest.fixture(scope="module")
def repeat(finished: Arguments) -> dict[str, Any]:
    (found,) = load_repeats(finished.out, "vision", "tiny")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_repeat_that_is_there_is_not_run_again_and_reports_the_same(finished, monkeypatch):
    before = contents(finished.out)
    assert {"cells.csv", "summary.csv", "routing.csv", "claims.json", "pareto.png"} <= set(before)
    monkeypatch.setattr(routing, "run_repeat", lambda *_: pytest.fail("ran again"))
    routing.main(finished)
    assert contents(finished.out) == before


def test_no_joules_on_a_cpu(finished, repeat):
    assert not [name for name in pd.read_csv(finished.out / "summary.csv") if "energy" in name]
    assert {claim["cost"] for claim in json.loads((finished.out / "claims.json").read_text())} == {
        "time_s_per_token"
    }
    assert repeat["variants"]["uneven"]["idle_power_w"] is None


def test_all_cells_of_the_grid_are_measured_and_even_experts_only_without_bias(repeat):
    for name, variant in repeat["variants"].items():
        found = [(cell["expert_count"], cell["routing_bias"]) for cell in variant["cells"]]
        biases = (0.0,) if name == "standard" else (0.0, 1.0)
        assert sorted(found) == [(k, bias) for k in (1, 2) for bias in biases]
        assert all(cell["latency_s"] > 0.0 and cell["time_s_per_token"] > 0.0 for cell in variant["cells"])


def test_no_token_is_lost_in_the_counts(repeat):
    labels = data.load_vision("test")[1][:50]
    tokens_per_sample = model_config("vision", "tiny").tokens_per_sample
    for variant in repeat["variants"].values():
        for cell in variant["cells"]:
            expected = np.bincount(labels, minlength=10) * tokens_per_sample * cell["expert_count"]
            assert set(cell["counts"]) == {"clean", "shifted"} if cell["expert_count"] == 2 else {"clean"}
            for counts in cell["counts"].values():  # [L, C, E]
                assert (np.sum(counts, axis=2) == expected).all()


def test_the_bias_moves_tokens_to_experts_that_cost_less(repeat):
    for name in ("uneven", "frugal"):
        variant = repeat["variants"][name]
        cost = np.array(variant["expert_cost"])  # [E]
        assert cost.max() == pytest.approx(1.0) and len(np.unique(cost)) > 1
        for k in (1, 2):
            # Of the first layer, whose inputs do not depend on the routing.
            load = {
                cell["routing_bias"]: np.sum(cell["counts"]["clean"], axis=1)[0]
                for cell in variant["cells"]
                if cell["expert_count"] == k
            }
            assert load[1.0] @ cost < load[0.0] @ cost


def test_language_is_scored_on_prose_and_on_code_and_counted_by_byte(settings_file):
    study, config = load_study(str(settings_file)), model_config("language", "tiny")
    inputs = load_inputs(study, "language", "tiny", torch.device("cpu"))
    model = initialise(MoEModel(config), torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    scored = score_cell(model, inputs, 2, 1.0, study)
    length = 50 * config.context_length  # of the 50 windows that the settings ask for
    domains: tuple[tuple[str, str, data.Domain], ...] = (
        ("", "clean", "prose"),
        ("shifted_", "shifted", "code"),
    )
    for prefix, kind, domain in domains:
        text = data.load_language(domain, "test")[: length + 1]
        accuracy, bits = evaluate_language(model, text, 2, 1.0, batch_size=7)
        assert scored[f"{prefix}accuracy"] == pytest.approx(accuracy)
        assert scored[f"{prefix}bits_per_byte"] == pytest.approx(bits)
        digits = sum(48 <= byte < 58 for byte in text[:length].tolist())
        digit_row = BYTE_CLASSES.index("digit")
        assert (np.sum(scored["counts"][kind], axis=2)[:, digit_row] == 2 * digits).all()


def test_variants_have_as_many_parameters(repeat):
    sizes = [variant["n_params"] for variant in repeat["variants"].values()]
    assert max(sizes) / min(sizes) < 1.01


def test_results_of_other_settings_or_damaged_ones_are_refused(finished, tmp_path):
    with pytest.raises(StudyError, match="other settings"):
        routing.main(Arguments(**(vars(finished) | {"steps": 4})))
    (tmp_path / "vision-tiny-seed0.json").write_text("{")
    with pytest.raises(DataCorruptError, match=r"seed0\.json is no JSON"):
        routing.main(Arguments(task="vision", out=tmp_path, report_only=True))
    with pytest.raises(StudyError, match="holds no repeat"):
        routing.main(Arguments(task="language", out=tmp_path, report_only=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"usage_expert_count": 4}, "usage_expert_count must be one of"),
        ({"routing_biases": [0.5, 1.0]}, "routing_biases must start with 0"),
        ({"variants": {"uneven": {"experts": "uneven", "recipe": {"magic": 1.0}}}}, "magic"),
        ({"variants": {"uneven": {"experts": "uneven"}}}, "standard"),
    ],
)
def test_settings_that_make_no_study_are_refused(tmp_path, change, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(ScenarioError, match=message):
        load_study(str(path))


def test_shipped_settings_differ_only_in_what_they_name():
    study = load_study()
    for task in ("vision", "language"):
        for size in ("tiny", "base"):
            plain = study.recipe("standard", task, size)
            for name, variant in study.variants.items():
                differing = {
                    key
                    for key in inspect.signature(Recipe).parameters
                    if getattr(study.recipe(name, task, size), key) != getattr(plain, key)
                }
                assert differing == set(variant.recipe)
                assert study.model_config(name, task, size).n_layers == model_config(task, size).n_layers
    assert study.model_config("standard-k2", "vision", "tiny").top_k_choices == (2,)


# ---------------------------------------------------------------- tables, on made-up repeats


def made_up(seeds: int, metric: str = "energy_j_per_token") -> list[dict[str, Any]]:
    """Repeats in which the cheapest good cell of each variant is known."""
    cost = {("standard", 2, 0.0): 1.0, ("standard", 1, 0.0): 0.7, ("uneven", 2, 0.0): 0.9}
    cost |= {
        ("uneven", 1, 0.0): 0.8,
        ("uneven", 2, 1.0): 0.6,
        ("uneven", 1, 1.0): 0.3,
        ("frugal", 2, 0.0): 0.5,
        ("frugal", 1, 0.0): 0.2,
    }
    accuracy = {("standard", 2, 0.0): 0.90, ("standard", 1, 0.0): 0.70, ("uneven", 2, 0.0): 0.91}
    accuracy |= {("uneven", 2, 1.0): 0.895, ("uneven", 1, 1.0): 0.85, ("uneven", 1, 0.0): 0.84}
    accuracy |= {("frugal", 2, 0.0): 0.90, ("frugal", 1, 0.0): 0.5}
    rng = np.random.default_rng(1)
    repeats = []
    for seed in range(seeds):
        of_day = rng.uniform(0.5, 2.0)  # the same for all cells of a repeat: ratios do not see it
        variants: dict[str, Any] = {}
        for (name, k, bias), joules in cost.items():
            value = 1e-3 * joules * of_day * rng.lognormal(0.0, 0.02)
            right = accuracy[name, k, bias] + rng.normal(0.0, 1e-3)
            cell = {"expert_count": k, "routing_bias": bias, metric: value, "accuracy": right}
            variants.setdefault(name, {"cells": []})["cells"].append(cell)
        repeats.append({"task": "vision", "seed": seed, "variants": variants})
    return repeats


@pytest.fixture
def made_with(settings_file: Path) -> dict[str, Any]:
    """Settings of the made-up repeats."""
    return load_study(str(settings_file)).settings("vision", "tiny", "cuda")


def test_savings_against_a_second_calculation_from_the_raw_numbers(made_with):
    repeats = made_up(5)
    found = {claim.question: claim for claim in claims(cells_table(repeats), made_with, margin=0.01)}

    def values(key: Key, name: str) -> np.ndarray:
        (index,) = {
            i
            for i, cell in enumerate(repeats[0]["variants"][key.variant]["cells"])
            if (cell["expert_count"], cell["routing_bias"]) == key[1:]
        }
        return np.array([repeat["variants"][key.variant]["cells"][index][name] for repeat in repeats])

    def check(question: str, reference: Key, ours: Key, expected_met: bool | None) -> None:
        claim = found[question]
        assert (claim.reference, claim.ours) == (str(reference), str(ours))
        ratios = values(ours, "energy_j_per_token") / values(reference, "energy_j_per_token")
        test = stats.ttest_1samp(np.log(ratios), 0.0).confidence_interval(0.95)
        assert claim.saving == pytest.approx(1.0 - stats.gmean(ratios))
        assert (claim.saving_low, claim.saving_high) == pytest.approx(
            (1.0 - math.exp(test.high), 1.0 - math.exp(test.low))
        )
        change = values(ours, "accuracy") - values(reference, "accuracy")
        assert claim.quality_change == pytest.approx(change.mean())
        assert claim.met is expected_met

    standard, frugal = Key("standard", 2, 0.0), Key("frugal", 2, 0.0)
    check("ours against standard", standard, frugal, True)
    check("ours against the best standard", standard, frugal, True)
    check("frugal against uneven, at the floor", Key("uneven", 2, 1.0), frugal, True)
    # On the front of uneven: 0.3 and 0.6 have a match in frugal's 0.5, the best has none.
    along = found["frugal against uneven, along the front"]
    assert "(2 of 3 have one)" in along.rule
    logs = [
        np.log(values(frugal, "energy_j_per_token") / values(cell, "energy_j_per_token"))
        for cell in (Key("uneven", 1, 1.0), Key("uneven", 2, 1.0))
    ]
    assert along.saving == pytest.approx(1.0 - math.exp(np.mean(logs)))
    by_setting = found["frugal against uneven, setting by setting"]
    logs = [
        np.log(
            values(Key("frugal", k, 0.0), "energy_j_per_token")
            / values(Key("uneven", k, 0.0), "energy_j_per_token")
        )
        for k in (1, 2)
    ]
    assert by_setting.saving == pytest.approx(1.0 - math.exp(np.mean(logs))) and by_setting.met is None
    alone = made_with | {"variants": {k: v for k, v in made_with["variants"].items() if k != "uneven"}}
    with pytest.raises(StudyError, match="'frugal' needs one with the same"):
        claims(cells_table(repeats), alone, margin=0.01)


def test_nothing_good_enough_and_a_single_repeat_are_not_met(made_with):
    cells = cells_table(made_up(3))
    cells.loc[cells.variant != "standard", "accuracy"] = 0.1
    claim = claims(cells, made_with, 0.01)[0]
    assert claim.question == "ours against standard"
    assert claim.ours == "none good enough" and math.isnan(claim.saving) and claim.met is False
    single = claims(cells_table(made_up(1)), made_with, 0.01)[0]
    assert single.saving > 0.4 and math.isnan(single.saving_low) and single.met is False


def test_repeats_with_and_without_a_meter_do_not_mix(made_with):
    cells = pd.concat([cells_table(made_up(1)), cells_table(made_up(1, "time_s_per_token"))])
    with pytest.raises(StudyError, match="energy meter"):
        claims(cells, made_with, 0.01)


def test_summary_is_what_pandas_and_scipy_say():
    cells = cells_table(made_up(4))
    summary = summarize(cells, ["variant", "expert_count", "routing_bias"], ["accuracy"])
    for row in summary.to_dict("records"):
        own = cells.query(
            f"variant == '{row['variant']}' and expert_count == {row['expert_count']} "
            f"and routing_bias == {row['routing_bias']}"
        ).accuracy
        expected = stats.t.interval(0.95, len(own) - 1, loc=own.mean(), scale=stats.sem(own))
        assert row["accuracy"] == pytest.approx(own.mean())
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(expected)
    assert np.isnan(student_interval([1.0])[1:]).all()


def test_the_front_holds_what_nothing_beats():
    rng = np.random.default_rng(0)
    keys = [Key("a", k, float(b)) for k in range(5) for b in range(6)]
    cost, quality = ({key: float(rng.integers(0, 12)) for key in keys} for _ in range(2))
    beaten = {
        key
        for key in keys
        for other in keys
        if cost[other] <= cost[key] and quality[other] >= quality[key]
        and (cost[other] < cost[key] or quality[other] > quality[key])
    }  # fmt: skip
    front = pareto_front(cost, quality)
    assert not beaten & set(front)
    of_front = {(cost[key], quality[key]) for key in front}
    assert of_front == {(cost[key], quality[key]) for key in keys if key not in beaten}


def test_live_heatmaps_show_the_tokens_moving(tmp_path):
    from studies import heatmaps

    arguments = heatmaps.Arguments(
        device="cpu", batch_size=32, calm_s=0.4, rise_s=0.4, interval_s=0.2, out=tmp_path / "live"
    )
    folder = heatmaps.main(arguments)
    record = json.loads((folder / "usage.json").read_text())
    tokens, signal = np.array(record["tokens_per_expert"]), np.array(record["thermal_signal"])
    assert tokens.shape[:2] == (6, 2) and (np.diff(signal) >= 0).all() and {0.0, 1.0} <= set(signal)
    assert (tokens.sum(axis=2) == tokens.sum(axis=2)[:, :1]).all()  # every layer sees every token
    assert (
        tokens.sum(axis=(1, 2)) % (2 * 4 * 16) == 0
    ).all()  # whole images, 4 experts for each of 16 tokens
    cost = torch.tensor(record["expert_cost"]).numpy()
    first = tokens[:, 0]  # [T, E]
    mean_cost = [(first[signal == s].sum(axis=0) @ cost) / first[signal == s].sum() for s in (0.0, 1.0)]
    assert mean_cost[1] < mean_cost[0]
    assert (folder / "experts_live.png").stat().st_size > 0
