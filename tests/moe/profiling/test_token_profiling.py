"""What a profile of tokens holds, measured on a CPU: quality and cost."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch

from moe.lm.config import readable_experts
from moe.lm.engine.engine import Engine
from moe.profiling import token_quality
from moe.profiling.token_cost import BIASES, MORE_BIASES, Place, measure_place, places, read_texts, rows_of
from moe.profiling.token_quality import (
    Passages,
    measure_token_quality,
    passages,
    score,
    standard_by_position,
)
from moe.service.generate.sequences import Texts
from moe.token_profile import QualityCell
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens

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


@cache
def measured() -> dict[tuple[int, int, float], QualityCell]:
    """One sequence alone and groups of three, at all biases."""
    return quality({1: 6, 3: 2})


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
    cells, text = measured(), torch.from_numpy(texts().tokens)
    for top_k, running in itertools.product((4, 2, 1), (1, 3)):
        logits, decisions = whole_window(text, top_k), chosen(top_k)
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
            assert of.experts_read == pytest.approx(experts_read(decisions, running, *place))
        assert cell.tokens == 12 * TOKENS
        assert cell.standard_error == pytest.approx(np.concatenate(gaps).std(ddof=1) / 12**0.5)
        for of_cell, values in ((cell.confidence, p.amax(dim=-1)), (cell.entropy, entropy)):
            assert of_cell == pytest.approx(
                np.mean([values[place].mean() for place in at.values()]), rel=1e-4
            )
        for name in ("accuracy", "minus_standard", "experts_read"):
            means = [getattr(of, name) for of in cell.by_domain.values()]
            assert getattr(cell, name) == pytest.approx(np.mean(means))


@cache
def chosen(top_k: int) -> list[np.ndarray]:
    """Experts of every position by layer, from one pass over whole documents.  # [N, S, k] each."""
    _, decisions = make_model(TINY)(torch.from_numpy(texts().tokens)[:, :-1].long(), top_k)
    return [d.experts.view(DOCUMENTS, LENGTH, top_k).numpy() for d in decisions]


def experts_read(
    decisions: list[np.ndarray], running: int, document: np.ndarray, position: np.ndarray
) -> float:
    """Different experts of a group at a step, mean over steps, groups and layers."""
    steps = [
        experts[document[g : g + running, 0], position[g : g + running, t]]
        for experts in decisions for g in range(0, len(document), running) for t in range(TOKENS)
    ]  # fmt: skip
    return float(np.mean([len(np.unique(step)) for step in steps]))


def test_at_the_trained_top_k_nothing_is_lost() -> None:
    cell, parts = measured()[1, 4, 0.0], scored(1, 6)
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
    together = measured()
    assert {bias for n, top_k, bias in together if (n, top_k) == (3, 4)} == {0.0, 0.25, 0.5, 0.75}
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
