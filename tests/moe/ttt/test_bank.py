"""The bank of states: shifts are told apart, return to their state at once, and make room for others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe import ttt
from moe.data.corruptions import corrupt
from moe.data.datasets import load_vision
from moe.model.layers import BatchNorm
from moe.model.transformer import MoEModel
from moe.training.weights import load_model
from tests.moe.ttt.ttt_models import LAYER_VISION, VISION, assert_same, make_inputs, make_model, whole_state

NO_STEP = ttt.Eata(entropy_margin=0.0)  # selects nothing, so a bank of it swaps states and does no more


def shift_of(number: int, seed: int) -> Tensor:
    """Images of one of four shifts that lie far apart: the brightness halves from each to the next."""
    return make_inputs(VISION, seed) >> number


def take(adapter: ttt.Adapter, *batches: Tensor) -> list[int]:
    return [adapter.adapt(batch, adapter.model(batch).logits, 1) for batch in batches]


def batches_of(adapter: ttt.Adapter) -> list[int]:
    """Batches of each shift that was met, the one in force last."""
    return [shift.batches for shift in adapter.state.shifts if shift.batches < 1000]


def test_each_shift_is_known_again_and_the_one_in_force_stands_last():
    adapter = ttt.Adapter(make_model(VISION), ttt.Bank(), guard=None)
    seeds = iter(range(100))
    for number, expected in ((0, [1]), (0, [2]), (2, [2, 1]), (1, [2, 1, 1]), (2, [2, 1, 2]), (0, [1, 2, 3])):
        assert take(adapter, shift_of(number, next(seeds))) == [1]
        assert batches_of(adapter) == expected


def test_a_shift_that_returns_finds_the_state_in_which_it_was_left():
    model = make_model(LAYER_VISION)
    adapter = ttt.Adapter(model, ttt.Bank(base=ttt.Tent(learning_rate=0.05)), guard=None)
    take(adapter, shift_of(0, 1), shift_of(0, 2))
    left = whole_state(model, adapter.state)
    take(adapter, shift_of(2, 3), shift_of(2, 4))
    there = whole_state(model, adapter.state)
    assert any(not torch.equal(left[name], there[name]) for name in left)
    swap = ttt.Bank(base=NO_STEP)
    assert ttt.bank(model, adapter.state, shift_of(0, 5), swap).selected == 24  # a swap is a step
    assert_same(whole_state(model, adapter.state), left)
    assert ttt.bank(model, adapter.state, shift_of(0, 6), swap) == ttt.Step(selected=0)
    assert_same(whole_state(model, adapter.state), left)
    ttt.bank(model, adapter.state, shift_of(2, 7), swap)
    assert_same(whole_state(model, adapter.state), there)


def test_statistics_of_a_new_shift_are_the_plain_mean_of_its_batches():
    model = make_model(VISION)
    norm = next(module for module in model.modules() if isinstance(module, BatchNorm))
    base = ttt.BatchStatistics(statistics_momentum=0.01)
    adapter = ttt.Adapter(model, ttt.Bank(base=base), guard=None)
    batches = [shift_of(2, seed) for seed in range(4)]
    for n in range(1, 5):
        take(adapter, batches[n - 1])
        tokens = torch.stack([model.embed_inputs(batch).flatten(0, 1) for batch in batches[:n]])  # [n, T, D]
        torch.testing.assert_close(norm.running_mean, tokens.mean((0, 1)))
        torch.testing.assert_close(norm.running_var, tokens.var(1).mean(0))


def test_a_full_bank_forgets_the_shift_that_was_met_longest_ago():
    adapter = ttt.Adapter(make_model(VISION), ttt.Bank(room=2), guard=None)
    take(adapter, shift_of(0, 1), shift_of(2, 2), shift_of(0, 3))
    assert batches_of(adapter) == [1, 2]
    take(adapter, shift_of(3, 4))
    assert batches_of(adapter) == [2, 1] and len(adapter.state.shifts) == 2
    take(adapter, shift_of(2, 5))  # forgotten
    assert batches_of(adapter) == [1, 1]
    take(adapter, shift_of(0, 6))
    assert batches_of(adapter) == [1, 1]


def test_a_shift_looks_the_same_whatever_the_model_has_become():
    model = make_model(VISION)
    before = ttt.features(model, shift_of(1, 0))
    adapter = ttt.Adapter(model, ttt.Tent(learning_rate=1.0), guard=None)
    take(adapter, *(shift_of(3, seed) for seed in range(3)))
    for old, new in zip(before, ttt.features(model, shift_of(1, 0)), strict=True):
        assert torch.equal(old, new)


def test_a_known_shift_is_no_poison_to_the_guard_and_a_new_one_is_at_first():
    limits = ttt.GuardSettings(
        concentration_limit=0.99, entropy_limit=1e-6, probation=99, warm_up=4, spread_limit=0.01
    )
    adapter = ttt.Adapter(make_model(VISION), ttt.Bank(), guard=limits)
    take(adapter, *(shift_of(0, seed) for seed in range(3)), *(shift_of(2, seed) for seed in range(3)))
    adapter.state.restore(adapter.model, adapter.snapshot())
    steady = [shift_of(0, seed) for seed in range(10, 40)]
    assert take(adapter, *steady) == [1] * 30  # the other shift is far outside the baselines by now
    assert take(adapter, shift_of(2, 50)) == [1]
    take(adapter, *steady)
    assert take(adapter, shift_of(3, 51), shift_of(3, 52)) == [0, 1]
    assert adapter.counters.poisoned == 1


@pytest.fixture(scope="module")
def shipped() -> MoEModel:
    return load_model("vision", "tiny", "cpu")


def test_one_batch_after_its_return_a_shift_is_answered_as_well_as_when_it_was_left(shipped):
    """The claim of the bank on real shifts: at least 90% of the settled accuracy, labels only score."""
    images, labels = load_vision("test", full=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    held_out, answers = images[-1000:], labels[-1000:]
    kinds = ("contrast", "gaussian_noise", "brightness", "pixelate")
    noise = torch.Generator().manual_seed(0)
    shifted = {kind: corrupt(images, kind, 5, noise) for kind in kinds}
    adapter = ttt.Adapter(shipped, ttt.Bank())

    def score(kind: str) -> float:
        with torch.no_grad():
            return (shipped(shifted[kind][-1000:]).predictions == answers).float().mean().item()

    assert len(held_out) == 1000
    settled = {}
    for place, kind in enumerate(kinds):
        take(adapter, *shifted[kind][place * 256 :][:256].split(32))
        settled[kind] = score(kind)
    for place, kind in enumerate(kinds):
        assert score(kind) < 0.9 * settled[kind]  # another shift's state is in force
        take(adapter, shifted[kind][1024 + 32 * place :][:32])
        assert score(kind) >= 0.9 * settled[kind], kind
    adapter.reset()
