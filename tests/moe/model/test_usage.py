"""Routing counted by class of input, and how much expert and class tell of each other."""

import math
import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.model.config import model_config
from moe.model.router import route
from moe.model.transformer import MoEModel, initialise
from moe.model.usage import (
    BYTE_CLASSES,
    RoutingCounts,
    byte_classes,
    class_entropy,
    specialisation,
    specialisation_bias,
)
from moe.training.evaluate import evaluate_language, evaluate_vision
from tests.conftest import no_host_wait

LAYERS, CLASSES, EXPERTS = 2, 3, 4


def mutual_information_bits(table: list[list[int]]) -> float:
    """Sum of p log(p / (p_row p_column)) over the cells, by plain loops."""
    total = sum(map(sum, table))
    bits = 0.0
    for row in table:
        for column, count in enumerate(row):
            if count:
                joint = count / total
                margins = sum(row) / total * sum(other[column] for other in table) / total
                bits += joint * math.log2(joint / margins)
    return bits


@given(st.integers(0, 9999), st.integers(1, EXPERTS), st.integers(1, EXPERTS), st.booleans())
def test_counts_are_those_of_a_loop_over_tokens(seed, top_k, most, null_slots):
    generator = torch.Generator().manual_seed(seed)
    counted = RoutingCounts(LAYERS, CLASSES, EXPERTS, "cpu")
    expected = np.zeros((LAYERS, CLASSES, EXPERTS), np.int64)
    for n_tokens in (5, 1, 17):
        classes = torch.randint(CLASSES, (n_tokens,), generator=generator)
        logits = torch.randn(LAYERS, n_tokens, EXPERTS, generator=generator)
        k = torch.tensor(min(top_k, most)) if null_slots else top_k
        routing = [route(layer, k, max_top_k=most) for layer in logits]
        counted.add(routing, classes)
        for layer, decision in enumerate(routing):
            for token in range(n_tokens):
                for expert in decision.experts[token].tolist():
                    if expert < EXPERTS:
                        expected[layer, classes[token], expert] += 1
    np.testing.assert_array_equal(counted.counts.numpy(), expected)


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=3, max_size=3))
def test_specialisation_is_that_of_a_loop_over_the_table(table):
    if not sum(map(sum, table)):
        return
    counts = torch.tensor([table, table[::-1]])
    expected = mutual_information_bits(table)
    np.testing.assert_allclose(specialisation(counts), [expected, expected], atol=1e-9)
    assert -1e-9 < expected <= float(class_entropy(counts)[0]) + 1e-9


def test_independent_experts_tell_nothing_and_a_fixed_map_tells_the_class():
    of_class, of_expert = torch.tensor([10, 30, 60]), torch.tensor([1, 2, 3, 4])
    assert specialisation(of_class[:, None] * of_expert).item() == pytest.approx(0.0, abs=1e-12)
    each_its_own = torch.diag(of_class)
    share = of_class.numpy() / 100
    entropy = -(share * np.log2(share)).sum()
    assert specialisation(each_its_own).item() == pytest.approx(entropy)
    assert class_entropy(each_its_own).item() == pytest.approx(entropy)


def test_bias_is_what_independent_draws_show_on_average():
    rng = np.random.default_rng(0)
    classes = rng.integers(CLASSES, size=(500, 400))
    experts = rng.integers(EXPERTS, size=(500, 400))
    tables = np.zeros((500, CLASSES, EXPERTS), np.int64)
    for table, c, e in zip(tables, classes, experts, strict=True):
        np.add.at(table, (c, e), 1)
    counts = torch.from_numpy(tables)
    by_chance, bias = specialisation(counts), specialisation_bias(counts)
    assert by_chance.mean().item() == pytest.approx(bias.mean().item(), rel=0.1)
    # All cells filled: (rows - 1)(columns - 1) / 2n nats.
    assert bias[0].item() == pytest.approx((CLASSES - 1) * (EXPERTS - 1) / (800 * math.log(2)))


def test_every_byte_has_the_class_that_its_character_has():
    found = byte_classes(torch.arange(256, dtype=torch.uint8))
    assert found.shape == (256,)
    for byte, number in enumerate(found.tolist()):
        character, name = chr(byte), BYTE_CLASSES[number]
        ascii_only = byte < 128
        assert (name == "letter") == (ascii_only and character.isalpha())
        assert (name == "digit") == (ascii_only and character.isdigit())
        assert (name == "punctuation") == (character in string.punctuation)
        assert (name == "newline") == (character in "\r\n")
        assert (name == "space") == (character in " \t")


@pytest.mark.parametrize("task", ["vision", "language"])
def test_counting_changes_no_answer_and_loses_no_token(task):
    config = model_config(task, "tiny")
    model = initialise(MoEModel(config), torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    if task == "vision":
        images = torch.randint(256, (7, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.tensor([0, 1, 1, 2, 9, 9, 9])
        counts = RoutingCounts(config.n_layers, 10, config.n_experts, "cpu")
        with_counts = evaluate_vision(model, images, labels, 2, batch_size=3, counts=counts)
        assert with_counts == evaluate_vision(model, images, labels, 2, batch_size=3)
        tokens_of_class = np.bincount(labels, minlength=10) * config.tokens_per_sample
    else:
        text = torch.randint(256, (5 * config.context_length + 3,), dtype=torch.uint8, generator=generator)
        counts = RoutingCounts(config.n_layers, len(BYTE_CLASSES), config.n_experts, "cpu")
        with_counts = evaluate_language(model, text, 2, batch_size=2, counts=counts)
        assert with_counts == evaluate_language(model, text, 2, batch_size=2)
        inputs = byte_classes(text[: 5 * config.context_length])
        tokens_of_class = np.bincount(inputs, minlength=len(BYTE_CLASSES))
    for layer in counts.counts.sum(dim=-1):
        np.testing.assert_array_equal(layer.numpy(), 2 * tokens_of_class)


@pytest.mark.gpu
def test_counting_on_a_gpu_never_makes_the_host_wait():
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(100, EXPERTS, device="cuda", generator=generator)
    classes = torch.randint(CLASSES, (100,), device="cuda", generator=generator)
    counted = RoutingCounts(1, CLASSES, EXPERTS, "cuda")
    with no_host_wait():
        counted.add([route(logits, 2)], classes)
    here = RoutingCounts(1, CLASSES, EXPERTS, "cpu")
    here.add([route(logits.cpu(), 2)], classes.cpu())
    assert torch.equal(counted.counts.cpu(), here.counts)
