"""The router's null tests and monotonicity, its losses, and the usage statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.model.losses import load_balance_loss, router_z_loss
from moe.model.router import Routing, route
from moe.model.usage import load_entropy, load_imbalance, mean_expert_cost, tokens_per_expert

N_EXPERTS = 8
COST = torch.linspace(0.1, 1.0, N_EXPERTS)


def random_logits(seed: int, scale: float, n_tokens: int = 50) -> torch.Tensor:
    return scale * torch.randn(n_tokens, N_EXPERTS, generator=torch.Generator().manual_seed(seed))


LOGITS = st.builds(random_logits, st.integers(0, 9999), st.sampled_from([0.01, 1.0, 30.0]))
TOP_K = st.integers(1, N_EXPERTS)
BIAS = st.floats(0, 2, width=32)


def same(a: Routing, b: Routing) -> bool:
    return torch.equal(a.experts, b.experts) and torch.equal(a.weights, b.weights)


@given(LOGITS, TOP_K, BIAS, st.floats(0, 1, width=32))
def test_equal_cost_changes_nothing(logits, top_k, bias, cost):
    assert same(route(logits, top_k), route(logits, top_k, bias, torch.full((N_EXPERTS,), cost)))


@given(LOGITS, TOP_K)
def test_strength_zero_is_bit_identical(logits, top_k):
    assert same(route(logits, top_k), route(logits, top_k, 0.0, COST))
    assert same(route(logits, top_k), route(logits, top_k, torch.zeros(()), COST))


@given(LOGITS, TOP_K, BIAS, BIAS, st.permutations(range(N_EXPERTS)))
def test_more_bias_never_raises_the_cost_of_any_token(logits, top_k, one, other, order):
    cost = COST[torch.tensor(order)]
    weak, strong = (route(logits, top_k, bias, cost) for bias in sorted((one, other)))
    assert (cost[strong.experts].sum(-1) <= cost[weak.experts].sum(-1) + 1e-5).all()


@given(LOGITS, TOP_K, BIAS)
def test_weights_come_from_unbiased_logits_of_distinct_experts(logits, top_k, bias):
    routing = route(logits, top_k, bias, COST)
    for token in range(len(logits)):
        chosen = routing.experts[token].tolist()
        assert len(set(chosen)) == top_k
        exponents = np.exp(logits[token].double().numpy() - logits[token].max().item())
        expected = exponents[chosen] / exponents[chosen].sum()
        np.testing.assert_allclose(routing.weights[token], expected, atol=1e-6)


@given(LOGITS, TOP_K, BIAS, st.integers(-8, 8))
def test_the_bias_means_the_same_whatever_the_scale_of_the_logits(logits, top_k, bias, power):
    """Powers of two scale without rounding."""
    scaled = route(logits * 2.0**power, top_k, bias, COST)
    assert torch.equal(scaled.experts, route(logits, top_k, bias, COST).experts)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_full_strength_pulls_four_standard_deviations_for_a_cost_of_one(scale):
    logits = scale * torch.tensor([[1.0, -1.0]])  # one standard deviation each way: two apart
    for bias, chosen in ((0.49, 0), (0.51, 1)):
        assert route(logits, 1, bias, torch.tensor([1.0, 0.0])).experts.item() == chosen


def test_full_strength_sends_most_tokens_to_cheap_experts():
    logits = random_logits(0, 1.0, n_tokens=2000)
    cost = torch.tensor([1.0] * 4 + [0.6] * 4)
    shares = [(route(logits, 2, bias, cost).experts >= 4).double().mean().item() for bias in (0.0, 0.5, 1.0)]
    assert abs(shares[0] - 0.5) < 0.02
    assert 0.6 < shares[1] < shares[2]
    assert 0.85 < shares[2] < 1.0


def test_bias_leaves_no_gradient_and_tensor_strength_equals_float():
    logits = random_logits(1, 1.0).requires_grad_()
    strength = torch.tensor(0.7)
    assert same(route(logits, 3, 0.7, COST), route(logits, 3, strength, COST))
    route(logits, 3, 0.7, COST).weights[:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [0, N_EXPERTS + 1])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=r"top_k must be within 1\.\.8"):
        route(random_logits(0, 1.0), top_k)


@given(LOGITS, TOP_K, TOP_K, BIAS)
def test_top_k_known_to_the_device_only_equals_top_k_known_to_the_host(logits, top_k, most, bias):
    top_k, most = sorted((top_k, most))
    host = route(logits, top_k, bias, COST)
    device = route(logits, torch.tensor(top_k), torch.tensor(bias), COST, max_top_k=most)
    assert device.experts.shape == (len(logits), most)
    assert torch.equal(device.experts[:, :top_k], host.experts)
    assert (device.experts[:, top_k:] == N_EXPERTS).all()
    torch.testing.assert_close(device.weights[:, :top_k], host.weights)
    assert (device.weights[:, top_k:] == 0).all()
    assert torch.equal(tokens_per_expert(device), tokens_per_expert(host))
    torch.testing.assert_close(mean_expert_cost(device, COST), mean_expert_cost(host, COST))
    torch.testing.assert_close(load_balance_loss(device), load_balance_loss(host))


@given(LOGITS, TOP_K, st.integers(0, N_EXPERTS - 1))
def test_a_balance_bias_moves_the_choice_but_not_the_weights(logits, top_k, favoured):
    balance_bias = torch.zeros(N_EXPERTS)
    assert same(route(logits, top_k), route(logits, top_k, balance_bias=balance_bias))
    balance_bias[favoured] = 1e4
    routing = route(logits, top_k, balance_bias=balance_bias)
    assert (routing.experts == favoured).any(dim=-1).all()
    expected = logits.gather(-1, routing.experts).softmax(dim=-1)
    assert torch.equal(routing.weights, expected)


@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_a_bias_that_is_no_number_is_refused(bias):
    with pytest.raises(ValueError, match="routing_bias must be a finite number"):
        route(random_logits(0, 1.0), 2, bias, COST)


def test_the_cost_table_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"8 experts, got shape \(4,\); is it the cost table of another"):
        route(random_logits(0, 1.0), 2, 0.5, COST[:4])


@given(LOGITS, TOP_K)
def test_statistics_against_numpy(logits, top_k):
    routing = route(logits, top_k)
    counts = np.bincount(routing.experts.flatten().numpy(), minlength=N_EXPERTS)
    np.testing.assert_array_equal(tokens_per_expert(routing).numpy(), counts)
    assert counts.sum() == len(logits) * top_k
    share = counts[counts > 0] / counts.sum()
    found = torch.from_numpy(counts)
    np.testing.assert_allclose(load_entropy(found), -(share * np.log(share)).sum() / math.log(N_EXPERTS))
    np.testing.assert_allclose(load_imbalance(found), counts.std() / counts.mean())
    np.testing.assert_allclose(
        mean_expert_cost(routing, COST), COST.numpy()[routing.experts.numpy()].mean(), rtol=1e-5
    )


def test_statistics_at_their_ends():
    even, one = torch.full((4,), 7), torch.tensor([0, 9, 0, 0])
    both = torch.stack([even, one])
    torch.testing.assert_close(load_entropy(both), torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(load_imbalance(both), torch.tensor([0.0, math.sqrt(3)], dtype=torch.float64))


def test_losses_at_known_points():
    # A uniform router: the balance loss is 1, the z loss the square of log E.
    uniform = route(torch.zeros(16, N_EXPERTS), 2)
    assert load_balance_loss(uniform).item() == pytest.approx(1.0)
    assert router_z_loss(uniform).item() == pytest.approx(math.log(N_EXPERTS) ** 2)
    # Everything to expert 3: the balance loss is E.
    collapsed = route(100 * torch.nn.functional.one_hot(torch.full((16,), 3), N_EXPERTS).float(), 1)
    assert load_balance_loss(collapsed).item() == pytest.approx(N_EXPERTS)


def test_balance_loss_pushes_load_off_the_busy_expert():
    logits = random_logits(2, 0.1)
    logits[:, 0] += 1.0
    logits.requires_grad_()
    load_balance_loss(route(logits, 2)).backward()
    assert logits.grad is not None
    assert logits.grad[:, 0].mean() > logits.grad[:, 1:].mean()
