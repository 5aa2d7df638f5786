"""The convolutional stem against torch's own convolutions, and what it changes of a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.model.config import NORMS, ModelConfig, model_config
from moe.model.transformer import MoEModel, initialise
from moe.model.variants import with_norm, with_stem

CONFIG = with_stem(model_config("vision", "tiny"))


def make_model(config: ModelConfig = CONFIG) -> MoEModel:
    return initialise(MoEModel(config), torch.Generator().manual_seed(0))


def images(n: int = 6) -> Tensor:
    return torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_pixels_behind_the_stages_written_out_in_torch():
    model = make_model().train()
    weights = {name.removeprefix("embed."): w for name, w in model.named_parameters()}
    x = (images().float() / 127.5 - 1)[:, None]  # [B, 1, 28, 28]
    for i, side in enumerate((14, 7, 4)):

        def convolved(x: Tensor, name: str, stride: int, i: int = i) -> Tensor:
            out = F.conv2d(x, weights[f"stages.{i}.{name}.weight"], stride=stride, padding=1)
            return F.batch_norm(out, None, None, training=True)  # gains are one, offsets zero

        x = convolved(x, "down", 2).relu()
        x = (x + convolved(convolved(x, "first", 1).relu(), "second", 1)).relu()
        assert x.shape[-1] == side
    tokens = torch.einsum("bwij,dw->bijd", x, weights["project.weight"]).flatten(1, 2)
    torch.testing.assert_close(model.embed_inputs(images()), tokens + model.position, rtol=1e-4, atol=1e-4)


def test_the_first_norm_takes_in_the_first_features():
    for config in (CONFIG, model_config("vision", "tiny")):
        model = make_model(config).train()
        taken = model.first_features(images()).flatten(0, 1)
        model(images())
        norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d))
        torch.testing.assert_close(norm.running_mean, 0.1 * taken.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * taken.var(0))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_stands_in_the_stem_too_and_all_weights_learn(norm):
    model = make_model(with_norm(CONFIG, norm)).train()
    kinds = {type(module) for name, module in model.named_modules() if name.endswith("norm")}
    assert len(kinds) == 1
    assert sum(name.endswith("norm") for name, _ in model.named_modules()) == 9 + 2 * 2 + 1
    model(images(), 8).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.embed.parameters())


def test_in_low_precision_the_norms_stay_in_full():
    model = make_model().eval()
    reference = model(images(), 8).logits
    model.cast_weights(torch.bfloat16)
    assert all(("norm" in name) != (p.dtype == torch.bfloat16) for name, p in model.embed.named_parameters())
    assert (model(images(), 8).logits - reference).abs().max() < 0.1


def test_operations_are_counted():
    model = make_model().eval()
    with FlopCounterMode(display=False) as counter:
        model.embed(images(1).float())
    flat = make_model(dataclasses.replace(CONFIG, stem=()))
    more = 16 * (model.flops_per_token(4) - flat.flops_per_token(4))
    assert more == counter.get_total_flops() - 2 * 16 * 49 * 64


def test_a_config_without_a_stem_says_nothing_of_it():
    without = model_config("vision", "tiny")
    assert "stem" not in without.to_dict() and ModelConfig.from_dict(without.to_dict()) == without
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG and CONFIG.tokens_per_sample == 16
    assert with_stem(model_config("vision", "base")).stem == (64, 128, 256)


@pytest.mark.parametrize("stem", [(12,), (0,), (-8, 8)])
def test_widths_that_group_norms_cannot_take_are_refused(stem):
    with pytest.raises(ValueError, match="multiple of 8"):
        dataclasses.replace(CONFIG, stem=stem)
    with pytest.raises(ValueError, match="stem is for images"):
        with_stem(model_config("language", "tiny"))
