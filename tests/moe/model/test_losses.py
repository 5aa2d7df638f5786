"""Energy, balance in groups and balance without a loss, against plain references and at their ends."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.model.config import model_config
from moe.model.losses import (
    chosen_energy,
    expected_energy,
    expert_groups,
    load_balance_loss,
    step_balance_bias,
)
from moe.model.router import Routing, route
from moe.model.usage import tokens_per_expert
from moe.model.variants import even, with_zero_computation
from moe.profiles import ProfileError
from moe.training import energy_loss as energy
from moe.training.energy_loss import ASSUMED, EnergyTerm, cost_of_experts, measured_cost
from moe.training.recipes import RECIPES, Recipe

CPU = torch.device("cpu")
CONFIG = model_config("vision", "tiny")
RECIPE = RECIPES["vision", "tiny"]
N_EXPERTS = 6
COST = torch.tensor([1.7, 1.7, 0.9, 0.9, 0.1, 0.0])
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])


def random_logits(seed: int, scale: float, n_tokens: int = 20) -> torch.Tensor:
    return scale * torch.randn(n_tokens, N_EXPERTS, generator=torch.Generator().manual_seed(seed))


LOGITS = st.builds(random_logits, st.integers(0, 9999), st.sampled_from([0.1, 1.0, 5.0]))
TOP_K = st.integers(1, N_EXPERTS)


def mean_cost_of_drawn_sets(logits: np.ndarray, cost: np.ndarray, top_k: int) -> float:
    """Expected cost of a slot by enumeration of every set of ``top_k`` experts."""
    total = 0.0
    for token in logits.astype(np.float64):
        probability = np.exp(token - token.max())
        sets = [list(chosen) for chosen in itertools.combinations(range(len(token)), top_k)]
        weights = np.array([probability[chosen].prod() for chosen in sets])
        total += weights @ [cost[chosen].mean() for chosen in sets] / weights.sum()
    return total / len(logits) / cost.mean()


@given(LOGITS, TOP_K)
def test_expected_energy_is_that_of_every_set_by_hand(logits, top_k):
    found = expected_energy(route(logits, top_k), COST).item()
    by_enumeration = mean_cost_of_drawn_sets(logits.numpy(), COST.double().numpy(), top_k)
    assert found == pytest.approx(by_enumeration, rel=1e-5)
    if top_k == 1:
        by_hand = (logits.double().softmax(-1) * COST).sum(-1).mean() / COST.double().mean()
        assert found == pytest.approx(by_hand.item(), rel=1e-5)


@given(LOGITS, TOP_K, st.floats(1e-6, 1e6))
def test_energy_is_relative_to_even_routing_in_any_unit(logits, top_k, unit):
    assert expected_energy(route(torch.full_like(logits, 3.0), top_k), COST).item() == pytest.approx(1)
    assert expected_energy(route(logits, N_EXPERTS), COST).item() == pytest.approx(1)
    routing = route(logits, top_k)
    assert expected_energy(routing, unit * COST).item() == pytest.approx(
        expected_energy(routing, COST).item(), rel=1e-4
    )
    assert chosen_energy(torch.full((2, N_EXPERTS), 7), COST).tolist() == pytest.approx([1, 1])


@given(st.integers(0, 9999), TOP_K)
def test_a_decided_router_expects_what_it_chooses(seed, top_k):
    order = [torch.randperm(N_EXPERTS, generator=torch.Generator().manual_seed(seed + i)) for i in range(8)]
    routing = route(25.0 * torch.stack(order).float(), top_k)
    chosen = chosen_energy(tokens_per_expert(routing), COST).item()
    assert expected_energy(routing, COST).item() == pytest.approx(chosen, rel=1e-5)


@pytest.mark.parametrize("top_k", range(1, N_EXPERTS + 1))
def test_the_gradient_of_the_energy_is_that_of_finite_differences(top_k):
    logits = random_logits(3, 1.5, n_tokens=3).double()
    experts = route(logits, top_k).experts

    def of_logits(changed):
        return expected_energy(Routing(changed, torch.ones(3, top_k), experts), COST.double())

    assert torch.autograd.gradcheck(of_logits, logits.requires_grad_())


def test_the_gradient_reaches_the_last_slot_where_the_first_takes_all_probability():
    logits = torch.tensor([[9.0, 0.1, 0.0, -3.0, -3.0, -3.0]], requires_grad=True)
    cost = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    expected_energy(route(logits, 2), cost).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] > 0.05  # the dear second expert is pushed out of its slot
    assert logits.grad[0, 2] < -0.05  # by the cheap one that comes next


@given(st.sampled_from([-3.3, -1.1, 0.4, 2.2]), st.sampled_from([-2.7, -0.6, 0.9, 3.1]))
def test_balance_in_groups_asks_nothing_of_the_groups_shares(one, other):
    # Tokens by turns prefer each member of a group: every group is uniform, whatever its share.
    of_group = torch.tensor([one, other, 0.0])[GROUPS]
    tokens = []
    for a, b in itertools.product(range(2), range(3)):
        token = of_group.clone()
        token[a] += 1.0
        token[2 + b] += 1.0
        tokens.append(token)
    routing = route(torch.stack(tokens), 1)
    counts = tokens_per_expert(routing)
    assert counts[0] == counts[1]
    assert counts[2] == counts[3] == counts[4]
    assert load_balance_loss(routing, GROUPS).item() == pytest.approx(1, rel=1e-4)


@given(LOGITS, TOP_K)
def test_one_group_is_no_group(logits, top_k):
    routing = route(logits, top_k)
    one = load_balance_loss(routing, torch.zeros(N_EXPERTS, dtype=torch.int64))
    torch.testing.assert_close(one, load_balance_loss(routing))


def test_balance_in_groups_grows_with_the_load_of_one_member():
    logits = torch.zeros(16, N_EXPERTS)
    logits[:, 3] = 60.0
    assert load_balance_loss(route(logits, 1), GROUPS).item() == pytest.approx(3)  # a group of three
    logits[:, :] = -200.0
    logits[:, 5] = 0.0  # a group of one, and no probability elsewhere
    assert load_balance_loss(route(logits, 1), GROUPS).item() == pytest.approx(1)


@given(st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=1, max_size=8), st.booleans())
def test_the_balance_bias_follows_the_algorithm_written_plainly(loads, grouped):
    members = [[0, 1], [2, 3, 4], [5]] if grouped else [list(range(6))]
    expected = [0.0] * 6
    found = torch.zeros(6)
    for load in loads:
        for group in members:
            mean = sum(load[e] for e in group) / len(group)
            for e in group:
                error = mean - load[e]
                expected[e] += 0.01 * ((error > 1e-9) - (error < -1e-9))
            centre = sum(expected[e] for e in group) / len(group)
            for e in group:
                expected[e] -= centre
        found = step_balance_bias(found, torch.tensor(load), 0.01, GROUPS if grouped else None)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_balance_bias_evens_the_load_of_a_fixed_router():
    logits = random_logits(0, 1.0, n_tokens=3000) + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -2.0])
    bias = torch.zeros(N_EXPERTS)
    for _ in range(400):
        counts = tokens_per_expert(route(logits, 2, balance_bias=bias))
        bias = step_balance_bias(bias, counts, 0.02)
    assert counts.double().std() / counts.double().mean() < 0.05


def test_experts_are_grouped_by_width_and_kind():
    config = with_zero_computation(CONFIG, ("zero", "copy", "zero"))
    assert config.expert_kinds == ["width 160"] * 4 + ["width 96"] * 4 + ["zero", "copy", "zero"]
    assert (expert_groups(config)[8] == expert_groups(config)[10]).item()
    assert len(set(expert_groups(config).tolist())) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy_lambda": -0.1}, "energy_lambda must be 0 or more"),
        ({"energy_lambda": math.nan}, "energy_lambda must be 0 or more"),
        ({"energy_budget": 0.0}, "energy_budget must be above 0"),
        ({"energy_budget": math.inf}, "energy_budget must be above 0"),
        ({"energy_lambda": 0.1, "energy_budget": 0.8}, "exclude each other"),
    ],
)
def test_a_recipe_refuses_an_energy_that_means_nothing(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.ones(5), "is it the cost of another model"),
        (torch.tensor([math.nan] + [1.0] * 7), "must be finite"),
        (torch.tensor([-1.0] + [1.0] * 7), "must be finite, 0 or more"),
        (torch.zeros(8), "not 0 throughout"),
        (torch.full((8,), 2.5), "no energy to save"),
    ],
)
def test_a_cost_that_cannot_be_used_is_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        term(cost, energy_lambda=0.1)


def test_a_budget_below_the_cheapest_experts_is_refused():
    with pytest.raises(ValueError, match=r"the 4 cheapest experts take 0\.750"):
        term(energy_budget=0.7)
    with pytest.raises(ValueError, match="no energy to save"):
        EnergyTerm(even(CONFIG), dataclasses.replace(RECIPE, energy_budget=1.0), None, "", CPU)


def term(cost=None, **recipe) -> EnergyTerm:
    return EnergyTerm(CONFIG, dataclasses.replace(RECIPE, **recipe), cost, "a meter", CPU)


def test_a_cost_that_nobody_measured_is_the_width_and_says_so():
    assumed = term(energy_lambda=0.25).record()
    assert assumed["expert_cost"] == pytest.approx([1.0] * 4 + [0.6] * 4)
    assert (assumed["cost_source"], assumed["lambda"], assumed["budget"]) == (ASSUMED, 0.25, None)
    measured = term(torch.arange(1.0, 9.0), energy_budget=0.9).record()
    assert (measured["cost_source"], measured["expert_cost"][7]) == ("a meter", 8.0)
    assert cost_of_experts(with_zero_computation(CONFIG, ("zero",)))[-1] == 0


@pytest.mark.parametrize("budget", [0.8, 0.95, 1.1])
def test_dual_ascent_holds_the_chosen_experts_at_the_budget(budget):
    """A bare router with wishes of its own, and a liking for dear experts, ends at the budget."""
    wish = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.Parameter(wish.clone())
    held = term(energy_budget=budget, steps=400)
    optimizer = torch.optim.SGD([logits], lr=50.0)
    for _ in range(400):
        routing = route(logits, CONFIG.top_k)
        liking = expected_energy(routing, held.expert_cost) - 0.01 * (logits - wish).square().sum(-1).mean()
        loss = held.loss([routing], [None]) - liking
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spent = chosen_energy(tokens_per_expert(route(logits, CONFIG.top_k)), held.expert_cost).item()
    assert spent == pytest.approx(budget, rel=0.03)
    assert held.multiplier.item() > 0


def test_a_budget_that_is_kept_anyway_weighs_nothing():
    held = term(energy_budget=1.2)
    routing = route(torch.zeros(10, 8).index_fill(1, torch.arange(4, 8), 5.0), CONFIG.top_k)
    assert held.loss([routing], [None]).item() == 0
    assert held.multiplier.item() == 0


def profile(**changes) -> Any:
    model = {"config": {**CONFIG.to_dict(), **changes.pop("config", {})}}
    cost = {"expert_energy_j": None, "expert_latency_s": None, **changes}
    return SimpleNamespace(model=model, device="a card", **cost)


def test_a_profile_gives_energy_or_else_time(monkeypatch):
    joules, seconds = np.arange(1.0, 9.0), np.ones(8)
    monkeypatch.setattr(energy, "load_profile", lambda path: path)
    cost, source = measured_cost(profile(expert_energy_j=joules, expert_latency_s=seconds), CONFIG)
    assert cost.tolist() == joules.tolist()
    assert source == "measured: expert_energy_j, a card"
    assert "expert_latency_s" in measured_cost(profile(expert_latency_s=seconds), CONFIG)[1]
    with pytest.raises(ProfileError, match="neither expert_energy_j nor expert_latency_s"):
        measured_cost(profile(), CONFIG)
    with pytest.raises(ProfileError, match="experts of another model: d_model is 32, here 64"):
        measured_cost(profile(config={"d_model": 32}, expert_energy_j=joules), CONFIG)


def test_recipes_are_not_energy_aware_unless_told():
    assert not any(recipe.energy_aware for recipe in RECIPES.values())
    assert Recipe(batch_size=1, steps=1, learning_rate=1.0, energy_budget=0.9).energy_aware
