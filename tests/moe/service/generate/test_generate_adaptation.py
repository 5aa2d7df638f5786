"""The live service of tokens that adapts: what it learns from, what it counts, and that it can be undone."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import torch

from moe.lm.adapt import HeadAdapter, HeadSettings
from moe.service.generate.live import GenerateWorkload
from moe.workload import Knobs, WorkStats
from tests.moe.service.generate.test_generate_live import STANDARD, make_workload, texts

ROWS = 64
SETTINGS = HeadSettings(lesson_rows=ROWS, rate=0.3, damping=0.1)
ADAPTING = replace(STANDARD, ttt_steps=2)


def adapting(load: float = 3.0, settings: HeadSettings = SETTINGS) -> tuple[GenerateWorkload, HeadAdapter]:
    workload = make_workload(load, adapts=settings)
    workload.reset(3)
    assert workload.engine.adapter is not None
    return workload, workload.engine.adapter


def bits(adapter: HeadAdapter) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in adapter.snapshot().tensors]


def plain(stats: WorkStats) -> dict[str, object]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(stats).items()
    }


def test_no_request_is_lost_where_the_service_adapts_between_steps() -> None:
    workload, _ = adapting(6.0)
    waiting = np.zeros(2)
    for second in range(6):
        stats = workload.run(replace(STANDARD, ttt_steps=second % 3), 1.0)
        arrived, answered, expired = map(np.array, (stats.arrived, stats.answered, stats.expired))
        np.testing.assert_array_equal(arrived + waiting, answered + expired + np.array(stats.waiting))
        waiting = np.array(stats.waiting)
        assert (stats.ttt_steps > 0) == (second % 3 > 0)
        assert 0.0 <= stats.ttt_busy_s <= stats.busy_s


def test_every_row_inside_a_prompt_teaches_until_its_lesson_is_whole() -> None:
    workload, adapter = adapting()
    seen: list[tuple[int, int]] = []
    collect = adapter.collect

    def spy(stream: torch.Tensor, rows: np.ndarray, document: np.ndarray, target: np.ndarray) -> bool:
        seen.extend(zip(document.tolist(), target.tolist(), strict=True))
        assert len(stream) > rows.max(initial=-1)
        return collect(stream, rows, document, target)

    adapter.collect = spy  # type: ignore[method-assign]
    stats = [workload.run(ADAPTING, 1.0) for _ in range(4)]
    while workload._sequences.running:
        stats.append(workload.run(ADAPTING, 1.0, open_classes=0))
    requests = sum(sum(row.answered) for row in stats)
    assert (
        len(seen) == sum(row.prefill_tokens for row in stats) - requests
    )  # the last row's token is an answer's
    assert all(target in texts().tokens[document, 1:] for document, target in seen)
    asked = sum(row.ttt_steps + row.ttt_left_out for row in stats)
    assert 0 < asked <= 2 * len(seen) / ROWS and asked % 2 == 0


def test_a_service_that_is_reset_serves_the_same_bits_again_and_another_is_not_needed() -> None:
    workload, adapter = adapting()
    fresh = bits(adapter)
    first = [plain(workload.run(ADAPTING, 1.0)) for _ in range(4)]
    learned = bits(adapter)
    assert learned != fresh
    workload.reset(3)
    assert bits(adapter) == fresh
    # Clocks go on, so times may differ in their last digits; what was answered does not.
    again = [plain(workload.run(ADAPTING, 1.0)) for _ in range(4)]
    assert bits(adapter) == learned
    for before, after in zip(first, again, strict=True):
        for name in ("answered", "right_tokens", "output_tokens", "ttt_steps", "ttt_rolled_back", "batches"):
            assert before[name] == after[name], name


def test_without_steps_no_bit_of_the_adapter_moves_and_the_answers_are_the_models() -> None:
    workload, adapter = adapting()
    before = bits(adapter)
    stats = [workload.run(STANDARD, 1.0) for _ in range(4)]
    assert bits(adapter) == before
    assert sum(row.ttt_steps + row.ttt_busy_s for row in stats) == 0
    assert [row.right_tokens for row in stats] == [row.reference_tokens for row in stats]


def test_adaptation_takes_its_share_of_the_pace() -> None:
    workload, _ = adapting(6.0)
    knobs = Knobs(batch_size=16, expert_count=4, pace=0.5, ttt_steps=2)
    busy = [workload.run(knobs, 1.0).busy_s for _ in range(4)]
    assert max(busy[1:]) <= 0.5 + 0.03
