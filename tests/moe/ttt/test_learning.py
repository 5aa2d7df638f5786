"""Dynamic evaluation of text, and learning from turned images, against references written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import ttt
from moe.data import datasets as data
from moe.data.pools import TextPool
from moe.data.streams import StreamConfig, draw_shifts, play
from moe.model.config import model_config
from moe.training.weights import load_model
from moe.ttt.rotation import rotation_loss, turned
from tests.moe.ttt.ttt_models import (
    TURNING,
    VISION,
    assert_same,
    in_group,
    make_inputs,
    make_model,
    whole_state,
)


def test_dynamic_evaluation_over_the_rms_is_that_of_the_paper():
    """Krause et al., section 4, written out: g / (rms + eps), and lambda * min(rms / mean, 1 / lambda)."""
    config = model_config("language", "tiny")
    model, settings = make_model(config), ttt.RmsDynamicEvaluation(learning_rate=0.01, decay=0.4, epsilon=0.5)
    state = ttt.start(model, settings, "norms")
    before = whole_state(model, state)
    with pytest.raises(ValueError, match="gradient_rms"):
        ttt.dynamic_evaluation(model, state, make_inputs(config, 1), settings)
    ttt.gradient_rms(model, state, [make_inputs(config, seed) for seed in (7, 8)])
    assert_same(whole_state(model, state), before)
    weights = [p for name, p in model.named_parameters() if in_group(name, "norms")]

    def gradient(inputs: Tensor) -> Tensor:
        log_p = model(inputs).logits.log_softmax(-1)[:, :-1]
        surprise = -log_p.gather(-1, inputs[:, 1:, None].long()).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(surprise, weights)])

    rms = ((gradient(make_inputs(config, 7)) ** 2 + gradient(make_inputs(config, 8)) ** 2) / 2).sqrt()
    assert state.rms is not None
    torch.testing.assert_close(torch.cat([part.flatten() for part in state.rms]), rms)
    assert (rms / rms.mean()).max() > 1 / 0.4, "nothing is clipped: the test tests too little"
    theta = first = torch.cat([weight.detach().flatten() for weight in weights])
    for seed in (1, 2):
        inputs = make_inputs(config, seed)
        pull = 0.4 * (rms / rms.mean()).clamp(max=1 / 0.4)
        theta = theta - 0.01 * gradient(inputs) / (rms + 0.5 * rms.mean()) + pull * (first - theta)
        ttt.dynamic_evaluation(model, state, inputs, settings)
        now = torch.cat([weight.detach().flatten() for weight in weights])
        torch.testing.assert_close(now, theta, rtol=1e-5, atol=1e-6)
    state.reset(model)
    assert_same(whole_state(model, state), before)
    with pytest.raises(ValueError, match="at least one batch"):
        ttt.gradient_rms(model, state, [])


def test_dynamic_evaluation_learns_the_shift_and_keeps_the_source():
    """On the shipped model: continuous lanes, each chunk scored before it is learned from."""
    settings = ttt.RmsDynamicEvaluation()
    chunk = model_config("language", "tiny").context_length
    source = data.load_language("prose", "train")[: 8 * 8 * chunk].view(8, 8, chunk)
    pool = TextPool(("clean", "code"), "cpu", "validation", chunk)
    gain = {}
    for kind, batches in (("clean", 6), ("code", 24)):
        model = load_model("language", "tiny", "cpu")
        state = ttt.start(model, settings, "last_block")
        ttt.gradient_rms(model, state, source)
        frozen = load_model("language", "tiny", "cpu")
        config = StreamConfig(task="language", kinds=(kind,), batches=batches, batch_size=8)
        nats = torch.zeros(2)
        for inputs, targets, _ in play(draw_shifts(config, pool.targets[0], 0), pool):
            following = torch.cat([inputs[:, 1:], targets[:, None]], dim=1).long()  # [B, S]
            with torch.no_grad():
                logits = [each(inputs).logits.flatten(0, 1) for each in (model, frozen)]
            nats += torch.stack([F.cross_entropy(each, following.flatten()) for each in logits])
            ttt.dynamic_evaluation(model, state, inputs, settings)
        gain[kind] = 1 - float(nats[0] / nats[1])
    assert gain["code"] > 0.03 and gain["clean"] > -0.01  # a short stream: a longer one gains more


def test_rotation_needs_a_head_and_says_how_to_get_one():
    with pytest.raises(ValueError, match="--rotation-head"):
        ttt.start(make_model(VISION), ttt.Rotation())


def test_the_loss_of_rotation_is_that_of_images_turned_by_hand():
    model = make_model(TURNING)
    images = make_inputs(TURNING, 3)
    turns = torch.arange(24) % 4
    by_hand = torch.stack([torch.rot90(image, int(n)) for image, n in zip(images, turns, strict=True)])
    assert torch.equal(turned(images, turns), by_hand)
    assert torch.equal(
        turned(images[:1], torch.tensor([1]))[0, 27 - 5, 3], images[0, 3, 5]
    )  # counter-clockwise
    logits = model(by_hand).rotation_logits
    assert logits is not None
    expected = -torch.stack([row.log_softmax(0)[n] for row, n in zip(logits, turns, strict=True)]).mean()
    torch.testing.assert_close(rotation_loss(model(by_hand), turns), expected)
