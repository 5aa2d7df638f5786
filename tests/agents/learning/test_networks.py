"""The padded distribution against Stable-Baselines3's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from agents.learning.networks import KnobPolicy, PaddedMultiCategorical


@settings(max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 2**31))
def test_equals_the_distribution_it_stands_for(levels: list[int], seed: int) -> None:
    """Probabilities, entropy, mode and both gradients, also of near-certain choices."""
    generator = torch.Generator().manual_seed(seed)
    logits = 10.0 * torch.randn(6, sum(levels), generator=generator)
    actions = torch.stack([torch.randint(0, n, (6,), generator=generator) for n in levels], 1)
    results = []
    for distribution in (PaddedMultiCategorical(levels), MultiCategoricalDistribution(levels)):
        leaf = logits.clone().requires_grad_()
        distribution.proba_distribution(leaf)
        log_prob, entropy = distribution.log_prob(actions.float()), distribution.entropy()
        (log_prob.sum() + entropy.sum()).backward()
        results.append((log_prob.detach(), entropy.detach(), distribution.mode(), leaf.grad))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)


def test_draws_levels_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    levels, n = [2, 5, 3], 20_000
    logits = torch.randn(sum(levels))
    drawn = PaddedMultiCategorical(levels).proba_distribution(logits.expand(n, -1)).sample()
    for knob, part in enumerate(logits.split(levels)):
        frequency = torch.bincount(drawn[:, knob], minlength=levels[knob]) / n
        torch.testing.assert_close(frequency, part.softmax(0), atol=0.02, rtol=0.0)


def test_parameters_fit_the_plain_policy() -> None:
    """A model trained with it plays the same under Stable-Baselines3's policy class."""
    observation_space = spaces.Box(-1.0, 1.0, (9,), np.float32)
    own, plain = (
        policy(observation_space, spaces.MultiDiscrete([3, 4]), lambda _: 1e-3)
        for policy in (KnobPolicy, ActorCriticPolicy)
    )
    plain.load_state_dict(own.state_dict())
    observation = np.random.default_rng(0).uniform(-1, 1, (50, 9)).astype(np.float32)
    np.testing.assert_array_equal(
        own.predict(observation, deterministic=True)[0], plain.predict(observation, deterministic=True)[0]
    )
    values, log_prob, _ = own.evaluate_actions(torch.as_tensor(observation), torch.ones(50, 2))
    expected = plain.evaluate_actions(torch.as_tensor(observation), torch.ones(50, 2))
    torch.testing.assert_close(values, expected[0])
    torch.testing.assert_close(log_prob, expected[1])
    assert own.predict(observation[0])[0].shape == (2,)
    with pytest.raises(ValueError, match="observation"):
        own.predict(observation[:, :8])
