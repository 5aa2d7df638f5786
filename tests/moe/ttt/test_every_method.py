"""What holds of every method and every composition: undone exactly, repeatable, refused early, harmless."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import ttt
from moe.data.datasets import load_vision
from moe.model.config import ModelConfig
from moe.model.transformer import MoEModel
from moe.training.weights import load_model
from tests.moe.ttt.ttt_models import (
    GROUP_VISION,
    LAYER_VISION,
    RMS_VISION,
    TURNING,
    VISION,
    assert_same,
    make_inputs,
    make_model,
    whole_state,
)

RATE = 0.05
PLAIN: dict[str, tuple[ttt.BatchStatistics, ModelConfig]] = {
    "batch_statistics": (ttt.BatchStatistics(), VISION),
    "tent": (ttt.Tent(learning_rate=RATE), VISION),
    "eata": (ttt.Eata(learning_rate=RATE, redundancy_margin=0.9), VISION),
    "sar": (ttt.Sar(learning_rate=RATE, recover_below_nats=0.0), VISION),
    "roid": (ttt.Roid(learning_rate=RATE / 50), VISION),
    "eva": (ttt.Eva(learning_rate=RATE), VISION),
    "rotation": (ttt.Rotation(learning_rate=RATE), TURNING),
    "tent-layer": (ttt.Tent(learning_rate=RATE), LAYER_VISION),
    "eva-rms": (ttt.Eva(learning_rate=RATE), RMS_VISION),
}
EVERY: dict[str, tuple[ttt.Settings, ModelConfig]] = {
    **PLAIN,
    "neo": (ttt.Neo(), VISION),
    "neo-group": (ttt.Neo(), GROUP_VISION),
    "neo(batch_statistics)": (ttt.Neo(base=ttt.BatchStatistics()), VISION),
    "neo(tent)-layer": (ttt.Neo(base=ttt.Tent(learning_rate=RATE)), LAYER_VISION),
    "bank(neo)": (ttt.Bank(base=ttt.Neo()), VISION),
    "bank(neo(roid))": (ttt.Bank(base=ttt.Neo(base=ttt.Roid(learning_rate=RATE / 50))), VISION),
    **{f"bank({name})": (ttt.Bank(base=base), config) for name, (base, config) in PLAIN.items()},
}
LENIENT = ttt.GuardSettings(
    concentration_limit=0.995, entropy_limit=1e-30, probation=999, warm_up=99, spread_limit=0.01
)
every_method = pytest.mark.parametrize(("settings", "config"), EVERY.values(), ids=EVERY)


def all_of(adapter: ttt.Adapter) -> dict[str, Tensor]:
    """Every tensor that a step could change, the bank's among them."""
    tensors = whole_state(adapter.model, adapter.state)
    for i, shift in enumerate(adapter.state.shifts):
        parts = [shift.mean, shift.variance, *shift.saved.parameters, *shift.saved.statistics]
        tensors |= {f"shift {i} tensor {k}": part.clone() for k, part in enumerate(parts)}
        tensors[f"shift {i} batches"] = torch.tensor(shift.batches)
    return tensors


def dim(inputs: Tensor) -> Tensor:
    """Another shift of the inputs, far away."""
    return inputs // 4


def take(adapter: ttt.Adapter, *seeds: int) -> dict[str, Tensor]:
    """Steps on images of which every other batch is of another shift."""
    for seed in seeds:
        inputs = make_inputs(adapter.model.config, seed)
        inputs = dim(inputs) if seed % 2 else inputs
        with torch.no_grad():
            answers = adapter.model(inputs).logits
        adapter.adapt(inputs, answers, 1)
    return all_of(adapter)


@every_method
@pytest.mark.parametrize("guarded", [True, False])
def test_reset_equals_fresh_and_the_same_stream_twice_is_the_same(settings, config, guarded):
    adapter = ttt.Adapter(make_model(config), settings, guard=LENIENT if guarded else None)
    fresh = all_of(adapter)
    middle = take(adapter, 0, 1, 2)
    saved = adapter.snapshot()
    end = take(adapter, 3, 4)
    assert adapter.counters.steps + adapter.counters.empty == 5 and adapter.counters.steps >= 2
    assert end.keys() != middle.keys() or any(not torch.equal(end[name], middle[name]) for name in middle)
    adapter.restore(saved)
    assert_same(all_of(adapter), middle)
    assert_same(take(adapter, 3, 4), end)
    adapter.reset()
    assert_same(all_of(adapter), fresh)
    assert_same(take(adapter, 0, 1, 2), middle)


@every_method
def test_answers_that_are_no_numbers_leave_all_as_before(settings, config):
    adapter = ttt.Adapter(make_model(config), settings, guard=None)
    take(adapter, 0, 1)
    spoilt = "rotation_head.weight" if config is TURNING else "head.weight"
    with torch.no_grad():
        adapter.model.get_parameter(spoilt).fill_(torch.nan)
    before = all_of(adapter)
    for shifted in (False, True):  # a bank stays, or changes
        inputs = make_inputs(config, 2)
        with pytest.raises(ttt.AdaptationDiverged):
            adapter.adapt(dim(inputs) if shifted else inputs, torch.full((24, 10), math.nan), 1)
        after = all_of(adapter)
        assert before[spoilt].isnan().all() and after[spoilt].isnan().all()
        assert_same(
            {k: v for k, v in after.items() if k != spoilt}, {k: v for k, v in before.items() if k != spoilt}
        )


@pytest.mark.parametrize("base", [ttt.Eata(entropy_margin=0.0), ttt.Sar(entropy_margin=0.0)])
@pytest.mark.parametrize("stack", [lambda base: ttt.Neo(base=base), lambda base: ttt.Bank(base=base)])
def test_a_base_that_selects_nothing_is_no_step_of_the_whole(base, stack):
    adapter = ttt.Adapter(make_model(VISION), stack(base), guard=None)
    before = all_of(adapter)
    inputs = make_inputs(VISION, 1)
    assert adapter.adapt(inputs, adapter.model(inputs).logits, 1) == 0
    assert adapter.counters == ttt.GuardCounters(empty=1)
    assert_same(all_of(adapter), before)


@every_method
@pytest.mark.parametrize("guarded", [True, False])
def test_a_batch_of_one_is_a_counted_refusal_with_batch_norms(settings, config, guarded):
    adapter = ttt.Adapter(make_model(config), settings, guard=ttt.GuardSettings() if guarded else None)
    if config.norm != "batch":
        return
    before, image = all_of(adapter), make_inputs(config, 1, n=1)
    assert adapter.adapt(image, adapter.model(image).logits, 1) == 0
    assert adapter.counters == ttt.GuardCounters(empty=1)
    assert_same(all_of(adapter), before)


@pytest.mark.parametrize(
    ("config", "make", "message"),
    [
        (RMS_VISION, lambda: ttt.Neo(), "norm 'rms' has none"),
        (RMS_VISION, lambda: ttt.Bank(base=ttt.Neo(base=ttt.Tent())), "norm 'rms' has none"),
        (LAYER_VISION, lambda: ttt.Bank(), "norm 'batch'"),
        (LAYER_VISION, lambda: ttt.Neo(base=ttt.BatchStatistics()), "norm 'batch'"),
        (VISION, lambda: ttt.Rotation(), "--rotation-head"),
        (VISION, lambda: ttt.Bank(base=ttt.Rotation()), "--rotation-head"),
        (VISION, lambda: ttt.Bank(room=1), "room must be at least 2"),
        (VISION, lambda: ttt.Bank(same_below=0.0), "same_below must be positive"),
        (VISION, lambda: ttt.Neo(centre_momentum=1.5), "centre_momentum must be within"),
        (VISION, lambda: ttt.Neo(centre_momentum=0.0), "centre_momentum must be positive"),
        (VISION, lambda: ttt.Roid(temperature=0.0), "temperature must be positive"),
        (VISION, lambda: ttt.Roid(source_share=2.0), "source_share must be within"),
        (VISION, lambda: ttt.Eva(perturbation=math.inf), "perturbation must be positive"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(config, make, message):
    with pytest.raises(ValueError, match=message):
        ttt.Adapter(make_model(config), make())


def test_forward_only_steps_are_of_all_norms():
    with pytest.raises(ValueError, match="its group is 'norms', got 'router'"):
        ttt.Adapter(make_model(VISION), ttt.Eva(), "router")


def test_wrappers_stand_on_plain_methods_only():
    inner: Any = ttt.Neo()
    with pytest.raises(ValueError, match="base Neo"):
        ttt.Neo(base=inner)
    inner = ttt.Bank()
    with pytest.raises(ValueError, match="base Bank"):
        ttt.Bank(base=inner)
    with pytest.raises(ttt.BankRoomError):
        ttt.Bank(room=0)


@pytest.fixture(scope="module")
def shipped() -> MoEModel:
    return load_model("vision", "tiny", "cpu")


HARMLESS: dict[str, ttt.Settings] = {
    name: kind() for name, (kind, _) in ttt.METHODS.items() if name not in ("rotation", "dynamic_evaluation")
} | {
    "neo(batch_statistics)": ttt.Neo(base=ttt.BatchStatistics()),
    "bank(neo)": ttt.Bank(base=ttt.Neo()),
    "bank(neo(batch_statistics))": ttt.Bank(base=ttt.Neo(base=ttt.BatchStatistics())),
    "bank(neo(roid))": ttt.Bank(base=ttt.Neo(base=ttt.Roid())),
}


@pytest.mark.parametrize("settings", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("like", [True, False], ids=["one class a batch", "no shift"])
def test_like_labels_and_streams_without_a_shift_cost_two_points_at_most(shipped, settings, like):
    images, labels = load_vision("test", full=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    if like:
        order = torch.cat([torch.where(labels == c)[0][:96] for c in range(10)])
        images, labels = images[order], labels[order]
    batches = list(zip(images[:960].split(32), labels[:960].split(32), strict=True))
    with torch.no_grad():
        before = sum(int((shipped(batch).predictions == answers).sum()) for batch, answers in batches)
    adapter = ttt.Adapter(shipped, settings)
    right = 0
    for batch, answers in batches:
        with torch.no_grad():
            logits = shipped(batch).logits
        right += int((logits.argmax(1) == answers).sum())
        adapter.adapt(batch, logits, 1)
    adapter.reset()
    assert (right - before) / 960 >= -0.02
