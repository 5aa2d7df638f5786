"""Re-centring, weighted self-training and forward-only steps against second copies that share no code."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import ttt
from moe.data.corruptions import corrupt
from moe.data.datasets import load_vision
from moe.model.layers import BatchNorm
from moe.model.transformer import MoEModel
from moe.training.weights import load_model
from tests.moe.ttt.ttt_models import (
    GROUP_VISION,
    LAYER_VISION,
    VISION,
    assert_same,
    make_inputs,
    make_model,
    whole_state,
)


def features(model: MoEModel, inputs: Tensor) -> Tensor:
    """What the classifier takes in, [B, D]."""
    taken = []
    hook = model.head.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    model(inputs)
    hook.remove()
    return taken[0]


def adapting(model: MoEModel, inputs: Tensor) -> Tensor:
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.train()
    logits = model(inputs).logits
    for norm in norms:
        norm.eval()
    return logits


@pytest.mark.parametrize("config", [VISION, LAYER_VISION, GROUP_VISION], ids=lambda config: config.norm)
def test_logits_are_those_of_features_less_their_running_mean(config):
    """NEO in the space of features: subtract a mean that starts at zero and follows the batches."""
    model, settings = make_model(config), ttt.Neo(centre_momentum=0.3)
    other, centre = copy.deepcopy(model), torch.zeros(64)
    state = ttt.start(model, settings)
    for seed in range(4):
        inputs = make_inputs(config, seed)
        assert ttt.neo(model, state, inputs, settings) == ttt.Step(selected=24)
        h = features(other, inputs)
        centre = 0.7 * centre + 0.3 * h.mean(0)
        probe = make_inputs(config, seed + 10)
        expected = (features(other, probe) - centre) @ other.head.weight.T
        torch.testing.assert_close(model(probe).logits, expected, rtol=1e-3, atol=1e-3)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, other.state_dict()[n])}
    assert changed == {"norm.bias"}


def test_the_answers_of_the_service_spare_the_pass():
    model, settings = make_model(VISION), ttt.Neo()
    state, inputs = ttt.start(model, settings), make_inputs(VISION, 1)
    answers = model(inputs).logits
    ttt.neo(model, state, inputs, settings)
    moved = model.get_parameter("norm.bias").clone()
    state.reset(model)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    ttt.neo(model, state, inputs, settings, answers=answers)
    assert not passes and torch.equal(model.get_parameter("norm.bias"), moved)
    adapter = ttt.Adapter(model, settings, guard=None)
    assert adapter.adapt(inputs, answers, 3) == 3
    assert len(passes) == 2  # the second and third step know of no answers


def test_on_batch_statistics_it_takes_the_mean_of_the_adapting_pass_away():
    model = make_model(VISION)
    with torch.no_grad():
        model.get_parameter("norm.bias").normal_(generator=torch.Generator().manual_seed(0))
    settings = ttt.Neo(base=ttt.BatchStatistics(), centre_momentum=1.0)
    state, plain = ttt.start(model, settings), copy.deepcopy(model)
    inputs = make_inputs(VISION, 1)
    mean = adapting(plain, inputs).mean(0)
    ttt.neo(model, state, inputs, settings)
    probe = make_inputs(VISION, 2)
    torch.testing.assert_close(model(probe).logits, plain(probe).logits - mean, rtol=1e-3, atol=1e-3)
    assert adapting(model, inputs).mean(0).abs().max() < 1e-3 < mean.abs().max()


def test_two_weighted_steps_equal_the_textbook():
    settings = ttt.Roid(learning_rate=0.01, momentum=0.0, source_share=0.1, temperature=0.5)
    model = make_model(VISION)
    other = copy.deepcopy(model)
    state = ttt.start(model, settings)
    weights = [p.requires_grad_() for name, p in other.named_parameters() if "norm" in name]
    first = [w.detach().clone() for w in weights]
    for norm in other.modules():
        if isinstance(norm, BatchNorm):
            norm.momentum = settings.statistics_momentum
    seen = torch.full((10,), 0.1)
    for seed in (1, 2):
        inputs = make_inputs(VISION, seed)
        loss = ttt.roid(model, state, inputs, settings).loss
        p = adapting(other, inputs).softmax(-1)
        q = p.detach()
        unlike = 1 - (q @ seen) / (q.norm(dim=1) * seen.norm())
        sure = (q * q.log()).sum(1)
        unlike, sure = ((v - v.min()) / (v.max() - v.min()) for v in (unlike, sure))
        weight = torch.exp(unlike * sure / 0.5) * (unlike >= unlike.mean())
        assert 0 < int((weight > 0).sum()) < 24
        clipped = p.clamp(1e-5, 1 - 1e-5)
        expected = (weight * -(clipped * (clipped / (1 - clipped)).log()).sum(1)).mean()
        torch.testing.assert_close(loss, expected.detach())
        gradients = torch.autograd.grad(expected, weights)
        with torch.no_grad():
            for w, g, start in zip(weights, gradients, first, strict=True):
                w.copy_(0.9 * (w - 0.01 * g) + 0.1 * start)
        seen = q.mean(0) if seed == 1 else 0.9 * seen + 0.1 * q.mean(0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def size_free_loss(model: MoEModel, image: Tensor) -> Tensor:
    z = model(image).logits[0]
    z = z - z.mean()
    p = (z / z.norm()).softmax(0)
    return -(p * p.log()).sum() / math.log(10)


def test_a_forward_only_step_is_the_mean_of_two_sided_differences_of_models_of_one_image_each():
    settings = ttt.Eva(learning_rate=0.5, momentum=0.0, source_share=0.0, perturbation=0.01)
    model, inputs = make_model(LAYER_VISION), make_inputs(LAYER_VISION, 1, n=3)
    source, state = copy.deepcopy(model), ttt.start(model, settings)
    graphs = []
    hook = model.register_forward_hook(lambda module, args, out: graphs.append(out.logits.requires_grad))
    ttt.eva(model, state, inputs, settings)
    hook.remove()
    assert graphs == [False, False]
    generator = torch.Generator().manual_seed(0)  # the number of the step
    signs = {n: 2.0 * torch.randint(2, (3, 64), generator=generator) - 1 for n in state.names}
    expected = {n: torch.zeros(64) for n in state.names}
    for i in range(3):
        losses = []
        for side in (0.01, -0.01):
            other = copy.deepcopy(source)
            for name in state.names:
                other.get_parameter(name).data.add_(signs[name][i], alpha=side)
            losses.append(size_free_loss(other, inputs[i : i + 1]))
        slope = (losses[0] - losses[1]) / 0.02
        expected = {n: e + slope * signs[n][i] / 3 for n, e in expected.items()}
    for name, gradient in expected.items():
        moved = source.get_parameter(name) - model.get_parameter(name)
        torch.testing.assert_close(moved.detach(), 0.5 * gradient, rtol=0.02, atol=2e-4, msg=name)


def test_a_larger_scale_of_the_logits_is_no_gain_of_forward_only_steps():
    model, inputs = make_model(VISION), make_inputs(VISION, 1)
    state = ttt.start(model, ttt.Eva())
    losses = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            model.head.weight.mul_(factor)
        step = ttt.eva(model, state, inputs, ttt.Eva())
        losses.append(step.loss)
        state.reset(model)
    torch.testing.assert_close(losses[0], losses[1])


def test_source_share_pulls_back_to_the_start():
    model = make_model(VISION)
    pairs: list[tuple[Any, Any]] = [(ttt.Roid, ttt.roid), (ttt.Eva, ttt.eva)]
    for make, step in pairs:
        settings = make(source_share=1.0, learning_rate=0.1)
        state = ttt.start(model, settings)
        before = whole_state(model, state)
        step(model, state, make_inputs(VISION, 1), settings)
        now = whole_state(model, state)
        assert_same(*({n: t[n] for n in state.names} for t in (now, before)))
        state.reset(model)


def test_re_centring_recovers_accuracy_without_a_pass():
    """Stream and scored images are disjoint; labels are used for scoring only."""
    model = load_model("vision", "tiny", "cpu")
    images, labels = load_vision("test", full=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shifted, labels = corrupt(images[order], "blur", 5, torch.Generator().manual_seed(0)), labels[order]
    adapter = ttt.Adapter(model, ttt.Neo())

    def score() -> float:
        with torch.no_grad():
            return (model(shifted[-1000:]).predictions == labels[-1000:]).float().mean().item()

    before = score()
    for batch in shifted[:256].split(32):
        with torch.no_grad():
            answers = model(batch).logits
        adapter.adapt(batch, answers, 1)
    after = score()
    adapter.reset()
    assert after > before + 0.1 and score() == before
