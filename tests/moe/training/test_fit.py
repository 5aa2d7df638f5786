"""Training learns, checkpoints survive interruption and refuse damage, and the shipped weights are good."""

import dataclasses
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moe.data import datasets as data
from moe.device.torch_device import pick_device
from moe.model.config import NORMS, model_config
from moe.model.losses import chosen_energy, load_balance_loss, router_z_loss
from moe.model.transformer import MoEModel, initialise
from moe.model.variants import with_norm, with_rotation_head
from moe.training import weights
from moe.training.checkpoint import WeightsError, load_checkpoint, save_checkpoint
from moe.training.energy_loss import ASSUMED
from moe.training.evaluate import evaluate_language, evaluate_vision
from moe.training.fit import Arguments, TrainingDiverged, main, mirror, train
from moe.training.recipes import RECIPES, Recipe
from moe.training.weights import load_model, training_record, weights_path
from moe.ttt.rotation import rotation_loss, turned

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    model_config("vision", "tiny"),
    d_model=32,
    n_layers=1,
    expert_widths=(32, 32, 16, 16),
    top_k=2,
    top_k_choices=(1, 2, 4),
)
RECIPE = Recipe(batch_size=64, steps=40, learning_rate=5e-3, warmup_steps=5)


@pytest.fixture
def stripes(monkeypatch):
    """A problem of two classes, light above or light below, in place of the real data."""
    images = torch.randint(60, (600, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(600) % 2
    images[labels == 0, :14] += 120
    images[labels == 1, 14:] += 120
    monkeypatch.setattr(data, "load_vision", lambda split, full=None: (images, labels))
    monkeypatch.setattr(data, "data_digest", lambda task, full=None: "0" * 64)


@pytest.fixture
def clothes(monkeypatch):
    """Part of the shipped images, whatever else is installed."""
    images, labels = data.load_vision("test", False)
    splits = {"train": data.load_vision("train", False), "test": (images[:600], labels[:600])}
    monkeypatch.setattr(data, "load_vision", lambda split, full=None: splits[split])
    monkeypatch.setattr(data, "data_digest", lambda task, full=None: "0" * 64)


@pytest.fixture
def letters(monkeypatch):
    """A text whose next byte is certain."""
    text = torch.tensor(list(b"the quick brown fox jumps over a lazy dog; " * 200), dtype=torch.uint8)
    monkeypatch.setattr(data, "load_language", lambda domain, split: text)
    monkeypatch.setattr(data, "data_digest", lambda task, full=None: "0" * 64)


@pytest.fixture
def saved(tmp_path):
    """A small untrained model on disk."""
    model = initialise(MoEModel(SMALL), torch.Generator().manual_seed(0))
    path = tmp_path / "vision-small.safetensors"
    save_checkpoint(model, _record(), path)
    return model, path


def _record():
    from moe.training.checkpoint import TrainingRecord

    return TrainingRecord(
        config=SMALL.to_dict(), seed=0, steps=0, date="2026-01-01T00:00:00+00:00", machine="CPU", torch="2",
        data_sha256="0" * 64, quality={"2": {"accuracy": 0.1}},
    )  # fmt: skip


def test_training_learns_for_every_top_k_and_is_reproducible(stripes):
    model, record = train(SMALL, RECIPE, CPU, seed=1)
    assert set(record.quality) == {"1", "2", "4"}
    assert all(quality["accuracy"] > 0.95 for quality in record.quality.values())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again, _ = train(SMALL, RECIPE, CPU, seed=1)
    other, _ = train(SMALL, RECIPE, CPU, seed=2)
    assert torch.equal(model.head.weight, again.head.weight)
    assert not torch.equal(model.head.weight, other.head.weight)


def test_language_training_learns(letters):
    shape = {"d_model": 32, "n_layers": 1, "expert_widths": (32, 16), "top_k": 1, "top_k_choices": (1, 2)}
    config = dataclasses.replace(model_config("language", "tiny"), context_length=32, **shape)
    _, record = train(config, dataclasses.replace(RECIPE, steps=60, batch_size=16, learning_rate=2e-2), CPU)
    for quality in record.quality.values():
        assert quality["prose_accuracy"] > 0.6
        assert quality["prose_bits_per_byte"] < 3


def test_a_loss_that_is_no_number_stops_the_training(stripes):
    with pytest.raises(TrainingDiverged, match="step 20"):
        train(SMALL, dataclasses.replace(RECIPE, z_coefficient=math.nan), CPU)


@pytest.mark.parametrize(
    "change",
    [{"energy_lambda": 0.5, "z_coefficient": math.nan}, {"energy_budget": 0.9, "learning_rate": 1e30}],
)
def test_energy_hides_no_divergence(stripes, change):
    with pytest.raises(TrainingDiverged, match="the loss is nan"):
        train(SMALL, dataclasses.replace(RECIPE, **change), CPU)


def test_without_energy_the_training_is_the_plain_one_bit_for_bit(stripes):
    recipe = dataclasses.replace(RECIPE, steps=4)
    model, record = train(SMALL, recipe, CPU, seed=3)
    off = dataclasses.replace(recipe, energy_lambda=0.0, balance_rate=9.0)
    again, _ = train(SMALL, off, CPU, 3, torch.arange(4.0))
    plain = _plain_training(recipe, seed=3)
    for other in (again, plain):
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert record.energy is None


def _plain_training(recipe, seed):
    """Answers, balance and small logits, as the shipped models were trained."""
    model = initialise(MoEModel(SMALL), torch.Generator().manual_seed(seed)).train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    top_ks, generator = random.Random(seed), torch.Generator().manual_seed(seed + 1)
    images, labels = data.load_vision("train")
    order = torch.randperm(len(images), generator=generator)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            recipe.learning_rate * (step + 1) / recipe.warmup_steps
        )
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        output = model(mirror(images[chosen], generator), top_ks.choices(SMALL.top_k_choices, k=1))
        (routing,) = output.routing
        loss = F.cross_entropy(output.logits, labels[chosen]) + 0.01 * load_balance_loss(routing)
        loss = loss + 1e-3 * router_z_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def _chosen_energy(model, top_k):
    images, _ = data.load_vision("test")
    return chosen_energy(model(images, top_k).tokens_per_expert, model.expert_cost).mean().item()


@pytest.mark.parametrize("balance_bias", [False, True], ids=["loss", "bias"])
def test_a_price_on_energy_moves_tokens_to_cheap_experts_and_a_budget_is_held(clothes, balance_bias):
    config = dataclasses.replace(SMALL, balance_bias=balance_bias)
    recipe = dataclasses.replace(RECIPE, steps=120)
    cheap, record = train(config, dataclasses.replace(recipe, energy_lambda=1.0), CPU)
    assert _chosen_energy(cheap, 1) < 0.75  # the cheapest possible is 0.667
    assert _chosen_energy(cheap, 2) < 0.92
    assert _chosen_energy(cheap, 4) == pytest.approx(1)
    assert record.quality["2"]["accuracy"] > 0.5
    assert record.energy is not None
    assert record.energy["cost_source"] == ASSUMED
    held, record = train(config, dataclasses.replace(recipe, energy_budget=0.9), CPU)
    assert _chosen_energy(held, config.top_k) == pytest.approx(0.9, rel=0.05)
    assert record.energy is not None
    assert record.energy["lambda"] > 0


def test_a_balance_bias_takes_the_place_of_the_balance_loss(stripes):
    no_loss = dataclasses.replace(RECIPE, balance_coefficient=math.nan)
    model, _ = train(dataclasses.replace(SMALL, balance_bias=True), no_loss, CPU, seed=1)
    bias = model.state_dict()["blocks.0.moe.router.balance_bias"]
    assert bias.abs().max() > 0.01
    assert bias.sum().item() == pytest.approx(0, abs=1e-6)


def test_the_command_saves_a_variant_under_its_own_name_and_reports_it(
    stripes, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(RECIPES, ("vision", "tiny"), dataclasses.replace(RECIPE, steps=2))
    arguments = Arguments(
        task="vision", device="cpu", out=tmp_path, even=True, zero_computation=("zero", "constant"),
        fixed_k=2, balance="bias", energy_budget=0.9, report=True,
    )  # fmt: skip
    main(arguments)
    path = tmp_path / "vision-tiny-zero-constant-even-k2-bias-budget0.9.safetensors"
    model, record = load_checkpoint(path)
    assert model.config.expert_widths == (128,) * 8 + (0, 0)
    assert model.config.top_k_choices == (2,)
    assert record.config == model.config.to_dict()
    report = json.loads(path.with_suffix(".report.json").read_text())
    assert list(report["top_k"]) == [str(k) for k in range(1, 9)]
    assert [row["trained"] for row in report["top_k"].values()] == [k == 2 for k in range(1, 9)]
    for row in report["top_k"].values():
        share = row["share"]
        assert sum(share.values()) == pytest.approx(1)
        assert row["chosen_energy"] == pytest.approx(share["width 128"] * 10 / 8, rel=1e-4)
    assert report["top_k"]["2"]["accuracy"] == record.quality["2"]["accuracy"]
    assert "share of constant" in capsys.readouterr().out


def test_the_command_leaves_the_shipped_weights_alone():
    with pytest.raises(ValueError, match="holds the shipped weights"):
        Arguments(task="vision", out=weights.SHIPPED_FOLDER).path()
    assert Arguments(task="vision").path().name == "vision-tiny.safetensors"
    assert Arguments(task="vision", energy_lambda=0.5).path().name == "vision-tiny-lambda0.5.safetensors"
    assert Arguments(task="vision").recipe() == RECIPES["vision", "tiny"]
    assert Arguments(task="vision").config() == model_config("vision", "tiny")


def test_the_command_names_a_norm_that_is_not_the_shipped_one():
    named = {norm: Arguments(task="vision", norm=norm) for norm in NORMS}
    assert [arguments.config().norm for arguments in named.values()] == list(NORMS)
    assert [arguments.path().stem for arguments in named.values()] == [
        "vision-tiny", "vision-tiny-group", "vision-tiny-layer", "vision-tiny-rms",
    ]  # fmt: skip
    assert Arguments(task="language", norm="rms").path().stem == "language-tiny"
    with pytest.raises(ValueError, match="'group' mixes"):
        Arguments(task="language", norm="group").config()


@pytest.mark.parametrize("norm", ["group", "layer", "rms"])
def test_images_are_learnt_with_every_norm_and_the_checkpoint_comes_back(stripes, tmp_path, norm):
    config = with_norm(SMALL, norm)
    model, record = train(config, RECIPE, CPU)
    assert record.quality["2"]["accuracy"] > 0.95
    save_checkpoint(model, record, tmp_path / "model.safetensors")
    loaded, _ = load_checkpoint(tmp_path / "model.safetensors", config)
    images = data.load_vision("test")[0][:8]
    assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    with pytest.raises(WeightsError, match="norm"):
        load_checkpoint(tmp_path / "model.safetensors", SMALL)


def test_a_rotation_head_is_learnt_beside_the_answers(stripes, tmp_path):
    """Stripes turned by half are those of the other class, so a loss of log 2 is the best there is."""
    config = with_rotation_head(SMALL)
    model, record = train(config, RECIPE, CPU)
    assert record.quality["2"]["accuracy"] > 0.95
    turns = torch.arange(600) % 4
    loss = rotation_loss(model(turned(data.load_vision("test")[0], turns)), turns)
    assert math.log(2) - 0.1 < loss < 1.1 < math.log(4)
    save_checkpoint(model, record, tmp_path / "model.safetensors")
    loaded, _ = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config == config
    with pytest.raises(WeightsError, match="rotation_head"):
        load_checkpoint(tmp_path / "model.safetensors", SMALL)
    arguments = Arguments(task="vision", rotation_head=True)
    assert arguments.path().stem == "vision-tiny-rotation" and arguments.config().rotation_head
    with pytest.raises(ValueError, match="rotation_weight"):
        dataclasses.replace(RECIPE, rotation_weight=0.0)


def test_turned_images_move_no_statistics_in_training(stripes):
    """After one step from the same start, since only the upright images count."""
    recipe = dataclasses.replace(RECIPE, steps=1)
    without, turning = (train(config, recipe, CPU)[0] for config in (SMALL, with_rotation_head(SMALL)))
    buffers = dict(turning.named_buffers())
    assert any("running_mean" in name for name in buffers)
    assert all(torch.equal(value, buffers[name]) for name, value in without.named_buffers())
    assert not torch.equal(without.position, turning.position)


def test_mirroring_flips_some_images_and_harms_none():
    images = torch.arange(64 * 28 * 28).remainder(251).to(torch.uint8).view(64, 28, 28)
    result = mirror(images, torch.Generator().manual_seed(0))
    flipped = (result == images.flip(-1)).flatten(1).all(1)
    same = (result == images).flatten(1).all(1)
    assert (flipped ^ same).all()
    assert 10 < flipped.sum() < 54


def test_cuda_on_a_machine_without_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert pick_device("auto") == CPU
    with pytest.raises(ValueError, match="--device cpu"):
        pick_device("cuda")


def test_a_checkpoint_comes_back_as_it_was(saved):
    model, path = saved
    loaded, record = load_checkpoint(path, SMALL)
    assert record == _record()
    assert load_checkpoint(path)[0].config == SMALL
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    assert torch.equal(loaded.eval()(images).logits, model.eval()(images).logits)
    assert torch.equal(loaded.expert_cost, model.expert_cost)


def test_an_interrupted_save_leaves_the_old_model(saved, monkeypatch):
    _, path = saved
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def interrupted(tensors, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.training.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(MoEModel(SMALL), _record(), path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def _rewrite(path, change):
    """Change the tensors and make the JSON agree, as another program might."""
    import hashlib

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    _edit_json(path, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _edit_json(path, **changes):
    json_path = path.with_suffix(".json")
    json_path.write_text(json.dumps({**json.loads(json_path.read_text()), **changes}))


def _wrong_shape(tensors):
    tensors["head.weight"] = tensors["head.weight"][:5].clone()


DAMAGE = {
    "no weights": (lambda path: path.unlink(), "small.safetensors does not exist"),
    "no json": (lambda path: path.with_suffix(".json").unlink(), "small.json does not exist"),
    "truncated weights": (lambda path: path.write_bytes(path.read_bytes()[:100]), "is not the file"),
    "torn json": (lambda path: path.with_suffix(".json").write_text('{"seed": '), "not JSON"),
    "unknown json field": (lambda path: _edit_json(path, colour="red"), "exactly the fields"),
    "other config": (lambda path: _edit_json(path, config={**SMALL.to_dict(), "n_layers": 2}), "n_layers"),
    "no config": (lambda path: _edit_json(path, config={"task": "vision"}), "d_model"),
    "missing tensor": (
        lambda path: _rewrite(path, lambda t: t.pop("head.weight")),
        "lacks tensor 'head.weight'",
    ),
    "extra tensor": (lambda path: _rewrite(path, lambda t: t.update(extra=torch.ones(1))), "tensor 'extra'"),
    "wrong shape": (lambda path: _rewrite(path, _wrong_shape), r"'head.weight' has shape \(5, 32\) instead"),
    "not finite": (
        lambda path: _rewrite(path, lambda t: t["norm.bias"].fill_(torch.nan)),
        "norm.bias.*finite",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_refused_with_a_remedy(saved, kind):
    _, path = saved
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(path, SMALL)
    assert "Remedy" in str(error.value)


def test_a_base_model_is_trained_once_and_cached_by_config_and_data(tmp_path, stripes, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(weights, "model_config", lambda task, size: SMALL)
    monkeypatch.setattr(weights, "train", counted)
    monkeypatch.setitem(weights.RECIPES, ("vision", "base"), dataclasses.replace(RECIPE, steps=3))
    first = load_model("vision", "base", "cpu", tmp_path)
    second = load_model("vision", "base", "cpu", tmp_path)
    assert len(calls) == 1
    assert torch.equal(first.head.weight, second.head.weight)
    path = weights_path("vision", "base", tmp_path)
    monkeypatch.setattr(weights, "data_digest", lambda task: "1" * 64)
    assert weights_path("vision", "base", tmp_path) != path
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    assert weights_path("vision", "base").parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("task", ["vision", "language"])
def test_shipped_weights_are_small_and_of_the_config(task):
    assert weights_path(task, "tiny").stat().st_size <= 2_000_000
    assert training_record(task, "tiny").config == model_config(task, "tiny").to_dict()
    model = load_model(task, "tiny", "cpu")
    assert not model.training


def test_shipped_vision_weights_reach_their_accuracy_at_every_top_k():
    model = load_model("vision", "tiny", "cpu")
    images, labels = data.load_vision("test", full=False)
    quality = training_record("vision", "tiny").quality
    for top_k in model.config.top_k_choices:
        accuracy = evaluate_vision(model, images[:1000], labels[:1000], top_k)
        assert accuracy > VISION_FLOOR
        assert accuracy == pytest.approx(quality[str(top_k)]["accuracy"], abs=0.04)


def test_shipped_language_weights_know_english_better_than_code():
    model = load_model("language", "tiny", "cpu")
    english = torch.tensor(list(ENGLISH), dtype=torch.uint8)
    for top_k in model.config.top_k_choices:
        accuracy, bits_per_byte = evaluate_language(model, english, top_k)
        assert accuracy > 0.4
        assert bits_per_byte < 3.5


VISION_FLOOR = 0.84
ENGLISH = b"""Return the name of the file that was opened, or None if there is none. If the argument is
given it must be a string, and the method raises an exception when the value is not valid. The default is to
use the current directory; see the documentation of the module for the meaning of the other parameters.
"""
