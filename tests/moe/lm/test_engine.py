"""Steps of token rows against a plain decoder, and how they choose experts.

The tests marked gpu hold the Triton kernels, captured as graphs, against the same plain decoder.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.lm.config import readable_experts
from moe.lm.engine import ops
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows, StepInput
from tests.conftest import no_host_wait
from tests.moe.lm.plain_decoder import (
    TINY,
    make_model,
    make_tokens,
    plain_losses,
    plain_readable,
    plain_top,
)

ALL = TINY.n_experts


def make_engine(tokens: Tensor, device: str = "cpu", **kwargs) -> Engine:
    """An engine over a tiny model, captured on a card."""
    engine = Engine(make_model(TINY, device), tokens.numpy(), max_rows=48, slots=8, **kwargs)
    engine.capture()
    return engine


def rows(*spans: tuple[int, int, int, int]) -> Rows:
    """Rows of (slot, document, first, last) spans of positions."""
    parts = [
        [np.full(last - first, value, np.int32) for value in (slot, document)]
        for slot, document, first, last in spans
    ]
    return Rows(
        slot=np.concatenate([part[0] for part in parts]),
        document=np.concatenate([part[1] for part in parts]),
        position=np.concatenate([np.arange(first, last, dtype=np.int32) for _, _, first, last in spans]),
    )


def losses(engine: Engine, tokens: Tensor, prompt: int, chunk: int, top_k: int, readable: int) -> np.ndarray:
    """Losses of all positions: prompts in chunks, one sequence after the other, then all decode in step."""
    n, length = len(tokens), tokens.shape[1] - 1
    slots = [engine.reserve(length) for _ in range(n)]
    found = np.zeros((n, length), np.float32)
    for document, slot in enumerate(slots):
        for first in range(0, prompt, chunk):
            last = min(prompt, first + chunk)
            step = engine.launch(rows((slot, document, first, last)), TINY.top_k, ALL)
            found[document, first:last] = step.answers()[3]
    for position in range(prompt, length):
        spans = [(slot, document, position, position + 1) for document, slot in enumerate(slots)]
        found[:, position] = engine.launch(rows(*spans), top_k, readable).answers()[3]
    for slot in slots:
        engine.release(slot)
    return found


@pytest.mark.parametrize(("top_k", "readable"), [(4, 8), (2, 8), (1, 8), (4, 5), (2, 3)])
def test_each_token_has_the_loss_of_a_plain_decoder(top_k: int, readable: int) -> None:
    tokens = make_tokens(3, 13)
    engine = make_engine(tokens)
    with torch.no_grad():
        expected = plain_losses(engine.model, tokens, 8, top_k, readable)
    found = losses(engine, tokens, 8, 3, top_k, readable)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_chunks_cache_and_whole_sequences_agree() -> None:
    tokens = make_tokens(2, 141)  # three blocks of keys and values
    engine = make_engine(tokens)
    with torch.no_grad():
        x, _ = engine.model(tokens[:, :-1].long())
        whole = torch.nn.functional.cross_entropy(
            engine.model.logits(x).movedim(-1, 1), tokens[:, 1:].long(), reduction="none"
        )
    for prompt, chunk in ((100, 48), (100, 7), (1, 1)):
        np.testing.assert_allclose(losses(engine, tokens, prompt, chunk, 4, ALL), whole, rtol=1e-4, atol=1e-4)


def test_prompts_ride_beside_decode_rows_and_disturb_nobody() -> None:
    tokens = make_tokens(3, 61)
    engine = make_engine(tokens)
    alone = losses(engine, tokens, 40, 40, 4, ALL)
    first, second = engine.reserve(60), engine.reserve(60)
    engine.launch(rows((first, 2, 0, 40)), 4, ALL)
    for position in range(40, 60):  # the second's prompt goes in two by two while the first decodes
        start = 2 * (position - 40)
        step = engine.launch(rows((first, 2, position, position + 1), (second, 0, start, start + 2)), 4, ALL)
        np.testing.assert_allclose(
            step.answers()[3], [alone[2, position], *alone[0, start : start + 2]], rtol=1e-4, atol=1e-4
        )


def test_a_sequence_finds_the_same_in_other_blocks_and_beside_others() -> None:
    tokens = make_tokens(3, 141)
    engine = make_engine(tokens, cache_positions=8 * 64)
    before = losses(engine, tokens[:1], 70, 48, 4, ALL)
    gone = engine.reserve(60)
    kept = engine.reserve(60)
    engine.release(gone)
    np.testing.assert_allclose(losses(engine, tokens[:1], 70, 48, 4, ALL), before, rtol=1e-5, atol=1e-5)
    engine.release(kept)
    np.testing.assert_allclose(losses(engine, tokens[:2], 70, 48, 4, ALL)[:1], before, rtol=1e-4, atol=1e-4)
    assert engine.blocks.free_blocks == 8 and engine.blocks.free_slots == 8


def test_knobs_turned_between_steps_take_effect_in_the_next() -> None:
    tokens = make_tokens(4, 25)
    engine = make_engine(tokens)
    slots = [engine.reserve(24) for _ in range(4)]
    for slot in slots:
        engine.launch(rows((slot, slot, 0, 8)), 4, ALL)
    engine.usage()
    read = []
    for position, (top_k, readable) in enumerate(((4, 8), (1, 8), (4, 4)), start=8):
        engine.launch(rows(*((slot, slot, position, position + 1) for slot in slots)), top_k, readable)
        tokens_per_expert, reads = engine.usage()
        assert tokens_per_expert.sum(axis=1).tolist() == [4 * top_k] * TINY.n_layers
        assert ((tokens_per_expert > 0) == (reads > 0)).all()
        read.append(reads.sum() / TINY.n_layers)
    assert read[0] > 4 and read[1] <= 4 and read[2] == 4


def test_the_mix_between_two_expert_counts_is_what_each_had_at_its_steps() -> None:
    """Experts per token switched in the middle of an answer: each step is that of its own count."""
    tokens = make_tokens(1, 25)
    engine = make_engine(tokens)
    slot = engine.reserve(24)
    engine.launch(rows((slot, 0, 0, 8)), 4, ALL)
    half = [engine.launch(rows((slot, 0, p, p + 1)), 2, ALL).answers()[3, 0] for p in range(8, 16)]
    with torch.no_grad():
        expected = plain_losses(engine.model, tokens, 8, 2, ALL)[0, 8:16]
    np.testing.assert_allclose(half, expected, rtol=1e-4, atol=1e-4)
    whole = [engine.launch(rows((slot, 0, p, p + 1)), 4, ALL).answers()[3, 0] for p in range(8, 16)]
    np.testing.assert_allclose(whole, losses(engine, tokens, 24, 24, 4, ALL)[0, 8:16], rtol=1e-4, atol=1e-4)


def control(n_rows: int, top_k: int, readable: int, total: int) -> StepInput:
    return StepInput.of(torch.tensor([n_rows, top_k, readable, *[0] * 3 * total], dtype=torch.int32))


def select(logits: Tensor, top_k: int, readable: int, penalty: Tensor | None = None) -> list[list[int]]:
    """Experts that each token chose."""
    n, e = logits.shape
    demand, counts = torch.zeros(e), torch.zeros(e, dtype=torch.int32)
    lists = torch.zeros(e, n, dtype=torch.int32)
    step, held = control(n, top_k, readable, n), torch.ones(e, dtype=torch.int32)
    ops.demand_of(logits, step, demand, 4)
    ops.select(logits, step, demand, torch.zeros(e) if penalty is None else penalty, held, counts, lists, 4)
    chosen: list[list[int]] = [[] for _ in range(n)]
    for expert in range(e):
        for pair in lists[expert, : counts[expert]].tolist():
            chosen[pair // 4].append(expert)
    return chosen


def test_experts_are_chosen_among_those_in_most_demand_as_by_a_plain_ranking() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    for top_k, readable in ((4, 8), (4, 6), (2, 3), (1, 2)):
        allowed = plain_readable(logits, top_k, readable)
        for row, found in zip(logits.tolist(), select(logits, top_k, readable), strict=True):
            best = [e for e in plain_top(row, 8) if e in allowed][:top_k]
            assert found == sorted(best)


def test_a_penalty_moves_tokens_away_and_is_none_where_all_may_be_read() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    wanted = plain_readable(logits, 2, 4)
    penalty = torch.zeros(8).index_fill(0, torch.tensor(wanted[:1]), 100.0)
    assert all(wanted[0] not in chosen for chosen in select(logits, 2, 4, penalty))
    assert select(logits, 2, 8, penalty) == select(logits, 2, 8)


def test_more_bias_reads_a_subset() -> None:
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(6))
    sets = [set(plain_readable(logits, 2, readable_experts(bias, 8, 2))) for bias in np.linspace(0, 1, 11)]
    assert all(more <= less for less, more in pairwise(sets))
    assert [readable_experts(bias, 64, 8) for bias in (0.0, 0.5, 1.0)] == [64, 40, 16]
    assert readable_experts(1.0, 16, 8) == 8


def test_rows_behind_the_last_count_nowhere() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    demand, counts, lists = (
        torch.zeros(8),
        torch.zeros(8, dtype=torch.int32),
        torch.zeros(8, 5, dtype=torch.int32),
    )
    step = control(3, 2, 8, 5)
    ops.demand_of(logits, step, demand, 4)
    weights = ops.select(logits, step, demand, torch.zeros(8), torch.ones(8), counts, lists, 4)
    assert counts.sum() == 6 and (weights[3:] == 0).all() and (weights[:3, 2:] == 0).all()


@pytest.mark.parametrize(
    ("top_k", "readable", "message"),
    [
        (5, 8, "top_k must be 1 to 4"),
        (0, 8, "top_k must be 1 to 4"),
        (2, 1, "readable must be 2 to 8"),
        (2, 9, "readable"),
    ],
)
def test_knobs_out_of_range_are_refused(top_k: int, readable: int, message: str) -> None:
    engine = make_engine(make_tokens(1, 9))
    with pytest.raises(ValueError, match=message):
        engine.launch(rows((engine.reserve(8), 0, 0, 4)), top_k, readable)


def test_a_cache_or_text_that_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no sequence of 140 positions"):
        make_engine(make_tokens(1, 141), cache_positions=100)
    with pytest.raises(ValueError, match="use its own tokenizer"):
        make_engine(torch.full((1, 9), 512))
    with pytest.raises(ValueError, match="dense"):
        Engine(make_model(TINY.dense()), make_tokens(1, 9).numpy())
    engine = make_engine(make_tokens(1, 9))
    assert not engine.blocks.has_room(65)  # one block per slot is all that documents of 8 positions need
    with pytest.raises(RuntimeError, match="no room for a sequence of 65 positions"):
        engine.reserve(65)
    slot = engine.reserve(8)
    engine.release(slot)
    with pytest.raises(RuntimeError, match="is free already"):
        engine.release(slot)
    assert engine.blocks.free_slots == 8 and engine.blocks.free_blocks == engine.blocks.n_blocks
    with pytest.raises(ValueError, match="1 to 48 rows"):
        engine.launch(rows((0, 0, 0, 0)), 4, ALL)


# On a card


@pytest.mark.gpu
@pytest.mark.parametrize(("top_k", "readable"), [(4, 8), (2, 8), (1, 8), (4, 5), (2, 3)])
def test_captured_kernels_give_each_token_the_loss_of_a_plain_decoder(top_k: int, readable: int) -> None:
    tokens = make_tokens(3, 13)
    engine = make_engine(tokens, "cuda")
    with torch.no_grad():
        expected = plain_losses(make_model(TINY), tokens, 8, top_k, readable)
    found = losses(engine, tokens, 8, 3, top_k, readable)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_captured_kernels_agree_with_torch_operators_on_long_and_mixed_rows() -> None:
    tokens = make_tokens(3, 141)
    on_cpu, on_card = make_engine(tokens), make_engine(tokens, "cuda")
    for readable in (8, 5):
        np.testing.assert_allclose(
            losses(on_card, tokens, 100, 48, 2, readable),
            losses(on_cpu, tokens, 100, 48, 2, readable),
            rtol=2e-3,
            atol=2e-3,
        )
    for (a, b), (c, d) in zip(on_cpu.usage(), on_card.usage(), strict=True):
        np.testing.assert_allclose(
            np.stack([a, b]), np.stack([c, d]), atol=4
        )  # choices on the edge may differ


@pytest.mark.gpu
def test_launching_a_step_never_makes_the_host_wait() -> None:
    tokens = make_tokens(3, 61)
    engine = make_engine(tokens, "cuda")
    engine.launch(rows((engine.reserve(60), 0, 0, 40)), 4, ALL).answers()
    with no_host_wait():
        slot = engine.reserve(60)
        step = engine.launch(rows((0, 0, 40, 41), (slot, 1, 0, 30)), 2, 5)
    assert step.answers().shape == (4, 31)
