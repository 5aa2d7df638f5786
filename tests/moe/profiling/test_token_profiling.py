"""What `python -m moe.profiling tokens` measures on a CPU, how it resumes, and what it says."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.lm.config import readable_experts
from moe.lm.engine.engine import Engine
from moe.lm.text import DOMAINS, documents
from moe.lm.weights import identity, reference
from moe.profiles import ProfileError
from moe.profiling import token_quality, tokens
from moe.profiling.cli import cli
from moe.profiling.token_cost import BIASES, MORE_BIASES, Place, measure_place, places, read_texts, rows_of
from moe.profiling.token_quality import (
    Passages,
    measure_token_quality,
    passages,
    score,
    standard_by_position,
)
from moe.profiling.tokens import TokenOptions, measure
from moe.service.generate.sequences import Texts
from moe.token_profile import Learned, QualityCell, TokenAdaptation, Visit, load_token_profile
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens

H200 = Path(__file__).parents[3] / "configs/profiles/h200-generate.json"
DOCUMENTS, LENGTH = 6, 48
DOMAIN = np.arange(DOCUMENTS) % 2


def whole_window(text: torch.Tensor, top_k: int) -> torch.Tensor:
    """Logits of every position from one pass over whole documents.  # [N, S, V]."""
    model = make_model(TINY)
    with torch.no_grad():
        return model.logits(model(text[:, :-1].long(), top_k)[0])


@cache
def texts() -> Texts:
    """Documents of which about every other token is the model's own guess."""
    text, model = make_tokens(DOCUMENTS, LENGTH + 1), make_model(TINY)
    with torch.no_grad():
        for position in range(0, LENGTH, 2):
            x, _ = model(text[:, : position + 1].long())
            text[:, position + 1] = model.logits(x[:, -1]).argmax(dim=-1)
    return Texts(text.numpy(), (whole_window(text, 4).argmax(dim=-1) == text[:, 1:]).numpy())


def make_engine() -> Engine:
    return Engine(make_model(TINY), texts().tokens, slots=8, max_rows=40)


NAMES = ("even", "odd")
TOKENS = 12


def quality(plan: dict[int, int], tokens: int = TOKENS) -> dict[tuple[int, int, float], QualityCell]:
    cells = measure_token_quality(make_engine(), texts(), DOMAIN, NAMES, plan, tokens)
    found = {(cell.running, cell.top_k, cell.routing_bias): cell for cell in cells}
    assert len(found) == len(cells)
    return found


def scored(running: int, groups: int) -> dict[str, Passages]:
    """What is decoded of each domain."""
    return {
        name: passages(np.flatnonzero(DOMAIN == d), running * groups, LENGTH, TOKENS)
        for d, name in enumerate(NAMES)
    }


def test_passages_are_different_ones_of_the_documents_from_everywhere_behind_a_prompt() -> None:
    part = passages(np.array([1, 3, 5]), 9, LENGTH, TOKENS)
    pairs = set(zip(part.document.tolist(), part.first.tolist(), strict=True))
    assert pairs == {(document, first) for document in (1, 3, 5) for first in (12, 24, 36)}
    assert part.positions.max() == LENGTH - 1 and part.positions.shape == (9, TOKENS)
    with pytest.raises(ValueError, match="9 passages of 12 tokens, and 10 are asked for"):
        passages(np.array([1, 3, 5]), 10, LENGTH, TOKENS)


def test_quality_at_bias_0_is_that_of_one_pass_over_whole_documents() -> None:
    cells, text = quality({1: 6, 3: 2}), torch.from_numpy(texts().tokens)
    for top_k, running in itertools.product((4, 2, 1), (1, 3)):
        logits = whole_window(text, top_k)
        guesses, p = (logits.argmax(dim=-1) == text[:, 1:]).numpy(), logits.softmax(dim=-1)
        entropy = -(p * p.log()).sum(dim=-1) / np.log(TINY.vocabulary)  # [N, S]
        cell, gaps = cells[running, top_k, 0.0], []
        parts = scored(running, 6 // running)
        at = {name: (part.document[:, None], part.positions) for name, part in parts.items()}
        for name, place in at.items():
            of, right = cell.by_domain[name], guesses[place]
            gap = right.mean(axis=1) - texts().reference[place].mean(axis=1)
            gaps.append(gap)
            assert of.accuracy == pytest.approx(right.mean())
            assert of.minus_standard == pytest.approx(gap.mean(), abs=1e-12)
            assert of.experts_read == pytest.approx(experts_read(text, top_k, running, *place))
        assert cell.tokens == 12 * TOKENS
        assert cell.standard_error == pytest.approx(np.concatenate(gaps).std(ddof=1) / 12**0.5)
        for of_cell, values in ((cell.confidence, p.amax(dim=-1)), (cell.entropy, entropy)):
            assert of_cell == pytest.approx(
                np.mean([values[place].mean() for place in at.values()]), rel=1e-4
            )
        for name in ("accuracy", "minus_standard", "experts_read"):
            means = [getattr(of, name) for of in cell.by_domain.values()]
            assert getattr(cell, name) == pytest.approx(np.mean(means))


def experts_read(
    text: torch.Tensor, top_k: int, running: int, document: np.ndarray, position: np.ndarray
) -> float:
    """Different experts of a group at a step, mean over steps, groups and layers, in one pass."""
    _, decisions = make_engine().model(text[:, :-1].long(), top_k)
    steps = [
        d.experts.view(DOCUMENTS, LENGTH, top_k)[document[g : g + running, 0], position[g : g + running, t]]
        for d in decisions for g in range(0, len(document), running) for t in range(TOKENS)
    ]  # fmt: skip
    return float(np.mean([len(step.unique()) for step in steps]))


def test_at_the_trained_top_k_nothing_is_lost() -> None:
    cell, parts = quality({1: 6})[1, 4, 0.0], scored(1, 6)
    assert cell.minus_standard == 0.0 and cell.standard_error == 0.0
    right = [texts().reference[part.document[:, None], part.positions].mean() for part in parts.values()]
    assert cell.accuracy == pytest.approx(np.mean(right))


def test_the_standard_service_is_told_by_position() -> None:
    standard = standard_by_position(texts(), DOMAIN, NAMES)
    assert set(standard) == set(NAMES) and {len(shares) for shares in standard.values()} == {16}
    assert standard["odd"][2] == texts().reference[1::2, 6:9].mean()
    assert np.mean(standard["even"]) == pytest.approx(texts().reference[::2].mean())


def test_a_bias_is_measured_on_the_prompts_that_were_read_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Settings share a prompt's keys and values, and none sees the answers of the one before."""
    together = quality({3: 2})
    assert {bias for _, top_k, bias in together if top_k == 4} == {0.0, 0.25, 0.5, 0.75}
    assert together[3, 4, 0.75].accuracy != together[3, 4, 0.0].accuracy
    for bias in (0.5, 0.75):
        monkeypatch.setattr(token_quality, "BIASES", (bias,))
        assert quality({3: 2})[3, 4, bias] == together[3, 4, bias]


def test_passages_that_make_no_whole_groups_are_refused() -> None:
    part = passages(np.array([0, 2]), 4, LENGTH, TOKENS)
    with pytest.raises(ValueError, match="4 passages make no whole groups of 3"):
        score(make_engine(), texts().tokens, part, 3, 4, (8,))


# Cost


@pytest.mark.parametrize(("thorough", "biases"), [(False, BIASES), (True, MORE_BIASES)])
def test_cost_is_measured_at_the_biases_of_quality(thorough: bool, biases: tuple[float, ...]) -> None:
    assert set(biases) <= set(token_quality.BIASES)
    wanted = places(make_engine(), thorough=thorough)
    assert len(set(wanted)) == len(wanted)
    for top_k in (1, 2, 4):
        decode = {
            p.readable for p in wanted
            if p.top_k == top_k and p.decode_rows > 1 and not p.prefill_rows and not p.held_out
        }  # fmt: skip
        assert decode == {readable_experts(bias, TINY.n_experts, top_k) for bias in biases}
    assert any(p.held_out for p in wanted) and any(p.prefill_rows for p in wanted)
    assert all(p.decode_rows + p.prefill_rows <= 40 and p.decode_rows <= 8 for p in wanted)


def engine_document(slot: int) -> int:
    return int(slot * 0.618034 % 1.0 * DOCUMENTS)


def test_rows_of_a_cell_are_decode_rows_and_chunks_that_end_at_its_context() -> None:
    engine = make_engine()
    rows = rows_of(engine, Place(2, 30, 20, 4, 8))
    assert engine.blocks.free_slots == 8 - 4  # two that decode, 20 and 10 rows of two prompts
    by_slot = [rows.position[rows.slot == slot].tolist() for slot in range(4)]
    assert by_slot == [[20], [20], [*range(20)], [*range(10, 20)]]
    assert rows.document.tolist() == [engine_document(slot) for slot in rows.slot]
    assert sorted(engine_document(slot) < DOCUMENTS // 2 for slot in range(4)) == [False, False, True, True]


def test_a_cell_counts_the_experts_that_its_steps_read_and_leaves_the_engine_empty() -> None:
    engine = make_engine()
    read_texts(engine, 6, 31)
    for place in (Place(4, 0, 30, 4, 4), Place(6, 0, 30, 1, 8), Place(0, 16, 16, 2, 8)):
        cell = measure_place(engine, place, None, None, window_s=0.01)
        assert Place(*(getattr(cell, name) for name in Place._fields)) == place
        engine.launch(rows_of(engine, place), place.top_k, place.readable)
        assert cell.experts_read == engine.usage()[1].sum() / TINY.n_layers <= place.readable
        engine.reset()
        assert cell.step_s > 0 and cell.energy_j is None and cell.energy_spread is None
        assert engine.blocks.free_slots == 8 and engine.blocks.free_blocks == engine.blocks.n_blocks


def test_rows_of_a_cell_choose_the_experts_that_their_text_chooses() -> None:
    """As counted in one pass over whole documents, whatever was measured before."""
    engine, text = make_engine(), torch.from_numpy(texts().tokens)
    read_texts(engine, DOCUMENTS, 31)
    _, decisions = engine.model(text[:, :-1].long())
    for _ in range(2):
        for n in (1, 3):
            first = [engine_document(slot) for slot in range(n)]
            at_30 = [d.experts.view(DOCUMENTS, LENGTH, -1)[first, 30] for d in decisions]
            cell = measure_place(engine, Place(n, 0, 30, 4, 8), None, None, window_s=0.01)
            assert cell.experts_read == np.mean([len(experts.unique()) for experts in at_30])
        measure_place(engine, Place(1, 30, 30, 1, 4), None, None, window_s=0.01)


# The command


CELLS = [Place(1, 0, 40, 4, 16), Place(2, 0, 40, 4, 16), Place(2, 0, 40, 4, 4), Place(2, 8, 40, 2, 16)]


def learned() -> TokenAdaptation:
    """Made up."""
    nothing = Learned(accuracy=0.0, confidence=0.0, entropy=0.0, loss=0.0)
    return TokenAdaptation(
        lesson_rows=512, margin=0.005, lesson_s=0.1, lesson_j=None,
        curve=dict.fromkeys(DOMAINS, ((0.0, 0.0), (2.0, -0.01))),
        changed={about: dict.fromkeys(DOMAINS, nothing) for about in DOMAINS},
        visits=((Visit(domain="c", lessons=3, loss=0.01, accuracy=0.0),),), provenance={},
    )  # fmt: skip


class Killed(Exception):
    pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TokenOptions:
    """The shipped model on few tokens and cells."""
    monkeypatch.setattr(tokens, "PLAN", {"cpu": {2: 1}})
    monkeypatch.setattr(tokens, "SCORED_TOKENS", {"cpu": 4})
    monkeypatch.setattr(tokens, "ENGINE", {"cpu": {"slots": 4, "max_rows": 64}})
    monkeypatch.setattr(tokens, "places", lambda engine, *, thorough: CELLS)
    monkeypatch.setattr(tokens, "_measure_adaptation", lambda *_: learned())  # a test of its own
    return TokenOptions(size="small", device="cpu", out=tmp_path / "cpu-generate.json", window_s=0.001)


def partial_of(options: TokenOptions) -> Path:
    return options.out.with_suffix(".partial.json")


def test_an_interrupted_measurement_goes_on_and_measures_nothing_twice(
    quick: TokenOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Place | str] = []

    def measure_place_(engine: Engine, place: Place, *rest: Any) -> Any:
        if measured.count("quality") == 1 and len(measured) == 4:
            raise Killed
        measured.append(place)
        return measure_place(engine, place, *rest)

    def measure_quality_(*arguments: Any) -> Any:
        measured.append("quality")
        return measure_quality(*arguments)

    def measure_adaptation_(*arguments: Any) -> TokenAdaptation:
        measured.append("adaptation")
        return learned()

    measure_quality = tokens.measure_quality
    monkeypatch.setattr(tokens, "_measure_adaptation", measure_adaptation_)
    monkeypatch.setattr("moe.profiling.token_cost.measure_place", measure_place_)
    monkeypatch.setattr(tokens, "measure_quality", measure_quality_)
    with pytest.raises(Killed):
        tokens.main(quick)
    kept = json.loads(partial_of(quick).read_text())
    assert len(kept["cells"]) == 2 and kept["quality"]["size"] == "small" and not quick.out.exists()
    measured.append("killed")
    tokens.main(quick)
    assert sorted(map(str, measured)) == sorted(map(str, [*CELLS, "quality", "adaptation", "killed"]))
    assert not partial_of(quick).exists()
    profile = load_token_profile(quick.out)
    times_s = {cell.step_s for cell in profile.cost.cells}
    assert {float(f"{cell['step_s']:.6g}") for cell in kept["cells"]} <= times_s
    assert {Place(*(getattr(cell, f) for f in Place._fields)) for cell in profile.cost.cells} == set(CELLS)
    assert profile.adaptation == learned()
    assert profile.quality.weights_sha256 == identity("small")["weights_sha256"]
    shown = capsys.readouterr().out
    assert "accuracy by experts per token" in shown and f"wrote {quick.out}" in shown
    assert "mJ" not in shown  # no meter on a CPU


def test_the_shipped_model_serves_its_reference(quick: TokenOptions) -> None:
    quality = measure(quick).quality
    cell = next(cell for cell in quality.cells if (cell.top_k, cell.routing_bias) == (4, 0.0))
    assert cell.minus_standard == pytest.approx(0.0, abs=1 / 40)  # roundings turn single tokens
    assert tuple(cell.by_domain) == tuple(quality.standard) == DOMAINS
    assert np.mean(quality.standard["c"]) == pytest.approx(
        reference("small")[documents().domain == DOMAINS.index("c")].mean()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed"),
        ({"window_s": 0.002, "thorough": True}, "another thorough, window_s"),
    ],
)
def test_what_another_run_kept_is_refused(quick: TokenOptions, change: dict[str, Any], message: str) -> None:
    keep(quick)
    with pytest.raises(ProfileError, match=message):
        measure(replace(quick, **change))


def keep(options: TokenOptions) -> dict[str, Any]:
    """What a run that measured no cell keeps."""
    kept = tokens._Kept(options, torch.device("cpu"))
    kept.save()
    return json.loads(partial_of(options).read_text())


def test_what_was_kept_of_other_weights_or_another_card_is_refused(quick: TokenOptions) -> None:
    for key in ("weights_sha256", "documents_sha256", "device", "torch"):
        document = keep(quick)
        document["run"][key] = "another"
        partial_of(quick).write_text(json.dumps(document))
        with pytest.raises(ProfileError, match=f"another {key}: .*delete the file"):
            measure(quick)
        partial_of(quick).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "",
        lambda d: "[]",
        lambda d: json.dumps(d)[:50],
        lambda d: json.dumps({**d, "run": None}),
        lambda d: json.dumps({**d, "cells": [{"decode_rows": 1}]}),
        lambda d: json.dumps({**d, "cells": 3}),
        lambda d: json.dumps({**d, "quality": "good"}),
        lambda d: json.dumps({**d, "adaptation": {"curve": 1}}),
        lambda d: json.dumps({key: value for key, value in d.items() if key != "idle_w"}),
    ],
)
def test_what_was_kept_and_is_damaged_is_refused_in_a_line(quick: TokenOptions, damage: Any) -> None:
    document = keep(quick)
    partial_of(quick).write_text(damage(document))
    with pytest.raises(ProfileError, match=r"damaged .*delete it") as refused:
        measure(quick)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("window_s", [0.0, -1.0, float("nan"), 61.0])
def test_a_window_that_measures_nothing_is_refused(window_s: float) -> None:
    with pytest.raises(ValueError, match="--window-s must lie in"):
        TokenOptions(size="small", device="cpu", out=Path("x.json"), window_s=window_s)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m moe.profiling", *map(str, arguments)])
    cli()


def test_json_has_the_documented_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, H200, "--json")
    shown = json.loads(capsys.readouterr().out)
    profile = load_token_profile(H200)
    assert shown.keys() == {
        "quality_by_k", "quality_by_bias", "energy_per_token_by_k", "energy_per_token_by_bias",
        "cost", "quality",
    }  # fmt: skip
    assert {name: shown[name] for name in ("cost", "quality")} == profile.digests()
    assert list(shown["quality_by_k"]) == ["1", "2", "4", "8"]
    assert list(shown["quality_by_bias"]["32"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    cell = next(
        c for c in profile.cost.cells
        if (c.decode_rows, c.prefill_rows, c.context, c.top_k, c.readable) == (32, 0, 300, 8, 16)
    )  # fmt: skip
    assert cell.energy_j is not None
    assert shown["energy_per_token_by_bias"]["32"]["1.0"] == cell.energy_j / 32
    assert shown["energy_per_token_by_k"]["8"]["2"] < shown["energy_per_token_by_k"]["8"]["8"]


def test_a_profile_is_shown_in_words_and_others_have_no_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, H200)
    shown = capsys.readouterr().out
    assert "NVIDIA H200, base" in shown and "mJ per token by routing bias, 32 sequences: 0: 9.77" in shown
    with pytest.raises(SystemExit, match="--json is for profiles of tokens"):
        run(monkeypatch, H200.with_name("h100-vision.json"), "--json")
    with pytest.raises(SystemExit, match="is no profile"):
        run(monkeypatch, tmp_path / "absent.json")
    odd = tmp_path / "odd.json"
    odd.write_text('{"kind": "generate"}')
    with pytest.raises(SystemExit, match="cost: Field required"):
        run(monkeypatch, odd)


def test_a_card_that_is_not_there_and_a_place_that_cannot_be_written_are_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="IsADirectoryError"):
        run(monkeypatch, "tokens", "--size", "small", "--device", "cpu", "--out", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
            run(monkeypatch, "tokens", "--size", "small", "--device", "cuda", "--out", tmp_path / "x.json")
