"""What an attached model records, and what could mislead an attachment: traps of the real classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.hf.families import HfModelError
from moe.hf.steering import attach
from tests.conftest import no_host_wait
from tests.moe.hf.hf_models import (
    COST,
    D,
    E,
    build,
    every_family,
    gate_input,
    gates_of,
    logits_of,
    router_logits,
    tokens,
)


@every_family
def test_routing_is_counted_per_layer(family):
    model = build(family)
    seen: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda _, __, out: seen.append(out[2])) for gate in gates_of(model)]
    with attach(model) as knobs:
        for top_k in (4, 3):
            knobs.expert_count, knobs.routing_bias, knobs.expert_cost = top_k, 0.5 * (top_k == 3), COST
            seen.clear()
            logits_of(model)
            # A hook that was there before sees the experts that run.
            expected = torch.stack([torch.bincount(experts.flatten(), minlength=E).int() for experts in seen])
            assert torch.equal(knobs.tokens_per_expert, expected)
            assert expected.sum(dim=1).tolist() == [tokens().numel() * top_k] * 2
            assert all(torch.equal(r.experts, s) for r, s in zip(knobs.routing, seen, strict=True))
    for hook in hooks:
        hook.remove()


def test_null_slots_are_counted_for_nobody(monkeypatch):
    """Index E is a slot without an expert, as expert parallelism uses it."""
    model = build("olmoe")
    gate = gates_of(model)[0]
    own = type(gate).forward

    def with_null(self, x):
        logits, weights, experts = own(self, x)
        return (
            logits,
            weights.index_fill(1, torch.tensor([3]), 0.0),
            experts.index_fill(1, torch.tensor([3]), E),
        )

    monkeypatch.setattr(type(gate), "forward", with_null)
    with attach(model) as knobs:
        logits_of(model)
        assert knobs.tokens_per_expert.sum(dim=1).tolist() == [tokens().numel() * 3] * 2
        assert all(int(r.experts.max()) == E for r in knobs.routing)


def test_gates_that_were_not_called_are_named():
    model = build("mixtral")
    with attach(model) as knobs:
        with pytest.raises(HfModelError, match=r"number \[0, 1\].*run the model first"):
            _ = knobs.routing
        logits_of(model)
        assert len(knobs.routing) == 2
        model.model.layers[1].mlp.forward = lambda x: x  # as a fused kernel would
        logits_of(model)
        with pytest.raises(HfModelError, match=r"number \[1\].*kernel bypasses"):
            _ = knobs.tokens_per_expert
        del model.model.layers[1].mlp.forward


@every_family
def test_recorded_router_logits_stay_the_models_own(family):
    model = build(family)
    inputs: list[Tensor] = []
    hooks = [
        gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for gate in gates_of(model)
    ]
    for attached_first in (True, False):
        if not attached_first:  # transformers has put its own hooks on by now
            assert len(gates_of(model)[0]._forward_hooks) == 1
        with attach(model) as knobs:
            knobs.expert_count, knobs.routing_bias, knobs.expert_cost = 2, 1.0, COST
            inputs.clear()
            recorded = model(input_ids=tokens(), output_router_logits=True).router_logits
            for gate, x, logits, routing in zip(
                gates_of(model), inputs, recorded, knobs.routing, strict=True
            ):
                own = router_logits(gate, x.reshape(-1, D))
                assert torch.equal(logits.reshape(-1, E), own) and torch.equal(routing.router_logits, own)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
def test_the_auxiliary_loss_counts_the_experts_in_force(family):
    model, reference = build(family), build(family, 2)
    bare = model(input_ids=tokens(), output_router_logits=True).aux_loss
    with attach(model) as knobs:
        knobs.expert_count = 2
        found = model(input_ids=tokens(), output_router_logits=True).aux_loss
        assert torch.equal(found, reference(input_ids=tokens(), output_router_logits=True).aux_loss)
        assert not torch.equal(found, bare)
    assert model.num_experts_per_tok == 4
    assert torch.equal(model(input_ids=tokens(), output_router_logits=True).aux_loss, bare)


@every_family
def test_a_gate_that_returns_probabilities_is_steered_by_its_logits(family, monkeypatch):
    model, x = build(family), gate_input(5)
    gate = gates_of(model)[0]
    own = type(gate).forward

    def probabilities_first(self, x):
        logits, weights, experts = own(self, x)
        return logits.softmax(dim=-1), weights, experts

    def steered() -> tuple[Tensor, Tensor]:
        with attach(model) as knobs:
            knobs.expert_count, knobs.routing_bias, knobs.expert_cost = 3, 0.5, COST
            return gate(x)[1:]

    expected = steered()
    monkeypatch.setattr(type(gate), "forward", probabilities_first)
    assert all(torch.equal(a, b) for a, b in zip(steered(), expected, strict=True))


def test_the_blocks_own_copy_of_the_count_stays_dead():
    model = build("mixtral")
    block = model.model.layers[0].mlp
    with attach(model) as knobs:
        knobs.expert_count = 2
        assert block.top_k == 4 and gates_of(model)[0].top_k == 4
        block.top_k = 1
        assert torch.equal(logits_of(model), logits_of(build("mixtral", 2)))


@pytest.mark.parametrize(("family", "shrinks"), [("olmoe", True), ("deepseek_v2", True), ("mixtral", False)])
def test_weights_that_do_not_sum_to_one_shrink_with_the_count(family, shrinks):
    model, x = build(family), gate_input(6)
    with attach(model) as knobs:
        sums = []
        for top_k in (4, 1):
            knobs.expert_count = top_k
            sums.append(gates_of(model)[0](x)[1].sum(dim=-1))
    assert torch.all(sums[1] < sums[0]) if shrinks else torch.allclose(sums[1], sums[0])


@every_family
def test_gates_learn_through_the_weights_of_the_chosen_as_in_a_model_built_for_the_count(family):
    grads = []
    for model in (build(family), build(family, 2)):
        model.requires_grad_(True)
        with attach(model) as knobs:
            knobs.expert_count = 2
            logits_of(model).square().mean().backward()
        grads.append([gate.weight.grad for gate in gates_of(model)])
    for steered, reference in zip(*grads, strict=True):
        assert torch.any(reference != 0)
        torch.testing.assert_close(steered, reference)


@pytest.mark.gpu
@every_family
def test_steering_and_counting_never_wait_for_the_device(family):
    model, x = build(family).cuda(), gate_input(7).cuda()
    with attach(model) as knobs:
        knobs.expert_count, knobs.routing_bias, knobs.expert_cost = 2, 0.5, COST
        for gate in gates_of(model):
            gate(x)
        with no_host_wait():
            for gate in gates_of(model):
                gate(x)
            counts = knobs.tokens_per_expert
        assert counts.sum(dim=1).tolist() == [2 * len(x)] * 2
