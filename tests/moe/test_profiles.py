"""Profile files come back as written, doubtful ones are refused; and the arithmetic behind them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from moe.model.config import model_config
from moe.profiles import Profile, ProfileError, load_profile, save_profile
from moe.training import weights
from tests.moe.conftest import CELL, made_up


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "made-up.json"
    save_profile(made_up(), path)
    return path


def test_a_profile_comes_back_as_it_was_written(saved):
    written, again = made_up(), load_profile(saved)
    for field in fields(Profile):
        value, loaded = getattr(written, field.name), getattr(again, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(loaded, value, rtol=1e-5)
        else:
            assert loaded == value
    assert [path.name for path in saved.parent.iterdir()] == ["made-up.json"]


def test_interpolation_is_linear(saved):
    loaded = load_profile(saved)
    row = loaded.latency_s[:, 1, 0]
    assert loaded.latency_at(8, 2) == pytest.approx(row[1])
    assert loaded.latency_at(36, 2) == pytest.approx((row[1] + row[2]) / 2)
    assert loaded.latency_at(0.5, 2) == pytest.approx(row[0])  # a floor
    assert loaded.latency_at(8, 2, 0.5) == pytest.approx(loaded.latency_s[1, 1].mean())
    assert loaded.energy_j is not None
    expected = loaded.energy_j[2, 0, 0] / loaded.latency_s[2, 0, 0]
    assert loaded.active_power_w(64, 1) == pytest.approx(expected)
    with pytest.raises(ProfileError, match="expert_count=3"):
        loaded.latency_at(8, 3)
    with pytest.raises(ProfileError, match=r"routing_bias=1\.1"):
        loaded.latency_at(8, 2, 1.1)


def test_intervals_are_wilsons(saved):
    loaded = load_profile(saved)
    right = np.round(loaded.accuracy * loaded.samples).astype(int)
    counted = replace(loaded, accuracy=right / loaded.samples).accuracy_interval()
    expected = scipy.stats.binomtest(int(right[1, 2, 0, 1]), loaded.samples).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(counted[1, 2, 0, 1], expected, atol=1e-6)


def edited(path: Path, **changes: Any) -> Path:
    raw = json.loads(path.read_text())
    for name, change in changes.items():
        raw[name] = change(raw[name])
    path.write_text(json.dumps(raw))
    return path


def cell_set(value: Any):
    def change(table: list) -> list:
        inner = table
        while isinstance(inner[0], list):
            inner = inner[0]
        inner[0] = value
        return table

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_s": lambda t: [t[0], t[1], [t[2][0]]]}, "latency_s is ragged"),
        ({"latency_s": lambda t: t[:2]}, r"latency_s has shape \(2, 2, 2\).*a cell is missing"),
        ({"energy_j": cell_set(-0.5)}, r"energy_j\[0, 0, 0\] is negative"),
        ({"energy_j": cell_set(None)}, r"energy_j\[0, 0, 0\] is negative or not a number"),
        ({"energy_j": cell_set(0.0)}, "energy_j holds a zero"),
        ({"accuracy": cell_set(1.2)}, "accuracy holds a value above 1"),
        ({"accuracy": lambda _: None}, "accuracy is absent"),
        ({"batch_size": lambda _: None}, "batch_size is absent"),
        ({"batch_size": lambda _: []}, "batch_size is absent, empty"),
        ({"batch_size": lambda _: [8, 1, 64]}, "batch_size must ascend"),
        ({"batch_size": lambda _: [0, 1, 64]}, "batch_size must start at 1"),
        ({"batch_size": lambda _: [1, float("nan"), 64]}, "batch_size must ascend"),
        ({"batch_size": lambda _: [1, 8, float("inf")]}, "batch_size must ascend"),
        ({"batch_size": lambda _: [1, 8.5, 64]}, "batch_size must hold whole numbers"),
        ({"latency_s": cell_set("0.5")}, "latency_s holds text"),
        ({"latency_s": cell_set(True)}, "latency_s holds text or true and false"),
        ({"latency_s": cell_set(10**400)}, "latency_s is ragged"),
        ({"energy_j": cell_set(float("inf"))}, r"energy_j\[0, 0, 0\] is negative or not a number"),
        ({"routing_bias": lambda _: [0.1, 1.0]}, "routing_bias must start at 0"),
        ({"cost_bias": lambda _: [0.0, 0.5]}, "same ends"),
        ({"shifts": lambda _: ["blur@5", "clean"]}, "shifts must start"),
        ({"shifts": lambda _: None}, "shifts must list"),
        ({"idle_power_w": lambda _: None}, "idle_power_w must be there"),
        ({"idle_power_w": lambda _: float("nan")}, "idle_power_w must be above 0"),
        ({"ttt_energy_j": lambda _: None}, "ttt_energy_j must be there"),
        ({"mixture": lambda _: None}, r"accuracy has shape \(2, 3, 2, 2\)"),
        ({"mixture": lambda t: t[0]}, "mixture has shape"),
        ({"latency_spread": lambda _: None}, "latency_spread is absent"),
        ({"adapt_rate": lambda _: float("nan")}, "adapt_rate"),
        ({"adapt_rate": lambda _: 1.5}, "adapt_rate"),
        ({"samples": lambda _: 0}, "samples"),
        ({"samples": lambda _: True}, "samples"),
        ({"device": lambda _: 7}, "task, size and device must be text"),
        ({"provenance": lambda _: []}, "provenance must be an object"),
        ({"model": lambda m: {**m, "config": {"top_k": 3}}}, r"top_k must be among expert_count \[1\.0, 2"),
        ({"adaptation_error": lambda _: [1.0]}, "adaptation_error must be an object"),
        ({"model": lambda _: {"key": "0"}}, "model must be"),
        ({"held_out": lambda _: [{**CELL, "latency_error": float("nan")}]}, "held_out has latency_error"),
        ({"held_out": lambda _: [{"batch_size": 1}]}, "held_out must list"),
        ({"adaptation_error": lambda _: {"points": float("nan")}}, r"adaptation_error\.points"),
        ({"expert_share": lambda t: (np.array(t) / 2).tolist()}, "expert_share does not sum to 1"),
    ],
)
def test_doubtful_profiles_are_refused(saved, changes, message):
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(edited(saved, **changes))
    assert str(saved) in str(caught.value)


@given(st.floats(0.0, 0.999))
def test_a_cut_file_is_refused(share):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up.json"
        save_profile(made_up(), path)
        whole = path.read_text()
        path.write_text(whole[: int(share * len(whole))])
        with pytest.raises(ProfileError, match="not a JSON document"):
            load_profile(path)


def test_unknown_and_missing_fields_and_files_are_refused(saved, tmp_path):
    raw = json.loads(saved.read_text())
    saved.write_text(json.dumps({**raw, "colour": "blue"}))
    with pytest.raises(ProfileError, match="colour"):
        load_profile(saved)
    del raw["energy_j"]
    saved.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match="energy_j"):
        load_profile(saved)
    with pytest.raises(ProfileError, match=r"moe\.profiling"):
        load_profile(tmp_path / "none.json")


def test_a_doubtful_profile_is_not_written_and_the_old_one_stays(saved):
    before = saved.read_text()
    with pytest.raises(ProfileError):
        save_profile(replace(made_up(), adapt_rate=float("inf")), saved)
    with pytest.raises(TypeError):
        save_profile(replace(made_up(), provenance={"bad": object()}), saved)
    assert saved.read_text() == before and len(list(saved.parent.iterdir())) == 1


def tiny_profile(**changes: Any) -> Profile:
    return replace(made_up(), model={**weights.identity("vision", "tiny"), **changes})


def test_a_profile_of_the_model_that_is_here_is_accepted():
    weights.check_profile(tiny_profile())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_sha256": "f" * 64}, "weights_sha256 ffffffffffff, here it is"),
        ({"data_sha256": "f" * 64}, "data_sha256 ffffffffffff, here it is"),
        ({"config": {**model_config("vision", "tiny").to_dict(), "d_model": 32}}, r"d_model.*32, 64"),
    ],
)
def test_a_profile_of_something_else_is_refused(changes, message):
    with pytest.raises(ProfileError, match=message) as caught:
        weights.check_profile(tiny_profile(**changes))
    assert "python -m moe.profiling --task vision" in str(caught.value)


def test_another_training_of_a_base_model_is_logged_and_not_refused(tmp_path, caplog):
    base = replace(made_up(), size="base", model=weights.identity("vision", "base", tmp_path))
    weights.check_profile(base, tmp_path)
    assert not caplog.records
    trained = replace(base, model={**base.model, "weights_sha256": "f" * 64})
    weights.check_profile(trained, tmp_path)
    assert "another training" in caplog.text
    with pytest.raises(ProfileError, match="data_sha256"):
        weights.check_profile(replace(base, model={**base.model, "data_sha256": "f" * 64}), tmp_path)


@pytest.mark.parametrize("field", [f.name for f in fields(Profile)])
def test_no_value_of_a_field_ends_in_another_error(saved, field):
    """Whatever stands in a field, the profile is loaded or refused by name."""
    original = json.loads(saved.read_text())
    odd = (
        None,
        True,
        -1,
        1e308,
        10**400,
        float("nan"),
        float("-inf"),
        "x",
        [],
        {},
        [[]],
        [None],
        ["x"],
        [{}],
    )
    for value in (*odd, [original[field]], {"a": original[field]}):
        saved.write_text(json.dumps({**original, field: value}))
        try:
            load_profile(saved)
        except ProfileError as error:
            assert str(saved) in str(error)


def test_what_is_no_profile_is_refused(tmp_path, saved):
    path = tmp_path / "other.json"
    for content, message in (
        (b"{", "not a JSON document"),
        (b"\xff", "not a JSON document"),
        (b"[" * 100_000, "not a JSON document"),
        (b"[1]", "missing or unknown fields"),
        (saved.read_bytes().replace(b'"task"', b'"size": 1, "task"', 1), "'size' is there twice"),
    ):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match=message):
            load_profile(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(tmp_path)
