"""Training learns, checkpoints survive interruption and refuse damage, and the shipped weights are good."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe import data, weights
from moe.checkpoint import WeightsError, load_checkpoint, save_checkpoint
from moe.config import model_config
from moe.evaluate import evaluate_language, evaluate_vision
from moe.model import MoEModel, initialise
from moe.train import Recipe, TrainingDiverged, mirror, pick_device, train
from moe.weights import load_model, training_record, weights_path

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
    from moe.checkpoint import TrainingRecord

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
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    assert torch.equal(loaded.eval()(images).logits, model.eval()(images).logits)
    assert torch.equal(loaded.expert_cost, model.expert_cost)


def test_an_interrupted_save_leaves_the_old_model(saved, monkeypatch):
    _, path = saved
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def interrupted(tensors, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.checkpoint.save_file", interrupted)
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
