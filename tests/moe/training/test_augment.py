"""Augmentation: repeatable, as much as asked for, of geometry and grey levels alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moe.data.datasets import load_vision
from moe.model.config import model_config
from moe.training.augment import augment
from moe.training.fit import Arguments, fit
from moe.training.recipes import RECIPES

CPU = torch.device("cpu")


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return load_vision("train", full=False)[0][:400]


def test_the_same_generator_gives_the_same_images_and_leaves_those_it_was_given(images):
    before = images.clone()
    changed = augment(images, 1.0, source())
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    assert torch.equal(changed, augment(images, 1.0, source())) and torch.equal(images, before)
    assert not torch.equal(changed, augment(images, 1.0, source(1)))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_that_is_asked_for_changes(images, share):
    changed = (augment(images, share, source()) != images).flatten(1).any(dim=1)
    assert changed.float().mean() == pytest.approx(share, abs=0.07)


def test_images_are_neither_brighter_nor_of_more_contrast_nor_grainier(images):
    """A corruption of the test moves one of these; geometry and grey levels leave them where they were."""

    def looks(x: Tensor) -> Tensor:
        x = x.float() / 255
        grain = (x[:, 1:] - x[:, :-1]).abs().mean()
        return torch.stack([x.mean(), x.std(), grain])

    ratio = looks(augment(images, 1.0, source())) / looks(images)
    assert ((ratio > 0.65) & (ratio < 1.35)).all(), ratio


def test_training_augments_where_the_recipe_says_so_and_is_else_as_it_was():
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    config = dataclasses.replace(
        model_config("vision", "tiny"), expert_widths=(16, 8), top_k=1, top_k_choices=(1,), **shape
    )
    recipe = dataclasses.replace(RECIPES["vision", "tiny"], steps=2, batch_size=8, warmup_steps=1)
    plain, again, augmented = (
        fit(config, dataclasses.replace(recipe, augment=share), CPU, 0)[0].head.weight
        for share in (0.0, 0.0, 1.0)
    )
    assert torch.equal(plain, again) and not torch.equal(plain, augmented)
    with pytest.raises(ValueError, match="augment must be within"):
        dataclasses.replace(recipe, augment=1.5)
    with pytest.raises(ValueError, match="augment is for images"):
        fit(model_config("language", "tiny"), dataclasses.replace(recipe, augment=0.5), CPU, 0)


def test_the_command_names_what_differs():
    arguments = Arguments(task="vision", stem=True, augment=0.8)
    assert arguments.path().stem == "vision-tiny-stem-augment0.8"
    assert arguments.config().stem == (16, 32, 64) and arguments.recipe().augment == 0.8
