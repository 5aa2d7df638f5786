"""Test-time training: what it touches, that it can be undone exactly, and that it helps under a shift."""

import copy
import math

import pytest
import torch

from moe import ttt
from moe.data.corruptions import corrupt
from moe.data.datasets import load_vision
from moe.model.config import model_config
from moe.model.layers import BatchNorm
from moe.model.transformer import MoEModel, initialise
from moe.training.evaluate import evaluate_vision
from moe.training.weights import load_model


@pytest.fixture
def model() -> MoEModel:
    return initialise(MoEModel(model_config("vision", "tiny")), torch.Generator().manual_seed(0))


@pytest.fixture
def optimizer(model: MoEModel) -> torch.optim.Optimizer:
    return ttt.start(model, ttt.Tent()).descent


def images(seed: int, n: int = 32) -> torch.Tensor:
    return torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_only_norms_adapt_and_serving_stays_in_eval_mode(model, optimizer):
    parameters, names = ttt.collect_params(model)
    assert 0 < len(parameters) < len(list(model.parameters()))
    assert all("norm" in name for name in names)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entropy = ttt.adapt(model, optimizer, images(1), top_k=4)
    assert 0 <= entropy.item() <= 1
    assert not entropy.requires_grad
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("norm" in name for name in changed)
    assert not any(module.training for module in model.modules())


def test_statistics_move_toward_the_batch_by_the_momentum(model, optimizer):
    """The first norm sees the embedded images, so its running mean can be computed by hand."""
    norm, batch = model.blocks[0].attention_norm, images(2)
    old = norm.running_mean.clone()
    tokens = model.embed_inputs(batch).flatten(0, 1)  # [T, D]
    ttt.adapt(model, optimizer, batch, top_k=2)
    momentum = ttt.STATISTICS_MOMENTUM
    torch.testing.assert_close(norm.running_mean, (1 - momentum) * old + momentum * tokens.mean(0))


def test_adapt_is_tent_bit_for_bit(model, optimizer):
    """The method written out once more: batch statistics, mean entropy, SGD with momentum."""
    other = copy.deepcopy(model)
    norms = [module for module in other.modules() if isinstance(module, BatchNorm)]
    weights = [weight for norm in norms for weight in (norm.weight, norm.bias)]
    velocity: list[torch.Tensor] = []
    for step, (top_k, bias) in enumerate([(4, 0.0), (2, 0.3), (8, 0.0)]):
        loss = ttt.adapt(model, optimizer, images(step), top_k, bias)
        for norm in norms:
            norm.train()
        log_p = other(images(step), top_k, bias).logits.log_softmax(dim=-1)
        for norm in norms:
            norm.eval()
        expected = (-(log_p.exp() * log_p).sum(dim=-1) / math.log(10)).mean()
        gradient = torch.autograd.grad(expected, weights)
        velocity = [v * 0.9 + g for v, g in zip(velocity, gradient, strict=True)] if velocity else [*gradient]
        with torch.no_grad():
            for weight, v in zip(weights, velocity, strict=True):
                weight.add_(v, alpha=-1e-3)
        assert torch.equal(loss, expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_method_tent_takes_the_service_s_steps(model, optimizer):
    other = copy.deepcopy(model)
    settings = ttt.Tent()
    state = ttt.start(other, settings)
    for step in range(3):
        ttt.adapt(model, optimizer, images(step), 4, 0.2)
        ttt.tent(other, state, images(step), settings, 4, 0.2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_repeated_steps_on_one_batch_lower_its_entropy(model, optimizer):
    with torch.no_grad():
        model.head.weight.mul_(100)  # an untrained head answers evenly, where the entropy is flat
    entropies = [ttt.adapt(model, optimizer, images(5), top_k=8).item() for _ in range(15)]
    assert entropies[-1] < entropies[0] - 0.005


def test_an_entropy_that_is_no_number_stops_before_the_step(model, optimizer):
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    before = [parameter.clone() for parameter in ttt.collect_params(model)[0]]
    with pytest.raises(ttt.AdaptationDiverged, match="restore"):
        ttt.adapt(model, optimizer, images(6), top_k=4)
    assert all(torch.equal(a, b) for a, b in zip(ttt.collect_params(model)[0], before, strict=True))
    assert not any(module.training for module in model.modules())


def test_adaptation_recovers_accuracy_under_a_severe_shift():
    """Stream and scored images are disjoint; labels are used for scoring only."""
    model = load_model("vision", "tiny", "cpu")
    optimizer = ttt.start(model, ttt.Tent()).descent
    clean, labels = load_vision("test", full=False)
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
    shifted = corrupt(clean[order], "contrast", 5, torch.Generator().manual_seed(0))
    stream, held_out, answers = shifted[:2560], shifted[-600:], labels[order][-600:]
    before = evaluate_vision(model, held_out, answers, top_k=2)
    for batch in stream.split(256):
        ttt.adapt(model, optimizer, batch, top_k=2)
    after = evaluate_vision(model, held_out, answers, top_k=2)
    assert after > before + 0.1, f"accuracy {before} before, {after} after ten steps"
