"""What a training asks of the routers: the experts that a decode step reads, its gradient, its budget."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.lm import fit
from moe.lm.__main__ import Arguments
from moe.lm.config import SIZES, LmConfig, Recipe
from moe.lm.model import RoutingDecision
from moe.lm.routing_loss import BUDGET_RUNNING, NOISE, RoutingLoss, expected_reads, pick_probability
from moe.model.dispatch import make_dispatch

CONFIG = LmConfig(
    vocabulary=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8, expert_width=32,
    top_k=2, context=32,
)  # fmt: skip
RECIPE = Recipe(steps=12, batch=8, warmup=2)
CPU = torch.device("cpu")
TEXT = (np.arange(6000) * np.arange(6000) % 61).astype(np.uint16)


def decided(logits: torch.Tensor, top_k: int = CONFIG.top_k) -> RoutingDecision:
    experts = logits.topk(top_k, dim=-1).indices
    return RoutingDecision(logits, experts, make_dispatch(experts, logits.shape[-1]))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_expected_reads_are_the_mean_over_every_draw_of_tokens() -> None:
    """Enumerated: all draws with repetition of 3 of 4 tokens, and all outcomes of their picks."""
    probability = normal(4, 3).sigmoid()  # [T, E]
    reads = [
        sum(1 - math.prod(1 - probability[t, e].item() for t in drawn) for e in range(3))
        for drawn in product(range(4), repeat=3)
    ]
    assert expected_reads(probability.mean(dim=0), 3).item() == pytest.approx(np.mean(reads), rel=1e-6)


@pytest.mark.parametrize("running", [8, 32, 128])
def test_expected_reads_of_a_routing_are_those_of_steps_that_are_drawn(running: int) -> None:
    logits = normal(400, 16) + 1.5 * normal(16, seed=1)  # uneven
    decision = decided(logits, 3)
    rng = np.random.default_rng(0)
    steps = [len(np.unique(decision.experts[rng.integers(400, size=running)])) for _ in range(4000)]
    share = decision.dispatch.tokens_per_expert / 400
    assert expected_reads(share, running).item() == pytest.approx(np.mean(steps), abs=0.1)


def test_a_pick_is_as_likely_as_noise_on_its_logit_makes_it() -> None:
    logits = normal(5, 6)
    rng = np.random.default_rng(0)
    probability = pick_probability(logits, 2)
    for token, expert in product(range(5), range(6)):
        noisy = np.tile(logits[token].numpy(), (20_000, 1))
        noisy[:, expert] += NOISE * rng.standard_normal(20_000)
        picked = (np.argsort(noisy, axis=1)[:, -2:] == expert).any(axis=1)
        assert probability[token, expert].item() == pytest.approx(picked.mean(), abs=0.015)


def test_gradients_are_those_of_finite_differences() -> None:
    logits = normal(6, 5).double().requires_grad_()

    def reads(values: torch.Tensor) -> torch.Tensor:
        return expected_reads(pick_probability(values, 2).mean(dim=0), 8)

    assert torch.autograd.gradcheck(reads, (logits,), eps=1e-6, atol=1e-7)


def test_the_push_is_from_rare_experts_to_busy_ones() -> None:
    """A busy expert is read anyway, so a token that moves to it from a rare one saves a read."""
    logits = normal(500, 8) + torch.tensor([3.0, 3, 0, 0, 0, 0, -1, -1])
    logits.requires_grad_()
    loss = RoutingLoss(CONFIG, replace(RECIPE, read_weight=1.0, balance_weight=0.0), CPU)
    loss([decided(logits)], progress=1.0).backward()
    assert logits.grad is not None
    push = logits.grad.sum(dim=0)  # [E]
    assert (push[:2] < 0).all() and (push[2:] > 0).all()


@pytest.mark.parametrize("budget", [4.0, 6.0])
def test_dual_ascent_holds_what_is_read_at_the_budget(budget: float) -> None:
    """A bare router that would rather stay as it is ends at the budget."""
    steps, tokens = 1000, F.pad(normal(256, 4, seed=2), (0, 1), value=2.0)  # with an offset
    router = torch.nn.Parameter(F.pad(normal(8, 4), (0, 1)))
    wish = F.linear(tokens, router.detach())
    loss = RoutingLoss(CONFIG, replace(RECIPE, read_budget=budget, balance_weight=0.0), CPU)
    optimiser = torch.optim.Adam([router], lr=0.02)
    read = []
    for step in range(steps):
        logits = F.linear(tokens, router)
        decision = decided(logits)
        held = loss([decision], step / steps) + 0.01 * (logits - wish).square().sum(dim=-1).mean()
        optimiser.zero_grad()
        held.backward()
        optimiser.step()
        share = decision.dispatch.tokens_per_expert / len(tokens)
        read.append(expected_reads(share, BUDGET_RUNNING).item())
    assert read[0] > 7.5
    assert np.mean(read[-100:]) == pytest.approx(budget, abs=0.2)
    assert loss.record()["read_weight"] > 0


def test_without_weight_a_training_is_the_standard_one_bit_for_bit() -> None:
    """The standard's loss is written out, as it was before there were others."""
    plain, _ = fit.train(CONFIG, RECIPE, TEXT, CPU)
    _, record = fit.train(CONFIG, replace(RECIPE, read_weight=0.0), TEXT, CPU)
    assert "read_weight" not in record

    class Standard:
        def __init__(self, config: LmConfig, recipe: Recipe, device: torch.device) -> None: ...

        def __call__(self, decisions: list[RoutingDecision], progress: float) -> torch.Tensor:
            total = torch.zeros(())
            for decision in decisions:
                share = decision.dispatch.tokens_per_expert / decision.experts.numel()
                gates = decision.logits.sigmoid()
                p = (gates / gates.sum(dim=-1, keepdim=True)).mean(dim=0)
                total = total + 0.01 / len(decisions) * len(p) * (share * p).sum()
            return total

        def record(self) -> dict[str, float]:
            return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "RoutingLoss", Standard)
        standard, _ = fit.train(CONFIG, RECIPE, TEXT, CPU)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), standard.parameters(), strict=True))


def test_a_weight_lowers_what_is_read_and_the_record_says_so() -> None:
    recipe = replace(RECIPE, steps=60, router_lr=1e-2, balance_weight=0.0)
    inputs = torch.from_numpy(TEXT[:1024].astype(np.int64)).view(-1, 32)
    reads = {}
    for weight in (0.0, 3.0):
        model, record = fit.train(CONFIG, replace(recipe, read_weight=weight), TEXT, CPU)
        decisions = model(inputs)[1]
        shares = [d.dispatch.tokens_per_expert / len(d.experts) for d in decisions]
        reads[weight] = np.mean([expected_reads(share, 8).item() for share in shares])
    assert reads[3.0] < 0.8 * reads[0.0]
    assert record["read_weight"] == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_weight": -1.0}, "read_weight must be 0 or more, got -1.0"),
        ({"balance_weight": float("nan")}, "balance_weight must be 0 or more, got nan"),
        ({"read_budget": 0.0}, "read_budget must be above 0 experts, got 0.0"),
        ({"read_budget": 4.0, "read_weight": 0.1}, "exclude each other"),
        ({"read_budget": 2.0}, "read_budget=2.0 means nothing: a step reads more than the 2 experts"),
        ({"read_budget": 9.0}, "at most 8; give a number between"),
    ],
)
def test_terms_that_mean_nothing_are_refused_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingLoss(CONFIG, replace(RECIPE, **changes), CPU)


def test_a_dense_model_reads_no_experts_and_one_of_few_has_no_choice() -> None:
    recipe = replace(RECIPE, steps=2, read_weight=1.0)
    _, record = fit.train(CONFIG.dense(), recipe, TEXT, CPU)
    assert "read_weight" not in record
    with pytest.raises(ValueError, match="nothing to choose where each token picks 2 of 2 experts"):
        RoutingLoss(replace(CONFIG, n_experts=2), recipe, CPU)


def test_the_command_trains_with_the_terms_it_is_given() -> None:
    given = Arguments(size="small", read_weight=0.1, balance_weight=0.001)
    assert given.recipe == replace(SIZES["small"][1], read_weight=0.1, balance_weight=0.001)
    assert Arguments(size="small").recipe == SIZES["small"][1]
    with pytest.raises(ValueError, match=r"read_budget=4\.0 means nothing"):
        Arguments(size="small", read_budget=4.0)
