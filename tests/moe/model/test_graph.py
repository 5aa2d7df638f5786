"""Knobs held by the device: the same answers as knobs held by the host, with a CUDA graph and without."""

import math

import pytest
import torch

from moe.data.datasets import load_vision
from moe.model.graph import CapturedModel, RoutingControls
from moe.training.weights import load_model

KNOBS = [(4, 0.0), (1, 0.0), (8, 1.0), (2, 0.5), (4, 0.0)]


@pytest.mark.parametrize(("top_k", "bias"), KNOBS)
def test_device_knobs_give_the_answers_of_host_knobs(top_k, bias):
    model = load_model("vision", "tiny", "cpu")
    images = load_vision("test")[0][:64]
    controls = RoutingControls(model)
    controls.set(top_k=top_k, routing_bias=bias)
    with torch.no_grad():
        expected = model(images, top_k, bias)
        found = model(images, controls.top_k, controls.routing_bias, controls.expert_cost)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.tokens_per_expert, expected.tokens_per_expert)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 9}, r"top_k must be within 1\.\.8, got 9"),
        ({"top_k": 0}, r"top_k must be within 1\.\.8, got 0"),
        ({"routing_bias": math.nan}, "routing_bias must be a finite number"),
        ({"expert_cost": torch.ones(5)}, "cost table of another model"),
        ({"expert_cost": torch.full((8,), math.nan)}, r"expert_cost must lie in \[0, 1\]"),
        ({"expert_cost": torch.full((8,), 1.5)}, r"expert_cost must lie in \[0, 1\]"),
    ],
)
def test_bad_knobs_are_refused_and_change_nothing(values, message):
    controls = RoutingControls(load_model("vision", "tiny", "cpu"))
    before = [controls.top_k.clone(), controls.routing_bias.clone(), controls.expert_cost.clone()]
    with pytest.raises(ValueError, match=message):
        controls.set(**({"top_k": 2, "routing_bias": 0.5} | values))
    for old, new in zip(before, [controls.top_k, controls.routing_bias, controls.expert_cost], strict=True):
        assert torch.equal(old, new)


def test_a_graph_needs_cuda():
    model = load_model("vision", "tiny", "cpu")
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device"):
        CapturedModel(model, load_vision("test")[0][:4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_follows_knobs_and_costs_changed_between_replays():
    model = load_model("vision", "tiny", "cuda")
    images = load_vision("test")[0].cuda()
    captured = CapturedModel(model, images[:256])
    for step, (top_k, bias) in enumerate(KNOBS):
        batch = images[256 * step : 256 * (step + 1)]
        cost = model.expert_cost.flip(0) if step == 2 else model.expert_cost
        captured.controls.set(top_k, bias, cost)
        found = captured(batch)
        with torch.no_grad():
            expected = model(batch, top_k, bias, cost)
        torch.testing.assert_close(found.logits, expected.logits, rtol=2e-2, atol=2e-2)
        assert torch.equal(found.tokens_per_expert.sum(-1), expected.tokens_per_expert.sum(-1))
        moved = (found.tokens_per_expert - expected.tokens_per_expert).abs().sum()
        assert moved <= 0.01 * expected.tokens_per_expert.sum()  # near ties of bfloat16
    with pytest.raises(ValueError, match="one graph per shape"):
        captured(images[:8])
