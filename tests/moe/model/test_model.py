"""The transformer around the experts: shapes, elasticity, causality, types, cost arithmetic, configs."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.model.config import NORMS, ModelConfig, model_config
from moe.model.layers import GROUPS, make_norm
from moe.model.transformer import MoEModel, initialise


def make_model(task: str, **changes: Any) -> MoEModel:
    config = dataclasses.replace(model_config(task, "tiny"), **changes)
    return initialise(MoEModel(config), torch.Generator().manual_seed(0)).requires_grad_(False).eval()


def random_inputs(task: str, n: int = 4) -> torch.Tensor:
    shape = (n, 28, 28) if task == "vision" else (n, 64)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("task", ["vision", "language"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8, (1, 8)])
def test_any_top_k_answers_and_counts_every_token(task, top_k):
    model, inputs = make_model(task), random_inputs(task)
    output = model(inputs, top_k)
    expected = (4, 10) if task == "vision" else (4, 64, 256)
    assert output.logits.shape == expected
    assert output.logits.dtype == torch.float32
    n_tokens = 4 * model.config.tokens_per_sample
    per_layer = (top_k, top_k) if isinstance(top_k, int) else top_k
    assert output.tokens_per_expert.sum(dim=1).tolist() == [n_tokens * k for k in per_layer]
    probabilities = output.logits.softmax(-1)
    torch.testing.assert_close(output.confidence, probabilities.amax(-1))
    entropy = torch.distributions.Categorical(probabilities).entropy() / math.log(expected[-1])
    torch.testing.assert_close(output.entropy, entropy)
    assert torch.equal(output.predictions, probabilities.argmax(-1))


def test_default_top_k_is_the_config_s():
    model, images = make_model("vision"), random_inputs("vision")
    assert torch.equal(model(images).logits, model(images, model.config.top_k).logits)


@pytest.mark.parametrize("top_k", [0, 9, [1], [1, 2, 4]])
def test_bad_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k"):
        make_model("vision")(random_inputs("vision"), top_k)


def test_language_never_looks_ahead_and_takes_shorter_contexts():
    model, text = make_model("language"), random_inputs("language")
    changed = text.clone()
    changed[:, 40:] = 255 - changed[:, 40:]
    a, b = model(text).logits, model(changed).logits
    torch.testing.assert_close(a[:, :40], b[:, :40])
    assert not torch.allclose(a[:, 40:], b[:, 40:])
    torch.testing.assert_close(model(text[:, :13]).logits, a[:, :13])
    with pytest.raises(ValueError, match="context_length is 64"):
        model(torch.zeros(1, 65, dtype=torch.uint8))


def test_served_answers_do_not_depend_on_the_rest_of_the_batch():
    model, images = make_model("vision"), random_inputs("vision", 6)
    torch.testing.assert_close(model(images).logits[:2], model(images[:2]).logits)


def test_patches_are_the_image_s_squares():
    model = make_model("vision")
    with torch.no_grad():
        model.position.zero_()
    blank = torch.zeros(1, 28, 28, dtype=torch.uint8)
    marked = blank.clone()
    marked[0, 8, 20] = 255  # row 1, column 2 of the 4 x 4 patches
    differs = (model.embed_inputs(blank) != model.embed_inputs(marked)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [6]


def test_routing_bias_lowers_cost_and_zero_is_bit_identical():
    model, images = make_model("vision"), random_inputs("vision", 16)
    plain = model(images, 2)
    assert torch.equal(plain.logits, model(images, 2, 0.0).logits)
    assert torch.equal(plain.logits, model(images, 2, 1.0, torch.full((8,), 0.3)).logits)
    biased = model(images, 2, torch.tensor(1.0))
    cost = [model.expert_cost[output.routing[0].experts].mean() for output in (plain, biased)]
    assert cost[1] < cost[0]


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_keeps_router_and_norms_in_float32(norm):
    model, images = make_model("vision", norm=norm), random_inputs("vision")
    reference = model(images, 8).logits
    model.cast_weights(torch.bfloat16)
    low = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert low
    assert all(("router" in name or "norm" in name) != (name in low) for name, _ in model.named_parameters())
    assert (model(images, 8).logits - reference).abs().max() < 0.1


def by_torch(norm: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What torch makes of [B, S, D], channels last, training or not having seen a batch."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias)
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    first = x.transpose(1, 2)  # [B, D, S], as torch wants it
    if norm == "group":
        return F.group_norm(first, GROUPS, weight, bias).transpose(1, 2)
    return F.batch_norm(first, None, None, weight, bias, training=True).transpose(1, 2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_torch(norm, dtype):
    source = torch.Generator().manual_seed(0)
    module: Any = make_norm(dataclasses.replace(model_config("vision", "tiny"), norm=norm))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=source)
    x = (3 * torch.randn(5, 16, 64, generator=source) + 1).to(dtype)
    bias = getattr(module, "bias", torch.zeros(64))
    result = module.train()(x)
    assert result.dtype == dtype and {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    want = by_torch(norm, x.double(), module.weight.double(), bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(result.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("norm", NORMS)
def test_only_a_batch_norm_lets_an_answer_depend_on_the_batch(norm):
    model, images = make_model("vision", norm=norm).train(), random_inputs("vision", 6)
    alone, together = model(images[:2], 8).logits, model(images, 8).logits[:2]
    assert torch.allclose(alone, together, atol=1e-5) == (norm != "batch")


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_text_never_looks_ahead_with_either_norm(norm):
    model, text = make_model("language", norm=norm), random_inputs("language")
    changed = text.clone()
    changed[:, 40:] = 255 - changed[:, 40:]
    torch.testing.assert_close(model(text).logits[:, :40], model(changed).logits[:, :40])


@pytest.mark.parametrize("task", ["vision", "language"])
@pytest.mark.parametrize("top_k", [1, 8])
def test_flops_against_torch_s_counter(task, top_k):
    """Equal widths, so that the mean over experts is exact; the counter may not know grouped products."""
    model = make_model(task, expert_widths=(64,) * 8)
    inputs = random_inputs(task)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, top_k)
    config = model.config
    n_tokens = inputs.shape[0] * config.tokens_per_sample
    grouped = n_tokens * config.n_layers * top_k * 6 * config.d_model * 64
    counted = counter.get_total_flops()
    by_operator = counter.get_flop_counts()["Global"]
    if not any("grouped_mm" in str(operator) for operator in by_operator):
        counted += grouped
    assert model.flops_per_token(top_k) * n_tokens == pytest.approx(counted, rel=0.02)


def test_parameter_counts():
    model = make_model("vision")
    assert model.n_params == sum(p.numel() for p in model.parameters())
    assert model.n_active_params(8) == model.n_params
    per_expert = 3 * 64 * (160 + 96) / 2 * 2  # SwiGLU, mean width, two layers
    assert model.n_active_params(8) - model.n_active_params(7) == pytest.approx(per_expert)


def test_initialisation_is_reproducible_and_complete():
    config = model_config("language", "tiny")
    models = []
    for filler in (torch.nan, 7.0):
        model = MoEModel(config)
        for parameter in model.parameters():
            parameter.data.fill_(filler)  # what initialise forgets would differ
        models.append(initialise(model, torch.Generator().manual_seed(3)))
    for (name, a), (_, b) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_rotation_head_adds_its_weights_and_answers_and_no_more():
    without, turning = make_model("vision"), make_model("vision", rotation_head=True)
    plain, more = without.state_dict(), turning.state_dict()
    assert more.pop("rotation_head.weight").shape == (4, 64)
    assert list(more) == list(plain)
    assert all(torch.equal(more[name], plain[name]) for name in plain)
    images = random_inputs("vision", 3)
    assert torch.equal(turning(images).logits, without(images).logits)
    turns = turning(images).rotation_logits
    assert without(images).rotation_logits is None and turns is not None
    assert turns.shape == (3, 4) and turns.dtype == torch.float32
    assert "rotation_head" not in without.config.to_dict()  # so hashes of it are what they were
    for model in (without, turning):
        assert ModelConfig.from_dict(model.config.to_dict()) == model.config
    assert turning.flops_per_token(1) - without.flops_per_token(1) == 2 * 64 * 4 / 16


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"expert_widths": (100,) * 8}, "multiple of 8"),
        ({"d_model": 60}, "multiple of 8"),
        ({"expert_widths": (96,) * 4 + (160,) * 4}, "widest first"),
        ({"expert_widths": (0,) * 8}, "one positive"),
        ({"top_k": 3}, "top_k_choices"),
        ({"top_k_choices": (1, 2, 16)}, "top_k_choices"),
        ({"n_kv_heads": 3}, "n_heads"),
        ({"patch_size": 5}, "patch_size"),
        ({"norm": "instance"}, "norm"),
        ({"task": "audio"}, "task"),
        ({"task": "language"}, "'batch' mixes a token with later ones"),
        ({"task": "language", "norm": "group"}, "'group' mixes a token with later ones"),
        ({"task": "language", "norm": "rms", "rotation_head": True}, "rotation_head is for images"),
        ({"n_layers": 0}, "n_layers"),
    ],
)
def test_broken_configs_are_refused(changes, rule):
    with pytest.raises(ValueError, match=rule):
        dataclasses.replace(model_config("vision", "tiny"), **changes)


@pytest.mark.parametrize("task", ["vision", "language"])
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_configs_survive_a_dictionary(task, size):
    config = model_config(task, size)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="n_expert"):
        ModelConfig.from_dict({**config.to_dict(), "n_expert": 4})
    with pytest.raises(ValueError, match="d_model"):
        ModelConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "d_model"})


def test_unknown_task_or_size_is_refused():
    with pytest.raises(ValueError, match="huge"):
        model_config("vision", "huge")
