"""The adaptation model: its state is what running statistics do, and its answers are the measured ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import ttt
from moe.model.config import ModelConfig
from moe.model.transformer import MoEModel, initialise
from moe.service.adaptation import (
    adapt,
    answer_quality,
    mixture_position,
    second_share,
    start_unadapted,
    tabulate,
)

SHIFTS, STATES, COUNTS, BIASES, MIXTURES, OWN_K = 3, 4, 2, 2, 6, 1
PLACES = np.linspace(0.0, 1.0, MIXTURES + 2)[1:-1]
PAIRS = list(itertools.combinations(range(STATES), 2))


def measured(answer) -> tuple[np.ndarray, np.ndarray]:
    """What a profile holds if the quality of a state is answer(shift, weights, k, r), a float [3]."""
    corner = np.eye(STATES)
    pure = np.array(
        [
            [[[answer(s, w, k, r) for r in range(BIASES)] for k in range(COUNTS)] for w in corner]
            for s in range(SHIFTS)
        ]
    )
    shares = second_share(PLACES)
    mixed = [
        [[answer(s, (1 - x) * corner[i] + x * corner[j], OWN_K, 0) for x in shares] for i, j in PAIRS]
        for s in range(SHIFTS)
    ]
    return pure, np.array(mixed)


rng = np.random.default_rng(0)
LINEAR = rng.uniform(0.2, 0.8, (SHIFTS, STATES, COUNTS, BIASES, 3))
CURVED = rng.uniform(-0.2, 0.2, (SHIFTS, STATES, STATES, 3))


def quadratic(shift: int, weights: np.ndarray, k: int, r: int) -> np.ndarray:
    """A polynomial of mixtures of the second order."""
    pairs = sum(weights[i] * weights[j] * CURVED[shift, i, j] for i, j in PAIRS)
    return np.tensordot(weights, LINEAR[shift, :, k, r], axes=1) + pairs


TABLES = tabulate(*measured(quadratic), OWN_K)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=12), st.floats(0.01, 0.9))
def test_weights_are_those_of_running_averages(sequence, rate):
    weights = np.empty(STATES)
    start_unadapted(weights)
    average = np.array([1.0, 0.0, 0.0, 0.0])  # of vectors that tell the states apart, as norms average
    for shift, steps in sequence:
        adapt(weights, shift, steps, rate)
        for _ in range(steps):
            average = (1.0 - rate) * average + rate * np.eye(STATES)[shift + 1]
    np.testing.assert_allclose(weights, average, atol=1e-12)
    assert weights.min() >= 0.0 and weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "place"),
    [(ttt.Tent(), 1), (ttt.Neo(), -1), (ttt.Bank(), 1)],
    ids=["variance of the first norm", "offset of the last norm", "variance of the first norm in a bank"],
)
def test_what_a_real_model_adapts_is_the_weighted_mean(settings, place):
    config = ModelConfig(
        task="vision", d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, expert_widths=(16,) * 4,
        top_k=2, top_k_choices=(1, 2), norm="batch", n_classes=10,
    )  # fmt: skip
    model = initialise(MoEModel(config), torch.Generator().manual_seed(0))
    adapter = ttt.Adapter(model, settings, guard=None)
    images = torch.randint(0, 256, (2, 32, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
    images[1] //= 3

    def take(shift: int, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                answers = model(images[shift], 2).logits
            assert adapter.adapt(images[shift], answers, 1, 2) == 1

    def moved() -> torch.Tensor:
        return adapter.snapshot().statistics[place]

    pure = [moved()]
    for shift in range(2):
        adapter.reset()
        take(shift, 120)
        pure.append(moved())
    adapter.reset()
    weights = np.empty(3)
    start_unadapted(weights)
    for shift, steps in ((0, 3), (1, 2), (0, 1)):
        take(shift, steps)
        adapt(weights, shift, steps, ttt.step_share(settings))
        expected = sum((float(w) * value for w, value in zip(weights, pure, strict=True)), torch.zeros(()))
        torch.testing.assert_close(moved(), expected, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1), st.integers(0, 3))
def test_pure_states_answer_as_measured(shift, k, r, state):
    expected = quadratic(shift, np.eye(STATES)[state], k, r)
    np.testing.assert_allclose(answer_quality(TABLES, np.eye(STATES)[state], shift, k, r), expected)


@given(st.integers(0, 2), st.sampled_from(PAIRS), st.floats(0.0, 1.0))
def test_mixtures_of_two_answer_as_measured(shift, pair, share):
    weights = np.zeros(STATES)
    weights[pair[0]], weights[pair[1]] = 1.0 - share, share
    expected = quadratic(shift, weights, OWN_K, 0)
    np.testing.assert_allclose(answer_quality(TABLES, weights, shift, OWN_K, 0), expected, atol=4e-3)


@given(
    st.integers(0, 2),
    st.integers(0, 1),
    st.integers(0, 1),
    st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
)
def test_any_state_of_a_second_order_polynomial_is_found(shift, k, r, parts):
    weights = np.array(parts) / sum(parts)
    expected = np.clip(quadratic(shift, weights, k, r), 0.0, 1.0)
    np.testing.assert_allclose(answer_quality(TABLES, weights, shift, k, r), expected, atol=6e-3)


@given(st.floats(0.0, 1.0))
def test_a_place_and_its_share_belong_together(place):
    share = float(second_share(np.array(place)))
    if share < 1.0:
        assert mixture_position(share / (1.0 - share)) == pytest.approx(place, abs=1e-6)


def test_answers_stay_within_bounds_and_a_model_that_does_not_adapt_has_one_state():
    pure = np.full((SHIFTS, STATES, COUNTS, BIASES, 3), 0.95)
    bulging = tabulate(pure, np.full((SHIFTS, len(PAIRS), MIXTURES, 3), 1.2), OWN_K)
    assert answer_quality(bulging, np.array([0.5, 0.5, 0.0, 0.0]), 0, 0, 0) == (1.0, 1.0, 1.0)
    fixed = tabulate(pure[:, :1], None, OWN_K)
    weights = np.empty(STATES)
    start_unadapted(weights)
    assert answer_quality(fixed, weights, 2, 1, 1) == pytest.approx((0.95,) * 3)
