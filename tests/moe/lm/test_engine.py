"""A decode step of the token decoding study against a plain decoder, and how it chooses experts.

The tests marked gpu hold the Triton kernels against the same plain decoder.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.lm.engine import ops
from moe.lm.engine.engine import DecodeEngine
from moe.lm.model import LanguageModel, initialise
from moe.lm.routing import RoutingKnobs, allowed_experts, choose, experts_read
from tests.studies.plain_decoder import (
    TINY,
    make_model,
    make_tokens,
    plain_allowed,
    plain_losses,
    plain_top,
)


def decoded_losses(engine: DecodeEngine, top_k: int, budget: int) -> Tensor:
    """Losses of the engine's positions behind the prompt, all sequences in step, [B, S - first]."""
    engine.set(top_k, budget)
    engine.prefill()
    engine.clear()
    engine.pos.fill_(engine.first)
    losses = []
    for _ in range(engine.last - engine.first):
        before = engine.nll.clone()
        engine.replay()
        losses.append(engine.nll - before)
    return torch.stack(losses, dim=1).cpu()


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("top_k", "budget"), [(4, 8), (2, 8), (1, 8), (4, 5), (2, 3)])
def test_cached_decode_gives_every_token_the_loss_of_a_plain_decoder(
    gate: str, top_k: int, budget: int
) -> None:
    model = make_model(replace(TINY, gate=gate))
    tokens = make_tokens(3, 13)
    with torch.no_grad():
        expected = plain_losses(model, tokens, 8, top_k, budget)
    found = decoded_losses(DecodeEngine(model, tokens, 8), top_k, budget)
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("top_k", "budget"), [(4, None), (2, None), (2, 3)])
def test_the_full_pass_under_knobs_gives_every_token_the_loss_of_a_plain_decoder(
    top_k: int, budget: int | None
) -> None:
    model = make_model(TINY)
    tokens = make_tokens(3, 13)
    knobs = RoutingKnobs(top_k, budget=budget, group=3, decode_from=8, prompt_top_k=TINY.top_k)
    with torch.no_grad():
        expected = plain_losses(model, tokens, 8, top_k, budget or TINY.n_experts)
        x, _ = model(tokens[:, :-1].long(), knobs)
        found = F.cross_entropy(model.logits(x).movedim(-1, 1), tokens[:, 1:].long(), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_knobs_turned_between_steps_take_effect_in_the_next() -> None:
    model = make_model(TINY)
    engine = DecodeEngine(model, make_tokens(4, 25), 8)
    read = []
    for top_k, budget in ((4, 8), (1, 8), (4, 4)):
        engine.set(top_k, budget)
        before = engine.used.item()
        engine.replay()
        read.append((engine.used.item() - before) / TINY.n_layers)
    assert read[0] > 4 and read[1] <= 4 and read[2] == 4
    with pytest.raises(ValueError, match="top_k must be 1 to 4"):
        engine.set(5, 8)
    with pytest.raises(ValueError, match="budget must be 2 to 8"):
        engine.set(2, 1)


def test_a_sequence_starts_again_behind_its_prompt_and_finds_the_same() -> None:
    engine = DecodeEngine(make_model(TINY), make_tokens(3, 17), 8)
    totals = []
    for _ in range(2):
        engine.nll.zero_()
        for _ in range(8):
            engine.replay()
        totals.append(engine.nll.clone())
        assert engine.pos.tolist() == engine.start.tolist()
    torch.testing.assert_close(totals[0], totals[1])


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_experts_are_selected_by_demand_as_a_plain_ranking_does(gate: str) -> None:
    logits = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(4))  # [B, S, E]
    for top_k, budget in ((4, 6), (2, 3), (1, 2)):
        allowed = allowed_experts(logits, RoutingKnobs(top_k, budget=budget, group=3), gate)  # type: ignore[arg-type]
        for group in range(2):
            for step in range(5):
                some = logits[3 * group : 3 * group + 3, step]
                found = allowed[group, 0, step].nonzero().flatten().tolist()
                assert found == sorted(plain_allowed(some, top_k, budget, gate))


def test_a_smaller_budget_allows_a_subset() -> None:
    logits = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(5))
    sets = [allowed_experts(logits, RoutingKnobs(4, budget=n, group=4), "sigmoid") for n in range(4, 9)]
    assert all((small <= large).all() for small, large in pairwise(sets))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_weights_are_renormalised_or_keep_what_they_had_under_the_trainings_top_k(gate: str) -> None:
    config = replace(TINY, gate=gate)
    logits = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(6))
    full = choose(logits, RoutingKnobs(4), config)[1]
    kept = choose(logits, RoutingKnobs(2, renormalise=0.0), config)[1]
    root = choose(logits, RoutingKnobs(2, renormalise=0.5), config)[1]
    summed = choose(logits, RoutingKnobs(2), config)[1]
    torch.testing.assert_close(full.sum(dim=-1), torch.ones(7))
    torch.testing.assert_close(kept, full[:, :2])
    torch.testing.assert_close(summed, kept / kept.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(root, kept / kept.sum(dim=-1, keepdim=True).sqrt())


def test_experts_read_are_counted_once_per_step_of_a_group() -> None:
    experts = torch.tensor([[0, 1], [0, 2], [1, 0], [8, 2], [3, 8], [3, 4]])  # [T, K]; 8 is a null slot
    # Two sequences of three positions: the steps from position 1 on read {0, 2, 3} and {0, 1, 3, 4}.
    assert experts_read(experts, 2, 1, 2, 8).tolist() == [3.5]


def test_the_table_lists_every_chosen_pair_under_its_expert() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    counts, table = torch.zeros(8, dtype=torch.int32), torch.zeros(8, 5, dtype=torch.int32)
    top_k, budget = torch.tensor(3), torch.tensor(8)
    weights = decode_ops.select(logits, torch.zeros(8), top_k, budget, counts, table, 4, "softmax")
    for token, row in enumerate(logits):
        for slot, expert in enumerate(plain_top(row.tolist(), 3)):
            assert token * 4 + slot in table[expert, : counts[expert]].tolist()
    assert counts.sum() == 15 and (weights[:, 3] == 0).all()


# On a card


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("top_k", "budget"), [(4, 8), (2, 8), (1, 8), (4, 5), (2, 3)])
def test_the_captured_kernels_give_every_token_the_loss_of_a_plain_decoder(
    gate: str, top_k: int, budget: int
) -> None:
    model = make_model(replace(TINY, gate=gate), "cuda")
    tokens = make_tokens(3, 13, "cuda")
    with torch.no_grad():
        expected = plain_losses(model, tokens, 8, top_k, budget)
    found = decoded_losses(DecodeEngine(model, tokens, 8).capture(), top_k, budget)
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_training_kernels_give_the_gradients_and_steps_of_torch_operators() -> None:
    from moe.lm import train_kernels

    generator = torch.Generator("cuda").manual_seed(12)
    grad, buffer, parameter = (torch.randn(3, 70, 50, device="cuda", generator=generator) for _ in range(3))
    expected_buffer = buffer.lerp(grad, 0.1)
    ahead = train_kernels.momentum_step(grad, buffer, 0.9)
    torch.testing.assert_close(buffer, expected_buffer)
    torch.testing.assert_close(ahead, grad.lerp(expected_buffer, 0.9).bfloat16())
    expected = 0.5 * parameter - 0.2 * ahead.float()
    train_kernels.scaled_add(parameter, ahead, 0.5, -0.2)
    torch.testing.assert_close(parameter, expected)
    losses = []
    for device in ("cpu", "cuda"):
        model = LanguageModel(TINY, torch.float32)
        model = initialise(model, torch.Generator().manual_seed(13)).to(device)
        answer, total = model.loss(make_tokens(2, 17).long().to(device))
        total.backward()
        layer = model.layers()[0].moe
        assert layer.gate_up.grad is not None and layer.router is not None and layer.router.grad is not None
        losses.append((answer.item(), layer.gate_up.grad.cpu(), layer.router.grad.cpu()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    for on_cpu, on_cuda in zip(losses[0][1:], losses[1][1:], strict=True):
        torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-2, atol=1e-4)
