"""Attached models of every family against bare ones, against models built for another k, and by hand."""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.hf.families import FAMILIES, HfModelError
from moe.hf.steering import attach, import_transformers
from moe.model.router import BIAS_SCALE, route
from tests.moe.hf.hf_models import (
    COST,
    SHAPES,
    E,
    build,
    every_family,
    gate_input,
    gates_of,
    logits_of,
    router_logits,
    tokens,
)


def state_of(model: Any) -> list[Any]:
    """Everything that an attachment could leave behind."""
    return [
        (
            sorted(vars(m)),
            list(m._forward_hooks),
            list(m._forward_pre_hooks),
            vars(m).get("num_experts_per_tok"),
        )
        for m in model.modules()
    ]


built_once = lru_cache(build)


def test_every_known_family_is_tested():
    assert set(SHAPES) == set(FAMILIES)


# ---------------------------------------------------------------- the model's own behaviour


@every_family
def test_neutral_knobs_change_no_bit(family):
    model = build(family)
    bare, before = logits_of(model), state_of(model)
    with attach(model) as knobs:
        assert torch.equal(logits_of(model), bare)
        knobs.expert_count, knobs.routing_bias, knobs.expert_cost = 2, 1.0, COST
        assert not torch.equal(logits_of(model), bare)
        knobs.expert_count, knobs.routing_bias = 4, 0.0
        assert torch.equal(logits_of(model), bare)
        knobs.routing_bias, knobs.expert_cost = 1.0, None
        assert torch.equal(logits_of(model), bare)
        knobs.expert_cost = torch.full((E,), 0.7)  # uniform
        assert torch.equal(logits_of(model), bare)
    assert state_of(model) == before and torch.equal(logits_of(model), bare)


@every_family
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_another_count_is_the_model_built_for_it(family, top_k):
    model, reference = build(family), build(family, top_k)
    with attach(model) as knobs:
        knobs.expert_count = top_k
        assert torch.equal(logits_of(model), logits_of(reference))
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(tokens(), **settings), reference.generate(tokens(), **settings))
        knobs.routing_bias, knobs.expert_cost = 1.0, [0.5] * E  # a no-op here too
        assert torch.equal(logits_of(model), logits_of(reference))


@every_family
def test_another_count_in_bfloat16_is_the_model_built_for_it(family):
    model, reference = build(family).bfloat16(), build(family, 2).bfloat16()
    with attach(model) as knobs:
        knobs.expert_count = 2
        assert torch.equal(logits_of(model), logits_of(reference))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"first_k_dense_replace": 1}),
        ("deepseek_v3", {"first_k_dense_replace": 1}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
    ],
)
def test_layers_without_experts_are_left_alone(family, changes):
    model = build(family, **changes)
    with attach(model) as knobs:
        knobs.expert_count = 2
        assert torch.equal(logits_of(model), logits_of(build(family, 2, **changes)))
        assert knobs.tokens_per_expert.shape == (1, E)


# ---------------------------------------------------------------- the bias


def chosen_by_hand(family: str, gate: Any, x: Tensor, top_k: int, bias: float) -> list[set[int]]:
    """Chosen experts per token: score less bias times cost, one expert after another."""
    logits = router_logits(gate, x)
    if not family.startswith("deepseek"):
        return [set(row) for row in route(logits, top_k, bias, COST).experts.tolist()]
    squashed = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(dim=-1)
    score = logits if family == "deepseek_v2" else squashed
    correction = getattr(gate, "e_score_correction_bias", torch.zeros(E))
    best_of_group = 2 if family == "deepseek_v3" else 1
    chosen = []
    for t in range(len(x)):
        for_groups = (squashed[t] + correction).tolist()
        spread = score[t].double().std(correction=0).item()
        groups = [list(range(g, g + 2)) for g in range(0, E, 2)]
        groups.sort(key=lambda g: -sum(sorted((for_groups[e] for e in g), reverse=True)[:best_of_group]))
        allowed = [e for group in groups[:3] for e in group]
        excess = (COST - COST.min()).tolist()
        value = {
            e: score[t, e].item() + correction[e].item() - bias * BIAS_SCALE * spread * excess[e]
            for e in allowed
        }
        chosen.append(set(sorted(allowed, key=lambda e: -value[e])[:top_k]))
    return chosen


def weights_by_hand(family: str, gate: Any, x: Tensor, experts: Tensor) -> Tensor:
    """How each family weighs experts that are chosen: never by what the choice cost."""
    logits = router_logits(gate, x)
    softmax = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    softmax, sigmoid = softmax.gather(1, experts), (1 / (1 + (-logits).exp())).gather(1, experts)
    return {
        "olmoe": softmax,
        "mixtral": softmax / softmax.sum(dim=-1, keepdim=True),
        "qwen3_moe": softmax / softmax.sum(dim=-1, keepdim=True),
        "deepseek_v2": 1.5 * softmax,
        "deepseek_v3": 2.5 * sigmoid / sigmoid.sum(dim=-1, keepdim=True),
        "gpt_oss": softmax / softmax.sum(dim=-1, keepdim=True),
    }[family]


@every_family
@pytest.mark.parametrize(("top_k", "bias"), [(4, 0.3), (2, 1.0), (3, 0.0)])
def test_the_bias_decides_who_is_chosen_and_not_how_they_are_mixed(family, top_k, bias):
    model = build(family)
    gate, x = gates_of(model)[0], gate_input(3)
    with attach(model) as knobs:
        knobs.expert_count, knobs.routing_bias, knobs.expert_cost = top_k, bias, COST
        logits, weights, experts = gate(x)
    assert [set(row) for row in experts.tolist()] == chosen_by_hand(family, gate, x, top_k, bias)
    torch.testing.assert_close(weights, weights_by_hand(family, gate, x, experts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, router_logits(gate, x))


@every_family
@given(
    seed=st.integers(0, 999),
    top_k=st.integers(1, 6),
    costs=st.lists(st.floats(0.0, 1.0), min_size=E, max_size=E),
    biases=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
)
def test_more_bias_never_raises_the_cost_of_the_chosen(family, seed, top_k, costs, biases):
    model = built_once(family)
    gate, x, cost = gates_of(model)[1], gate_input(seed, 32), torch.tensor(costs)
    with attach(model) as knobs:
        knobs.expert_count, knobs.expert_cost = top_k, cost
        means = []
        for bias in sorted(biases):
            knobs.routing_bias = bias
            means.append(cost.double()[gate(x)[2]].mean(dim=-1))  # [T]
    assert torch.all(means[1] <= means[0] + 1e-6)


# ---------------------------------------------------------------- life and errors


@every_family
def test_an_exception_inside_the_forward_leaves_the_model_as_it_was(family):
    model = build(family)
    bare, before = logits_of(model), state_of(model)
    experts = model.model.layers[1].mlp.experts
    with pytest.raises(RuntimeError, match="no memory"), attach(model) as knobs:
        knobs.expert_count, knobs.routing_bias, knobs.expert_cost = 2, 1.0, COST
        failing = experts.register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("no memory"))
        )
        try:
            logits_of(model)
        finally:
            failing.remove()
    assert state_of(model) == before and torch.equal(logits_of(model), bare)


def test_a_model_is_attached_once_at_a_time():
    model = build("gpt_oss")
    knobs = attach(model)
    with pytest.raises(HfModelError, match="attached already"):
        attach(model)
    knobs.expert_count = 1
    knobs.detach()
    knobs.detach()
    for name, value in (("expert_count", 2), ("routing_bias", 0.5), ("expert_cost", None)):
        with pytest.raises(HfModelError, match="attach to the model again"):
            setattr(knobs, name, value)
    with attach(model) as again:
        assert again.expert_count == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("expert_count", 0, r"within 1\.\.8 of the model's 8 experts, got 0"),
        ("expert_count", 9, "got 9"),
        ("routing_bias", math.nan, r"\[0, 1\], got nan"),
        ("routing_bias", 1.5, r"\[0, 1\], got 1\.5"),
        ("routing_bias", -0.1, "got -0.1"),
        ("expert_cost", torch.ones(16), r"each of the 8 experts, got shape \(16,\)"),
        ("expert_cost", torch.ones(1, E), "got shape"),
        ("expert_cost", [math.nan] + [0.5] * 7, r"\[0, 1\], got \[nan"),
        ("expert_cost", [1.5] + [0.5] * 7, r"divide by the largest"),
    ],
)
def test_knobs_that_make_no_sense_are_refused_and_change_nothing(name, value, message):
    with attach(build("olmoe")) as knobs:
        before = (knobs.expert_count, knobs.routing_bias, knobs.expert_cost)
        with pytest.raises(HfModelError, match=message):
            setattr(knobs, name, value)
        assert (knobs.expert_count, knobs.routing_bias, knobs.expert_cost) == before


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_no_more_experts_than_the_groups_of_a_token_hold(family):
    with attach(build(family)) as knobs, pytest.raises(HfModelError, match=r"within 1\.\.6 .* 8 experts"):
        knobs.expert_count = 7
    if family == "deepseek_v2":
        with attach(build(family, topk_method="greedy")) as knobs:
            knobs.expert_count = 7


def test_models_that_cannot_be_attached_are_refused():
    transformers = import_transformers()
    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    with pytest.raises(HfModelError, match="'llama' is not a Mixture-of-Experts model"):
        attach(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)))
    unknown = transformers.AutoConfig.for_model("qwen2_moe", **small, num_experts=4, moe_intermediate_size=16)
    with pytest.raises(HfModelError, match=r"'qwen2_moe' is a family.*'olmoe'"):
        attach(transformers.AutoModelForCausalLM.from_config(unknown))
    with pytest.raises(HfModelError, match=r"Linear is not a model of transformers"):
        attach(nn.Linear(2, 2))
    with pytest.raises(HfModelError, match="no layer with experts"):
        attach(build("qwen3_moe", mlp_only_layers=[0, 1]))
    model = build("mixtral")
    del gates_of(model)[1].top_k
    with pytest.raises(HfModelError, match="MixtralTopKRouter has no 'top_k'"):
        attach(model)
    model = build("mixtral")
    gates_of(model)[1].top_k = 2
    with pytest.raises(HfModelError, match="layers differ"):
        attach(model)


def test_a_missing_or_old_transformers_is_named(monkeypatch):
    model = build("olmoe")
    for old in ("5.12.3", "4.57.0", "5.14.9.dev0"):
        monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__=old))
        with pytest.raises(HfModelError, match=rf"transformers {old} is too old.*5\.15"):
            attach(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HfModelError, match=r"pip install '\.\[hf\]'"):
        attach(model)
