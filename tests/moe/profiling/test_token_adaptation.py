"""What is measured of a head that learns: scores, rates, changes and the price, on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.lesson_fit import LessonFit
from moe.lm.adapt import HeadSettings
from moe.lm.engine.engine import Engine
from moe.profiling.token_adaptation import (
    TOGETHER,
    adapter_of,
    measure_adaptation,
    read,
)
from moe.token_profile import Learned, TokenAdaptation, Visit
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
    assert tuple(found.curve) == tuple(found.changed) == ("random", "few")
    assert found.lesson_rows == ROWS and found.lesson_s > 0.0 and found.lesson_j is None
    learned = found.changed["few"]["few"]
    assert learned.loss < -0.1 and learned.accuracy > 0.1
    assert abs(found.changed["random"]["random"].loss) < 0.05
    lessons, loss = zip(*found.curve["few"], strict=True)
    assert lessons[0] == loss[0] == 0.0 and list(lessons) == sorted(lessons)
    assert loss[-1] == learned.loss and min(loss) == pytest.approx(learned.loss, abs=0.05)
    assert [len(visits) for visits in found.visits] == [2, 2]
    fit = LessonFit(found)
    assert fit.error()["points"] == 4 and fit.error()["loss_rmse"] < abs(learned.loss)
    assert found.provenance == {"seed": 0, "documents": TOGETHER}
    assert engine.adapter is not None
    for tensor, before in zip(engine.adapter.snapshot().tensors, fresh or [], strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("gain", [-0.1, -0.003])
def test_a_rate_is_found_again_and_what_it_says_of_turns_is_a_recursion(rate: float, gain: float) -> None:
    """Played by hand: trust doubles while the head is better, and falls to a quarter where it goes back."""

    def play(order: list[int], trust: float = 0.25) -> list[float]:
        weight, found = 0.0, []
        for learned in order:  # of two domains; what the second's head says of the first is worse
            change = (gain if learned else -4.0 * gain) * weight
            if change > 0.005:
                weight, trust = 0.0, trust / 4.0
            elif change < -0.005:
                trust *= 2.0
            trust = min(1.0, max(trust, 1 / 64))
            left = (1.0 - rate) ** trust
            weight = 1.0 - left * (1.0 - weight) if learned else weight * left
            found.append(gain * weight)
        return found

    def learned(loss: float) -> Learned:
        return Learned(accuracy=-loss, confidence=0.0, entropy=0.0, loss=loss)

    alone = [0.0, *play([1] * 20)]
    curve = tuple((float(n), alone[n]) for n in (0, 1, 2, 4, 8, 20))
    turns = [1] * 6 + [0] * 1 + [1] * 4  # of both heads together 12, 3 and 7 lessons
    end = play(turns)
    about_a = {"a": learned(0.0), "b": learned(-4.0 * gain)}
    about_b = {"a": learned(0.0), "b": learned(gain)}
    adaptation = TokenAdaptation(
        lesson_rows=64, margin=0.005, lesson_s=1.0, lesson_j=None,
        curve={"a": ((0.0, 0.0), (1.0, 0.0)), "b": curve}, changed={"a": about_a, "b": about_b},
        visits=(
            (
                Visit(domain="b", lessons=12, loss=end[5], accuracy=-end[5]),
                Visit(domain="a", lessons=3, loss=-4.0 * end[6], accuracy=4.0 * end[6]),
                Visit(domain="b", lessons=7, loss=end[10], accuracy=-end[10]),
            ),
        ),
        provenance={},
    )  # fmt: skip
    fit = LessonFit(adaptation)
    assert fit.domains == ("a", "b") and fit.changed[:, 0].tolist() == [[0.0] * 4] * 2
    assert fit.rate[1] == pytest.approx(rate, abs=2e-3)
    error = fit.error()
    assert error["points"] == 3.0
    off = 0.15 * abs(gain)  # how fast the first is learned nobody can tell: nothing is gained by it
    assert error["loss_rmse"] < off and error["accuracy_rmse"] < off
