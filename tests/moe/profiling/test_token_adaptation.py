"""What is measured of a head that learns: scores, rates, changes and the price, on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.lm.adapt import HeadSettings
from moe.lm.engine.engine import Engine
from moe.profiling.token_adaptation import (
    TOGETHER,
    adapter_of,
    fitted_rate,
    measure_adaptation,
    read,
    with_unadapted,
)
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens

LENGTH, ROWS = 64, 128
DOMAIN = np.repeat([0, 1], TOGETHER)  # both halves of the documents have both
SETTINGS = HeadSettings(lesson_rows=ROWS, rate=2.0, damping=0.1)


def text() -> np.ndarray:
    """The first half is random; the second holds three tokens only, which a head can learn."""
    tokens = make_tokens(len(DOMAIN), LENGTH + 1).numpy().copy()
    few = tokens[DOMAIN == 1]
    tokens[DOMAIN == 1] = few % 3
    return tokens


def make_engine() -> Engine:
    return Engine(make_model(TINY), text(), slots=2 * TOGETHER, max_rows=ROWS, adapts=SETTINGS)


def test_reading_scores_every_token_as_one_pass_does_and_learns_only_where_it_is_asked_to() -> None:
    engine, tokens, model = make_engine(), text(), make_model(TINY)
    chosen = np.flatnonzero(DOMAIN == 1)
    found = read(engine, tokens, chosen, steps=0)
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(tokens[chosen, :-1]).long())[0])
    target = torch.from_numpy(tokens[chosen, 1:]).long()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert found.loss.mean() == pytest.approx(float(loss), rel=1e-4)
    assert found.right.mean() == pytest.approx(float((logits.argmax(-1) == target).float().mean()))
    assert sorted(found.target.tolist()) == sorted(target.flatten().tolist())
    assert adapter_of(engine).lessons == 0 and engine.blocks.free_slots == 2 * TOGETHER
    asked: list[int] = []
    read(engine, tokens, chosen, 1, lambda: asked.append(0) or len(asked) < 3)  # type: ignore[func-returns-value]
    assert len(asked) == 3 and engine.blocks.free_slots == 2 * TOGETHER
    assert 0 < adapter_of(engine).lessons <= 3 * 2


def test_a_domain_that_can_be_learned_is_and_the_engine_is_left_unadapted() -> None:
    engine = make_engine()
    fresh = engine.adapter and [tensor.clone() for tensor in engine.adapter.snapshot().tensors]
    found = measure_adaptation(
        engine, text(), DOMAIN, ("random", "few", "absent"), TOGETHER, None, None, {"seed": 0}
    )
    assert tuple(found.rate) == tuple(found.changed) == ("random", "few")
    assert found.lesson_rows == ROWS and found.lesson_s > 0.0 and found.lesson_j is None
    learned = found.changed["few"]["few"]
    assert learned.loss < -0.1 and learned.accuracy > 0.1
    assert abs(found.changed["random"]["random"].loss) < 0.05
    assert 0.0 < found.rate["few"] <= 1.0
    assert found.error["points"] == 4 and found.error["loss_rmse"] < abs(learned.loss)
    assert found.provenance == {"seed": 0, "documents": TOGETHER}
    assert engine.adapter is not None
    for tensor, before in zip(engine.adapter.snapshot().tensors, fresh or [], strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_a_rate_is_found_whatever_is_gained(rate: float) -> None:
    for gain in (-0.1, 0.02):
        curve = [(n, gain * (1 - (1 - rate) ** n)) for n in (0, 1, 2, 4, 8, 20)]
        assert fitted_rate(curve) == pytest.approx(rate, abs=1e-3)


def test_the_unadapted_head_changes_nothing() -> None:
    table = np.ones((2, 2, 4))
    assert with_unadapted(table).shape == (2, 3, 4) and not with_unadapted(table)[:, 0].any()
    assert with_unadapted(table[..., 0]).tolist() == [[0.0, 1.0, 1.0]] * 2
