"""What the head learns from prompts, against autograd; its guard; and that all of it can be undone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.adapt import HeadAdapter, HeadCounters, HeadSettings, NothingToLearnError
from moe.lm.config import FIRST_TRUST, SIZES
from moe.lm.engine.engine import Engine
from moe.lm.model import LanguageModel
from moe.lm.text import DOMAINS, documents
from moe.lm.weights import load_model
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens
from tests.moe.lm.test_engine import losses, make_engine

ROWS = 48
SETTINGS = HeadSettings(lesson_rows=ROWS, rate=0.5, damping=0.1, most_change=1e6)


def make_adapter(settings: HeadSettings = SETTINGS) -> tuple[LanguageModel, HeadAdapter]:
    model = make_model(TINY)
    return model, HeadAdapter(model, settings)


def a_stream(seed: int, n: int = ROWS) -> tuple[Tensor, np.ndarray]:
    """Rows of a stream and the tokens behind them."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(n, TINY.d_model, generator=generator)
    return stream, torch.randint(TINY.vocabulary, (n,), generator=generator).numpy()


def teach(adapter: HeadAdapter, seed: int, document: int = 0) -> bool:
    stream, target = a_stream(seed)
    return adapter.collect(stream, np.arange(ROWS), np.full(ROWS, document), target)


def bits(adapter: HeadAdapter) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in adapter.snapshot().tensors]


def test_a_step_is_the_gradient_of_the_loss_over_the_streams_second_moment() -> None:
    model, adapter = make_adapter()
    assert teach(adapter, 0, document=4)
    assert adapter.learn(1) == 1
    stream, target = a_stream(0)
    head = adapter.heads[0].clone().requires_grad_()  # the half of the document: not taught
    F.cross_entropy(stream @ head.T, torch.from_numpy(target)).backward()
    moment = torch.stack([torch.outer(row, row) for row in stream]).mean(dim=0)
    moment += 0.1 * moment.diagonal().mean() * torch.eye(TINY.d_model)
    assert model.head is not None and head.grad is not None
    expected = model.head.weight - FIRST_TRUST * 0.5 * torch.linalg.solve(moment, head.grad.T).T
    torch.testing.assert_close(adapter.heads[1], expected, rtol=1e-4, atol=1e-5)


def test_no_document_is_answered_by_what_was_learned_from_its_half() -> None:
    model, adapter = make_adapter()
    assert model.head is not None
    teach(adapter, 0, document=7)
    adapter.learn(2)
    assert torch.equal(adapter.heads[1], model.head.weight)
    stream, _ = a_stream(1)
    document = torch.arange(ROWS) % 4
    logits = adapter.logits(stream, document)
    for row in range(ROWS):
        expected = adapter.heads[row % 2] @ stream[row]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_what_a_step_does_to_the_logits_is_bounded() -> None:
    model, adapter = make_adapter(HeadSettings(lesson_rows=ROWS, rate=1e4, most_change=0.3))
    teach(adapter, 0)
    adapter.learn(1)
    stream, _ = a_stream(0)
    assert model.head is not None
    moved = (stream @ (adapter.heads[1] - model.head.weight).T).square().sum(dim=1).mean().sqrt()
    assert float(moved) == pytest.approx(FIRST_TRUST * 0.3, rel=1e-3)


def test_a_lesson_is_whole_when_its_half_has_all_rows_and_none_is_learned_before() -> None:
    _, adapter = make_adapter()
    stream, target = a_stream(0)
    halves = np.arange(ROWS) % 2
    assert not adapter.collect(stream, np.arange(ROWS), halves, target)
    before = bits(adapter)
    with pytest.raises(NothingToLearnError, match=f"{ROWS} rows of prompts, and at most {ROWS // 2}"):
        adapter.learn(1)
    assert bits(adapter) == before
    assert adapter.collect(stream, np.arange(ROWS), halves, target)
    assert adapter.learn(2) == 4  # on both halves
    assert adapter.counters == HeadCounters(steps=4)


def test_reset_equals_fresh_and_a_snapshot_comes_back_bit_for_bit() -> None:
    _, adapter = make_adapter()
    fresh = bits(adapter)
    teach(adapter, 0)
    adapter.learn(2)
    teach(adapter, 1, document=1)
    saved, before = adapter.snapshot(), bits(adapter)
    adapter.learn(1)
    after = bits(adapter)
    assert after != before
    adapter.restore(saved)
    assert bits(adapter) == before
    adapter.learn(1)
    assert bits(adapter) == after
    adapter.reset()
    assert bits(adapter) == fresh


def test_a_head_that_answers_worse_than_the_unadapted_one_goes_back() -> None:
    model, adapter = make_adapter(HeadSettings(lesson_rows=ROWS, rate=50.0, most_change=1e6))
    assert model.head is not None
    teach(adapter, 0, document=0)
    adapter.learn(2)  # far too fast: what it answers is noise
    assert not torch.equal(adapter.heads[1], model.head.weight)
    teach(adapter, 1, document=1)  # the first rows that it answers
    adapter.learn(1)
    assert torch.equal(adapter.heads[1], model.head.weight)
    assert adapter.counters.rolled_back == 1


def test_a_head_that_is_far_worse_goes_back_before_the_lesson_is_whole() -> None:
    settings = HeadSettings(lesson_rows=ROWS, check_rows=12, rate=50.0, most_change=1e6)
    model, adapter = make_adapter(settings)
    assert model.head is not None
    teach(adapter, 0, document=0)
    adapter.learn(2)
    (stream, target), odd = a_stream(1), np.ones(ROWS, int)
    assert not adapter.collect(stream, np.arange(11), odd[:11], target[:11])
    assert adapter.collect(stream, np.arange(11, 13), odd[:2], target[11:13])
    assert adapter.whole == 0 and adapter.learn(2) == 0  # no step: the lesson goes on
    assert torch.equal(adapter.heads[1], model.head.weight)
    assert adapter.counters.rolled_back == 1
    with pytest.raises(NothingToLearnError):  # what was checked is not checked again
        adapter.learn(1)
    mild = HeadSettings(lesson_rows=ROWS, check_rows=12, rate=50.0, most_change=1e6, alarm=1e6)
    _, adapter = make_adapter(mild)
    teach(adapter, 0, document=0)
    adapter.learn(2)
    learned = adapter.heads.clone()
    assert adapter.collect(stream, np.arange(12), odd[:12], target[:12])
    adapter.learn(1)
    assert torch.equal(adapter.heads, learned) and adapter.counters.rolled_back == 0


def test_numbers_that_are_not_finite_are_left_out_and_forgotten() -> None:
    model, adapter = make_adapter()
    assert model.head is not None
    teach(adapter, 0)
    adapter.learn(1)
    learned = adapter.heads.clone()
    stream, target = a_stream(1)
    stream[3, 5] = torch.nan
    adapter.collect(stream, np.arange(ROWS), np.zeros(ROWS, int), target)
    adapter.learn(2)
    assert adapter.counters.left_out == 2 and torch.equal(adapter.heads[1], learned[1])
    teach(adapter, 2)
    adapter.learn(1)
    assert adapter.heads.isfinite().all() and not torch.equal(adapter.heads[1], learned[1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_engine_that_may_adapt_answers_as_one_that_cannot_until_it_does(device: str) -> None:
    tokens = make_tokens(3, 13)
    plain, adapting = (make_engine(tokens, device, adapts=adapts) for adapts in (None, SETTINGS))
    expected = losses(plain, tokens, 8, 3, 4, 8)
    np.testing.assert_allclose(losses(adapting, tokens, 8, 3, 4, 8), expected, rtol=1e-4, atol=1e-4)
    adapter = adapting.adapter
    assert adapter is not None
    stream, target = a_stream(0)
    adapter.collect(stream.to(adapter.heads), np.arange(ROWS), np.zeros(ROWS, int), target)
    adapting.learn(1)
    changed = losses(adapting, tokens, 8, 3, 4, 8)
    assert (np.abs(changed[1] - expected[1]) > 1e-3).any()
    np.testing.assert_allclose(changed[::2], expected[::2], rtol=1e-4, atol=1e-4)
    adapting.reset()
    np.testing.assert_allclose(losses(adapting, tokens, 8, 3, 4, 8), expected, rtol=1e-4, atol=1e-4)


def test_an_engine_built_without_adaptation_refuses_to_learn() -> None:
    engine = Engine(make_model(TINY), make_tokens(3, 13).numpy(), max_rows=48, slots=8)
    with pytest.raises(ValueError, match="does not adapt"):
        engine.learn(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lesson_rows": 0}, "lesson_rows must be at least 1"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"damping": float("nan")}, "damping must be above 0"),
        ({"most_change": float("inf")}, "most_change must be above 0 and finite"),
        ({"margin": -0.1}, "margin must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSettings(**values)


def test_text_that_has_moved_to_logs_costs_the_small_model_at_least_5_percent_fewer_bits() -> None:
    model, text = load_model("small", "cpu"), documents()
    assert model.config == SIZES["small"][0]
    adapter = HeadAdapter(model)
    logs = np.flatnonzero(text.domain == DOMAINS.index("logs"))[:16]
    served, unadapted = [], []
    with torch.no_grad():
        read, _ = model(torch.from_numpy(text.tokens[logs, :-1].astype(np.int64)))
    for position in range(0, 1024, 256):  # 16 logs side by side; each answered before it teaches
        stream = read[:, position : position + 256].flatten(0, 1)
        target = text.tokens[logs, position + 1 : position + 257].astype(np.int64).flatten()
        document = logs.repeat(256)
        for start in range(0, len(stream), 512):
            part = slice(start, start + 512)
            wanted = torch.from_numpy(target[part])
            answered = adapter.logits(stream[part], torch.from_numpy(document[part]))
            served.append(F.cross_entropy(answered, wanted))
            unadapted.append(F.cross_entropy(model.logits(stream[part]), wanted))
            if adapter.collect(stream[part], np.arange(512), document[part], target[part]):
                adapter.learn(1)
    late = len(served) // 2  # behind 21 KB of logs
    assert float(torch.stack(served[late:]).mean() / torch.stack(unadapted[late:]).mean()) < 0.95
    assert adapter.counters.left_out == 0
