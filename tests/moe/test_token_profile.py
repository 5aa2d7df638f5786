"""Profiles of the token service as files: round trip, digests, tables, and what is refused."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moe.lm.config import SIZES, readable_experts
from moe.profiles import ProfileError
from moe.profiling.token_cost import BIASES
from moe.token_profile import (
    CostCell,
    OfDomain,
    QualityCell,
    TokenCost,
    TokenProfile,
    TokenQuality,
    load_token_profile,
    save_token_profile,
)

H200 = Path(__file__).parents[2] / "configs/profiles/h200-generate.json"
THIRD = 1.0 / 3.0
BY_DOMAIN = (("prose", THIRD), ("c", 0.5))


def cost_cell(rows: int, top_k: int, readable: int, **other: Any) -> CostCell:
    values = {
        "decode_rows": rows, "prefill_rows": 0, "context": 512, "top_k": top_k, "readable": readable,
        "experts_read": THIRD * readable, "step_s": THIRD * (rows + 1), "step_spread": THIRD / 100,
        "energy_j": rows * (top_k + readable) / 7, "energy_spread": THIRD / 10,
    }  # fmt: skip
    return CostCell(**(values | other))


def quality_cell(running: int, top_k: int, bias: float) -> QualityCell:
    return QualityCell(
        running=running, top_k=top_k, routing_bias=bias, tokens=1000, accuracy=(top_k - bias) / 7,
        standard_error=THIRD / 100, minus_standard=-THIRD / 10, confidence=THIRD, entropy=THIRD,
        experts_read=8 * THIRD,
        by_domain={
            name: OfDomain(accuracy=share, minus_standard=-share, experts_read=9 * share)
            for name, share in BY_DOMAIN
        },
    )  # fmt: skip


def made_up_profile() -> TokenProfile:
    """Numbers of many digits, cells in no order."""
    config = SIZES["small"][0]
    cells = [
        cost_cell(n, k, readable_experts(bias, 16, k))
        for n in (8, 1) for k in (1, 4, 2) for bias in (BIASES if n > 1 else (0.0,))
    ]  # fmt: skip
    others = [
        cost_cell(8, 4, 16, context=128),
        cost_cell(8, 4, 16, prefill_rows=16),
        cost_cell(0, 4, 16, prefill_rows=16, energy_j=-0.001),
        cost_cell(3, 4, 9, held_out=True),
    ]
    cost = TokenCost(
        device="made up", config=asdict(config), cells=(*cells, *others), idle_power_w=100 * THIRD,
        copy_bytes_per_s=1e12 * THIRD,
        provenance={"options": (1, 2.0 * THIRD), "seconds": 1e5 * THIRD, "driver": None},
    )  # fmt: skip
    answers = [
        quality_cell(n, k, bias)
        for n in (8, 1) for k in (4, 1, 2) for bias in ((1.0, 0.0, 0.5, 0.75) if n > 1 else (0.0,))
    ]  # fmt: skip
    quality = TokenQuality(
        size="small", weights_sha256="a" * 64, documents_sha256="b" * 64, top_k=4,
        standard={name: (share, 0.5) for name, share in BY_DOMAIN}, cells=tuple(answers),
        provenance={"seconds": THIRD},
    )  # fmt: skip
    return TokenProfile(cost=cost, quality=quality)


def test_a_profile_keeps_its_digests_and_six_digits_through_its_file(tmp_path: Path) -> None:
    profile, path = made_up_profile(), tmp_path / "new" / "card-generate.json"
    save_token_profile(profile, path)
    loaded = load_token_profile(path)
    assert loaded != profile  # it was rounded
    assert loaded.digests() == profile.digests()
    assert loaded.cost.cells[0].step_s == pytest.approx(profile.cost.cells[0].step_s, rel=1e-5)
    assert loaded.cost.provenance["options"] == [1, 0.666667]
    assert list(path.parent.iterdir()) == [path]
    save_token_profile(loaded, path)
    assert load_token_profile(path) == loaded


def test_each_part_has_a_digest_of_its_own() -> None:
    profile = made_up_profile()
    before = profile.digests()
    other = replace(profile, quality=replace(profile.quality, size="base")).digests()
    assert other["cost"] == before["cost"] and other["quality"] != before["quality"]
    cells = (replace(profile.cost.cells[0], step_s=1.0), *profile.cost.cells[1:])
    other = replace(profile, cost=replace(profile.cost, cells=cells)).digests()
    assert other["cost"] != before["cost"] and other["quality"] == before["quality"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_token_profile(made_up_profile(), path)
    before = path.read_bytes()
    odd = replace(made_up_profile().cost, provenance={"x": object()})
    with pytest.raises(TypeError):
        save_token_profile(replace(made_up_profile(), cost=odd), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tables_hold_the_measured_cells_under_ascending_keys() -> None:
    profile = made_up_profile()
    tables = profile.summary()
    assert tables["quality_by_k"] == {1: 1 / 7, 2: 2 / 7, 4: 4 / 7}
    assert tables["quality_by_bias"] == {
        1: {0.0: 4 / 7}, 8: {0.0: 4 / 7, 0.5: 3.5 / 7, 0.75: 3.25 / 7, 1.0: 3 / 7},
    }  # fmt: skip
    by_k = {k: pytest.approx((k + 16) / 7) for k in (1, 2, 4)}
    assert tables["energy_per_token_by_k"] == {1: by_k, 8: by_k}
    readable = {0.0: 16, 0.5: 10, 0.75: 7, 1.0: 4}
    assert tables["energy_per_token_by_bias"] == {
        1: {0.0: pytest.approx(20 / 7)},
        8: {bias: pytest.approx((4 + r) / 7) for bias, r in readable.items()},
    }

    def ascend(table: dict[Any, Any]) -> None:
        assert list(table) == sorted(table)
        for inner in table.values():
            if isinstance(inner, dict):
                ascend(inner)

    for table in tables.values():
        ascend(table)


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_bias_of_a_cost_is_the_one_that_reads_so_many_experts(size: str) -> None:
    config = SIZES[size][0]  # type: ignore[index]
    for bias in (0.0, 0.25, 0.5, 0.75, 1.0):
        readable = readable_experts(bias, config.n_experts, config.top_k)
        assert round((1 - readable / config.n_experts) / 0.75, 4) == bias


def test_the_shipped_profile_of_an_h200_says_what_it_should() -> None:
    profile = load_token_profile(H200)
    tables = profile.summary()
    assert profile.cost.device == "NVIDIA H200" and profile.quality.size == "base"
    assert {cell.readable for cell in profile.cost.cells if not cell.held_out} == {64, 40, 28, 16}
    quality, energy = tables["quality_by_bias"][32], tables["energy_per_token_by_bias"][32]
    assert quality[1.0] < quality[0.0] and energy[1.0] < energy[0.0]
    assert tables["quality_by_k"][2] < tables["quality_by_k"][8]


def test_without_a_meter_joules_are_null() -> None:
    profile = made_up_profile()
    cells = tuple(replace(cell, energy_j=None, energy_spread=None) for cell in profile.cost.cells)
    tables = replace(profile, cost=replace(profile.cost, cells=cells, idle_power_w=None)).summary()
    assert tables["energy_per_token_by_k"][8] == {1: None, 2: None, 4: None}


def damage(document: dict[str, Any], place: str, value: Any) -> None:
    *way, last = place.split(".")
    inner: Any = document
    for key in way:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is ...:
        del inner[last]
    else:
        inner[int(last) if isinstance(inner, list) else last] = value


FIRST_COST, FIRST_QUALITY = "cost.cells.0", "quality.cells.0"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("kind", "score", "kind"),
        ("cost", ..., "cost: Field required"),
        ("more", 1, "more"),
        ("cost.cells", [], "none is a decode step"),
        ("cost.config.n_experts", ..., "lacks n_experts"),
        ("cost.config.n_experts", "16", "cost.config.n_experts"),
        ("cost.config.top_k", 2, "parts of two models"),
        ("cost.idle_power_w", 0.0, "cost.idle_power_w"),
        (f"{FIRST_COST}.step_s", 0.0, f"{FIRST_COST}.step_s"),
        (f"{FIRST_COST}.step_s", "0.1", f"{FIRST_COST}.step_s"),
        (f"{FIRST_COST}.step_s", float("nan"), f"{FIRST_COST}.step_s"),
        (f"{FIRST_COST}.energy_j", float("inf"), f"{FIRST_COST}.energy_j"),
        (f"{FIRST_COST}.energy_j", None, "null in some"),
        (f"{FIRST_COST}.top_k", 0, f"{FIRST_COST}.top_k"),
        (f"{FIRST_COST}.top_k", 5, "not of a model of 4 of 16"),
        (f"{FIRST_COST}.readable", 17, "not of a model of 4 of 16"),
        (f"{FIRST_COST}.decode_rows", 0, "has no rows"),
        (f"{FIRST_COST}.decode_rows", 1.5, f"{FIRST_COST}.decode_rows"),
        (f"{FIRST_COST}.oops", 1, f"{FIRST_COST}.oops"),
        ("quality.cells", [], "none is at the trained"),
        ("quality.weights_sha256", "abc", "quality.weights_sha256"),
        (f"{FIRST_QUALITY}.accuracy", 1.5, f"{FIRST_QUALITY}.accuracy"),
        (f"{FIRST_QUALITY}.routing_bias", -0.1, f"{FIRST_QUALITY}.routing_bias"),
        (f"{FIRST_QUALITY}.by_domain.c.accuracy", 2.0, f"{FIRST_QUALITY}.by_domain.c.accuracy"),
        (f"{FIRST_QUALITY}.by_domain", {}, "is of other domains: [], quality.standard ['c', 'prose']"),
        ("quality.standard.c", [0.5], "needs as many parts in every domain, got [1, 2]"),
        (f"{FIRST_QUALITY}.routing_bias", 0.0, "quality.cells: one is there twice"),
    ],
)  # fmt: skip
def test_a_damaged_profile_is_refused_by_file_place_and_remedy(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    path = tmp_path / "p.json"
    save_token_profile(made_up_profile(), path)
    document = json.loads(path.read_text())
    damage(document, place, value)
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError) as refused:
        load_token_profile(path)
    said = str(refused.value)
    assert said.startswith(str(path)) and message in said and "measure it again" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("lesson_j", None, "lesson_j is null and energies of steps are not"),
        ("curve.logs", [[0.0, 0.0]], "adaptation.curve.logs"),
        ("curve.logs.1", [1e9, -0.1], "adaptation.curve.logs.1.0"),
        ("curve.logs", ..., "is of other domains than quality.standard"),
        ("changed.logs.c", ..., "lacks a domain that was learned"),
        ("visits.0.0.domain", "verse", "of domains without a curve: ['verse']"),
    ],
)
def test_lessons_that_cannot_be_played_are_refused(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    path, document = tmp_path / "p.json", json.loads(H200.read_text())
    damage(document["adaptation"], place, value)
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=re.escape(message)):
        load_token_profile(path)


def test_cells_that_are_there_twice_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_token_profile(made_up_profile(), path)
    text = path.read_text()
    twice = json.loads(text)
    twice["cost"]["cells"].append(deepcopy(twice["cost"]["cells"][0]))
    for content, message in (
        (json.dumps(twice), "cost.cells: one is there twice"),
        (text[: len(text) // 2], "not a JSON document"),
        (text.replace('"kind"', '"kind": "generate", "kind"', 1), "'kind' is there twice"),
        ("", "not a JSON document"),
        ("[]", "no profile of tokens"),
        ("[" * 100_000, "not a JSON document"),
    ):
        path.write_text(content)
        with pytest.raises(ProfileError, match=message):
            load_token_profile(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="not a JSON document"):
        load_token_profile(path)
    with pytest.raises(ProfileError, match="No such file"):
        load_token_profile(tmp_path / "absent.json")
