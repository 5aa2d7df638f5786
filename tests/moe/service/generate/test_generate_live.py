"""The live service of tokens, on a CPU with a clock of its own: who is served, when, with which tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from moe.lm.engine.engine import Engine
from moe.service.generate.lengths import TokenLengths, row_of
from moe.service.generate.live import GenerateWorkload
from moe.service.generate.sequences import Texts
from moe.service.traffic import TrafficConfig
from moe.workload import KnobRefusedError, Knobs
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens

DOCUMENTS = 6


class Clock:
    """Two milliseconds pass whenever it is read, so that a step takes as long."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 2e-3
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class Promises:
    ttft_s: tuple[float, float] = (0.2, 30.0)
    tpot_s: tuple[float, float] = (0.02, 1.0)
    deadline_s: tuple[float, float] = (5.0, 30.0)
    expire_after_s: tuple[float, float] = (3.0, 60.0)


STANDARD = Knobs(batch_size=16, expert_count=4)


def made_up_lengths(seed: int = 0) -> TokenLengths:
    generator = np.random.default_rng(seed)
    prompt, output = (generator.integers(1, most, 50).astype(np.int32) for most in (40, 20))
    return TokenLengths(prompt=prompt, output=output, factor=1.0, truncated=0, without_output=0)


@cache
def texts() -> Texts:
    """Documents of which every other token is what the model would say, and which tokens it predicts."""
    model, tokens = make_model(TINY), make_tokens(DOCUMENTS, 61)
    with torch.no_grad():
        for position in range(0, 60, 2):
            x, _ = model(tokens[:, : position + 1].long())
            tokens[:, position + 1] = model.logits(x[:, -1]).argmax(dim=-1)
        x, _ = model(tokens[:, :-1].long())
        return Texts(tokens.numpy(), (model.logits(x).argmax(dim=-1) == tokens[:, 1:]).numpy())


def make_workload(load: float = 1.0, promises: Promises | None = None, **kwargs) -> GenerateWorkload:
    """A service of about 150 steps per second; load 1.0 is 12 requests per second."""
    clock = Clock()
    engine = Engine(make_model(TINY), texts().tokens, slots=24, max_rows=32, clock=clock, **kwargs)
    traffic = TrafficConfig(kind="poisson", low_load=load, high_load=load, shifts=(0, 1), shift_dwell_s=2.0)
    return GenerateWorkload(
        engine, texts(), np.arange(DOCUMENTS) % 2, made_up_lengths(),
        traffic, 12.0, 20.0, promises or Promises(), clock=clock, sleep=clock.sleep,
    )  # fmt: skip


KNOBS = (
    STANDARD,
    Knobs(batch_size=1, expert_count=1),
    Knobs(batch_size=24, expert_count=2, routing_bias=1.0),
    Knobs(batch_size=8, expert_count=4, routing_bias=0.5),
    Knobs(batch_size=16, expert_count=3, pace=0.5),
)


@pytest.mark.parametrize("load", [0.2, 1.0, 6.0])
def test_no_request_and_no_token_is_lost_under_any_knobs(load: float) -> None:
    workload = make_workload(load, Promises(expire_after_s=(1.0, 2.0), deadline_s=(0.9, 1.9)))
    workload.reset(3)
    waiting = np.zeros(2)
    for second in range(6):  # all knobs, and one twice
        knobs = replace(KNOBS[second * 7 % 5], admission=(1.0, 0.0, 0.5)[second % 3])
        stats = workload.run(knobs, 1.0)
        arrived, answered, expired = map(np.array, (stats.arrived, stats.answered, stats.expired))
        np.testing.assert_array_equal(arrived + waiting, answered + expired + np.array(stats.waiting))
        waiting = np.array(stats.waiting)
        assert stats.good <= stats.correct <= answered.sum()
        assert stats.right_tokens <= stats.output_tokens and stats.good_tokens <= stats.output_tokens
        assert stats.tokens_per_expert is not None and 0.0 <= stats.cache_share <= 1.0
        assert stats.tokens_per_expert.shape == (TINY.n_layers, TINY.n_experts)
        per_layer = stats.tokens_per_expert.sum(axis=1)
        tokens = per_layer / KNOBS[second * 7 % 5].expert_count
        # A row per prompt token, and one per output token but the first, which the prompt's last row gives.
        assert (tokens <= stats.prefill_tokens + stats.output_tokens).all()
        assert stats.latency_histogram.sum() == answered.sum()


def test_an_empty_service_has_its_whole_cache_and_served_every_token_that_was_asked_for() -> None:
    workload = make_workload(0.5)
    workload.reset(1)
    rows = [workload.run(STANDARD, 1.0) for _ in range(20)]
    while sum(rows[-1].waiting):  # the stream has ended
        rows.append(workload.run(STANDARD, 1.0))
    blocks = workload.engine.blocks
    assert blocks.free_blocks == blocks.n_blocks and blocks.free_slots == blocks.slots
    lengths, served = made_up_lengths(), np.zeros(2, int)
    for c in range(2):
        for number in range(int(sum(row.arrived[c] for row in rows))):
            row = row_of(np.uint64(1), c, number, 50)
            served += lengths.prompt[row], lengths.output[row]
    assert sum(row.expired[0] + row.expired[1] for row in rows) == 0
    assert sum(row.prefill_tokens for row in rows) == served[0]
    assert sum(row.output_tokens for row in rows) == served[1]


def test_at_the_trained_knobs_each_token_is_right_where_the_whole_document_says_so() -> None:
    workload = make_workload(1.0)
    workload.reset(2)
    stats = [workload.run(STANDARD, 1.0) for _ in range(3)]
    assert sum(row.reference_tokens for row in stats) > 0
    assert [row.right_tokens for row in stats] == [row.reference_tokens for row in stats]
    fewer = [workload.run(Knobs(batch_size=16, expert_count=1), 1.0) for _ in range(3)]
    assert sum(row.right_tokens for row in fewer) != sum(row.reference_tokens for row in fewer)


def test_deferrable_requests_get_the_places_that_admission_leaves_them() -> None:
    workload = make_workload(6.0)
    workload.reset(5)
    for admission, most in ((0.0, 0), (0.5, 8)):
        for _ in range(2):
            workload.run(replace(STANDARD, admission=admission), 1.0)
        assert workload._sequences.n_running[1] <= most
        assert workload._sequences.running <= 16
    held = workload.run(STANDARD, 1.0, open_classes=1)
    assert held.answered[1] <= 16  # those that ran already


def test_a_drained_service_admits_nobody_and_decodes_what_runs() -> None:
    workload = make_workload(6.0)
    workload.reset(5)
    waiting = np.array(workload.run(STANDARD, 1.0).waiting)
    running, admitted = workload._sequences.running, workload._next.copy()
    assert running > 0
    drained = [workload.run(STANDARD, 1.0, open_classes=0) for _ in range(4)]
    assert sum(sum(stats.answered) for stats in drained) == running and drained[-1].busy_s == 0.0
    assert workload._sequences.running == 0 and workload.engine.blocks.free_slots == 24
    np.testing.assert_array_equal(workload._next - admitted, np.sum([s.expired for s in drained], axis=0))
    for stats in (*drained, workload.run(STANDARD, 1.0)):
        arrived, answered, expired = map(np.array, (stats.arrived, stats.answered, stats.expired))
        np.testing.assert_array_equal(arrived + waiting, answered + expired + np.array(stats.waiting))
        waiting = np.array(stats.waiting)
    assert workload._sequences.running > 0


def test_pace_caps_the_busy_share() -> None:
    workload = make_workload(6.0)
    workload.reset(6)
    for pace in (1.0, 0.5, 0.2):
        busy = [workload.run(Knobs(batch_size=16, expert_count=4, pace=pace), 1.0).busy_s for _ in range(2)]
        assert busy[1] <= pace + 0.02


def test_late_answers_are_told_by_each_promise() -> None:
    for promises in (
        Promises(ttft_s=(1e-6, 1e-6)), Promises(tpot_s=(1e-9, 1e-9)), Promises(deadline_s=(1e-6, 1e-6)),
    ):  # fmt: skip
        workload = make_workload(0.5, promises)
        workload.reset(7)
        stats = [workload.run(STANDARD, 1.0) for _ in range(3)]
        late, answered = (sum(sum(getattr(row, name)) for row in stats) for name in ("late", "answered"))
        assert answered > 0 and late >= 0.8 * answered  # answers of one token have no time per token
        assert sum(row.good for row in stats) <= sum(row.correct for row in stats)


def test_a_full_cache_makes_requests_wait_and_loses_none() -> None:
    small = make_workload(3.0, cache_positions=4 * 64 + 128)
    small.reset(8)
    rows = [small.run(STANDARD, 1.0) for _ in range(5)]
    assert max(row.cache_share for row in rows) > 0.6
    assert sum(row.answered[0] for row in rows) > 0
    assert sum(map(sum, (row.arrived for row in rows))) == pytest.approx(
        sum(sum(row.answered) + sum(row.expired) for row in rows) + sum(rows[-1].waiting)
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (Knobs(batch_size=8, expert_count=8), "the model has 4 per token"),
        (Knobs(batch_size=99, expert_count=4), "places for 24"),
        (Knobs(batch_size=8, expert_count=4, ttt_steps=1), "does not adapt"),
        (Knobs(batch_size=8, expert_count=4, sm_clock=0.5), "sets no clocks"),
    ],
)
def test_knobs_that_cannot_be_applied_are_refused(knobs: Knobs, message: str) -> None:
    workload = make_workload()
    workload.reset(0)
    with pytest.raises(KnobRefusedError, match=message):
        workload.run(knobs, 1.0)
    with pytest.raises(ValueError, match="routing_bias"):
        Knobs(routing_bias=float("nan"))


def with_lengths(prompt: int, output: int, **engine) -> GenerateWorkload:
    """A service whose requests all have these tokens."""
    lengths = TokenLengths(
        prompt=np.array([prompt], np.int32), output=np.array([output], np.int32),
        factor=1.0, truncated=0, without_output=0,
    )  # fmt: skip
    clock = Clock()
    traffic = TrafficConfig(kind="poisson", low_load=1.0, high_load=1.0, shifts=(0, 1), shift_dwell_s=2.0)
    return GenerateWorkload(
        Engine(make_model(TINY), texts().tokens, slots=4, max_rows=32, clock=clock, **engine), texts(),
        np.arange(DOCUMENTS) % 2, lengths, traffic, 4.0, 6.0, Promises(), clock=clock, sleep=clock.sleep,
    )  # fmt: skip


def test_requests_longer_than_the_documents_and_domains_without_any_are_refused() -> None:
    with pytest.raises(ValueError, match="requests of 61 tokens do not fit documents of 60"):
        with_lengths(60, 1)
    with pytest.raises(ValueError, match="name domains without documents"):
        GenerateWorkload(
            Engine(make_model(TINY), texts().tokens, slots=4, max_rows=32), texts(),
            np.zeros(DOCUMENTS, int), made_up_lengths(), TrafficConfig(shifts=(0, 1)), 4.0, 6.0, Promises(),
        )  # fmt: skip


def test_a_cache_too_small_for_one_request_is_refused_and_one_that_holds_one_serves_them_in_turn() -> None:
    with pytest.raises(ValueError, match="hold no sequence of 60 positions: give the cache at least 64"):
        with_lengths(59, 1, cache_positions=63)
    workload = with_lengths(40, 20, cache_positions=64)
    workload.reset(0)
    rows = [workload.run(Knobs(batch_size=4, expert_count=4), 1.0) for _ in range(8)]
    arrived, answered, expired = (
        sum(sum(getattr(row, name)) for row in rows) for name in ("arrived", "answered", "expired")
    )
    assert answered > 0 and arrived == answered + expired + sum(rows[-1].waiting)


@pytest.mark.parametrize(("prompt", "output"), [(1, 1), (1, 59), (59, 1)])
def test_the_shortest_and_the_longest_requests_are_served_whole(prompt: int, output: int) -> None:
    workload = with_lengths(prompt, output)
    workload.reset(0)
    rows = [workload.run(Knobs(batch_size=4, expert_count=4), 1.0) for _ in range(6)]
    while sum(rows[-1].waiting):
        rows.append(workload.run(Knobs(batch_size=4, expert_count=4), 1.0))
    answered = sum(sum(row.answered) for row in rows)
    assert answered > 0 and sum(sum(row.arrived) for row in rows) == answered
    assert sum(row.prefill_tokens for row in rows) == prompt * answered
    assert sum(row.output_tokens for row in rows) == output * answered


def test_a_service_that_was_not_reset_says_so() -> None:
    workload = make_workload()
    with pytest.raises(RuntimeError, match="call reset"):
        workload.run(STANDARD, 1.0)
