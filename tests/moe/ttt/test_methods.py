"""Methods of test-time training against short references, and that steps can be skipped and undone exactly.

The references use plain autograd and their own SGD, and none of the code of `moe.ttt`.
"""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import ttt
from moe.model.config import model_config
from moe.model.layers import BatchNorm
from moe.model.transformer import MoEModel
from moe.model.variants import with_rotation_head
from moe.ttt.methods import _ascended
from tests.moe.ttt.ttt_models import (
    OF_ONE_SAMPLE,
    RMS_VISION,
    TURNING,
    VISION,
    assert_same,
    in_group,
    make_inputs,
    make_model,
    whole_state,
)

SETTINGS = {
    ttt.batch_statistics: ttt.BatchStatistics(),
    ttt.tent: ttt.Tent(learning_rate=0.05),
    ttt.eata: ttt.Eata(learning_rate=0.05, redundancy_margin=0.9),
    ttt.sar: ttt.Sar(learning_rate=0.05, recover_below_nats=0.0),
    ttt.rotation: ttt.Rotation(learning_rate=0.05),
    ttt.dynamic_evaluation: ttt.DynamicEvaluation(learning_rate=0.05, momentum=0.9, decay=0.01),
}
CASES = [
    (ttt.batch_statistics, VISION, "norms"),
    *[(method, VISION, group) for method in (ttt.tent, ttt.eata, ttt.sar) for group in ("norms", "router")],
    *[(method, config, "norms") for method in (ttt.tent, ttt.eata, ttt.sar) for config in OF_ONE_SAMPLE],
    (ttt.sar, RMS_VISION, "last_block"),
    *[(ttt.rotation, config, "norms") for config in (TURNING, with_rotation_head(RMS_VISION))],
    (ttt.rotation, TURNING, "last_block"),
    *[
        (ttt.dynamic_evaluation, model_config("language", "tiny"), g)
        for g in ("last_block", "norms", "router")
    ],
]
case_ids = [f"{method.__name__}-{config.task}-{config.norm}-{group}" for method, config, group in CASES]
every_case = pytest.mark.parametrize(("method", "config", "group"), CASES, ids=case_ids)


class Reference:
    """A model that adapts by the textbook: autograd, SGD with momentum, batch statistics while adapting."""

    def __init__(self, model: MoEModel, group: str, settings: Any) -> None:
        self.model, self.settings = copy.deepcopy(model), settings
        self.weights = [
            p.requires_grad_() for name, p in self.model.named_parameters() if in_group(name, group)
        ]
        self.first = [weight.detach().clone() for weight in self.weights]
        self.velocity = [torch.zeros_like(weight) for weight in self.weights]
        self.norms = [module for module in self.model.modules() if isinstance(module, BatchNorm)]
        self.average: Tensor | None = None
        for norm in self.norms:
            norm.momentum = settings.statistics_momentum

    def adapting(self, inputs: Tensor) -> Tensor:
        for norm in self.norms:
            norm.train()
        logits = self.model(inputs).logits
        for norm in self.norms:
            norm.eval()
        return logits

    def gradient(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True))

    def descend(self, gradient: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, velocity, g in zip(self.weights, self.velocity, gradient, strict=True):
                velocity.mul_(self.settings.momentum).add_(g)
                weight.sub_(self.settings.learning_rate * velocity)

    def batch_statistics(self, inputs: Tensor) -> None:
        self.adapting(inputs)

    def tent(self, inputs: Tensor) -> None:
        self.descend(self.gradient(entropy(self.adapting(inputs)).mean() / math.log(10)))

    def eata(self, inputs: Tensor) -> None:
        logits = self.adapting(inputs).detach()
        p, keep = logits.softmax(-1), entropy(logits) < 0.4 * math.log(10)
        if self.average is not None:
            keep &= (F.normalize(p, dim=1) @ F.normalize(self.average, dim=0)).abs() < 0.9
        other = copy.deepcopy(self)  # the statistics move once, by the whole batch
        h = entropy(other.adapting(inputs[keep]))
        weight = 1 / torch.exp(h.detach() - 0.4 * math.log(10))
        self.descend(other.gradient((weight * h).mean() / math.log(10)))
        mean = p[keep].mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean

    def sar(self, inputs: Tensor) -> None:
        inputs = inputs[entropy(self.adapting(inputs).detach()) < 0.4 * math.log(10)]
        other = copy.deepcopy(self)  # the statistics move once, by the whole batch
        gradient = other.gradient(entropy(other.adapting(inputs)).mean() / math.log(10))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        away = copy.deepcopy(self)  # the second pass happens to another model altogether
        with torch.no_grad():
            for weight, g in zip(away.weights, gradient, strict=True):
                weight.add_(g, alpha=0.05 / norm)
        h = entropy(away.adapting(inputs))
        h = h[h < 0.4 * math.log(10)]
        self.descend(away.gradient(h.mean() / math.log(10)))
        mean = h.detach().mean() / math.log(10)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean

    def rotation(self, inputs: Tensor) -> None:
        """The turned images go through a copy of the model: only the upright ones move the statistics."""
        other = copy.deepcopy(self)
        self.adapting(inputs)
        images = torch.stack([torch.rot90(image, turns) for turns in range(4) for image in inputs])
        hidden = []
        hook = other.model.head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        other.adapting(images)
        hook.remove()
        assert other.model.rotation_head is not None
        log_p = (hidden[0] @ other.model.rotation_head.weight.T).log_softmax(-1)  # [4 B, 4]
        right = torch.cat([log_p[turns * len(inputs) :][: len(inputs), turns] for turns in range(4)])
        self.descend(other.gradient(-right.mean() / math.log(4)))

    def dynamic_evaluation(self, inputs: Tensor) -> None:
        log_p = self.adapting(inputs).log_softmax(-1)
        surprise = -log_p[:, :-1].gather(-1, inputs[:, 1:, None].long()).mean()
        gradient, old = self.gradient(surprise), [weight.detach().clone() for weight in self.weights]
        self.descend(gradient)
        with torch.no_grad():
            for weight, first, before in zip(self.weights, self.first, old, strict=True):
                weight.add_(0.01 * (first - before))


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


@every_case
def test_two_steps_equal_the_reference(method, config, group):
    settings, model = SETTINGS[method], make_model(config)
    reference = Reference(model, group, settings)
    state = ttt.start(model, settings, group)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in (1, 2):
        inputs = make_inputs(config, seed)
        step = method(model, state, inputs, settings)
        getattr(reference, method.__name__)(inputs)
        assert 0 < step.selected <= len(inputs)
        if method in (ttt.eata, ttt.sar):
            assert step.selected < len(inputs), "nothing was left out: the test tests too little"
    expected = reference.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for average in state.averages.values():
        torch.testing.assert_close(average, reference.average)
    assert bool(state.averages) == (method in (ttt.eata, ttt.sar))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    moved = {name for name, _ in model.named_parameters()} & changed
    assert bool(moved) == (method is not ttt.batch_statistics)
    assert all(in_group(name, group) for name in moved)
    assert not any(module.training for module in model.modules())


@every_case
def test_reset_equals_a_fresh_start_and_restore_is_exact(method, config, group):
    settings = SETTINGS[method]
    model = make_model(config)
    state = ttt.start(model, settings, group)
    fresh = whole_state(model, state)

    def take(*seeds: int) -> dict[str, Tensor]:
        for seed in seeds:
            method(model, state, make_inputs(config, seed), settings)
        return whole_state(model, state)

    middle = take(1, 2)
    saved = state.snapshot(model)
    end = take(3, 4)
    assert any(not torch.equal(end[name], middle[name]) for name in middle)
    state.restore(model, saved)
    assert_same(whole_state(model, state), middle)
    assert_same(take(3, 4), end)
    state.restore(model, saved)  # a snapshot is not used up
    assert_same(whole_state(model, state), middle)
    state.reset(model)
    assert_same(whole_state(model, state), fresh)
    assert_same(take(1, 2), middle)


@pytest.mark.parametrize("method", [ttt.eata, ttt.sar])
def test_an_empty_selection_changes_nothing_and_builds_no_graph(method, monkeypatch):
    model = make_model(VISION)
    settings = SETTINGS[method]
    state = ttt.start(model, settings)
    method(model, state, make_inputs(VISION, 1), settings)  # momentum and averages are there to be disturbed
    with torch.no_grad():
        model.head.weight.mul_(1e-3)  # now nobody is sure of anything
    before, gradients = (
        whole_state(model, state),
        [p.grad.clone() for p in state.parameters if p.grad is not None],
    )
    graphs = []
    model.register_forward_hook(lambda module, args, output: graphs.append(output.logits.requires_grad))
    assert method(model, state, make_inputs(VISION, 2), settings) == ttt.Step(selected=0)
    assert graphs == [False]
    assert_same(whole_state(model, state), before)
    after = [p.grad for p in state.parameters if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, gradients, strict=True))


def test_eata_leaves_out_what_it_has_just_seen():
    model, settings = make_model(VISION), ttt.Eata(redundancy_margin=0.3)
    state = ttt.start(model, settings)
    inputs = make_inputs(VISION, 1)
    first = ttt.eata(model, state, inputs, settings)
    average = F.normalize(state.averages["probabilities"], dim=0)
    logits = Reference(model, "norms", settings).adapting(inputs).detach()
    p, h = logits.softmax(-1), entropy(logits)
    fresh = (h < 0.4 * math.log(10)) & (F.normalize(p, dim=1) @ average < 0.3)
    assert 1 < int(fresh.sum()) < first.selected
    assert ttt.eata(model, state, inputs, settings).selected == int(fresh.sum())


def test_sar_that_loses_all_samples_by_the_ascent_puts_everything_back():
    model, settings = make_model(VISION), ttt.Sar(rho=1e3)
    state = ttt.start(model, settings, "last_block")
    before = whole_state(model, state)
    state_of_first_filter = ttt.Sar(rho=1e-6)
    probe = copy.deepcopy(model)
    probe_state = ttt.start(probe, state_of_first_filter, "last_block")
    assert ttt.sar(probe, probe_state, make_inputs(VISION, 1), state_of_first_filter).selected > 0
    entropies = []

    def flatten_second_adapting_pass(module, args, output):
        entropies.append(output)
        return output if len(entropies) < 3 else type(output)(output.logits * 0, output.routing)

    model.register_forward_hook(flatten_second_adapting_pass)
    assert ttt.sar(model, state, make_inputs(VISION, 1), settings).selected == 0
    assert len(entropies) == 3
    assert_same(whole_state(model, state), before)


def test_the_ascent_has_its_length_and_is_undone_bit_for_bit():
    weights = [torch.nn.Parameter(torch.randn(50) * 10**k) for k in (-6, 0, 6)]
    gradients = [torch.randn(50) for _ in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    first = [weight.detach().clone() for weight in weights]
    with _ascended(weights, 0.05):
        moved = torch.cat([weight.detach() - old for weight, old in zip(weights[:2], first, strict=False)])
        share = torch.cat(gradients[:2]).norm()  # the third is too coarse to tell
        whole = torch.cat(gradients).norm()
        torch.testing.assert_close(moved.norm(), 0.05 * share / whole, rtol=1e-4, atol=0)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, first, strict=True))


def test_sar_recovers_when_its_average_falls_under_the_limit():
    model, settings = make_model(VISION), ttt.Sar(recover_below_nats=5.0)  # more than any entropy
    state = ttt.start(model, settings)
    fresh = whole_state(model, state)
    assert ttt.sar(model, state, make_inputs(VISION, 1), settings).recovered
    assert_same(whole_state(model, state), fresh)


def test_the_fisher_anchor_is_the_mean_squared_gradient_and_pulls_to_the_start():
    model, settings = make_model(VISION), ttt.Eata(learning_rate=1e-3, anchor_strength=50.0)
    state = ttt.start(model, settings)
    before = whole_state(model, state)
    clean = [make_inputs(VISION, seed) for seed in (7, 8)]
    ttt.fisher_anchor(model, state, clean)
    assert_same(whole_state(model, state), before)
    reference = Reference(model, "norms", settings)
    expected = [torch.zeros_like(weight) for weight in reference.weights]
    for inputs in clean:
        logits = reference.model(inputs).logits
        loss = -logits.log_softmax(-1).amax(-1).mean()
        expected = [e + g**2 / 2 for e, g in zip(expected, reference.gradient(loss), strict=True)]
    assert state.fisher is not None
    for fisher, e in zip(state.fisher, expected, strict=True):
        torch.testing.assert_close(fisher, e)

    def moved(anchored: bool) -> float:
        state.reset(model)
        fisher = state.fisher
        state.fisher = fisher if anchored else None
        for seed in range(6):
            ttt.eata(model, state, make_inputs(VISION, seed), settings)
        state.fisher = fisher
        pairs = zip(expected, state.parameters, state.source.parameters, strict=True)
        return sum(float((weight * (now.detach() - first) ** 2).sum()) for weight, now, first in pairs)

    assert moved(anchored=True) < moved(anchored=False)
    with pytest.raises(ValueError, match="at least one batch of source data"):
        ttt.fisher_anchor(model, state, [])


@every_case
def test_answers_that_are_no_numbers_stop_the_step_with_all_as_before(method, config, group):
    model, settings = make_model(config), SETTINGS[method]
    state = ttt.start(model, settings, group)
    method(model, state, make_inputs(config, 1), settings)
    name = "rotation_head.weight" if method is ttt.rotation else "head.weight"
    with torch.no_grad():
        model.get_parameter(name).fill_(torch.nan)
    before = whole_state(model, state)
    with pytest.raises(ttt.AdaptationDiverged, match="restore"):
        method(model, state, make_inputs(config, 2), settings)
    after = whole_state(model, state)
    assert before.pop(name).isnan().all() and after.pop(name).isnan().all()
    assert_same(after, before)


@pytest.mark.parametrize("group", ttt.GROUPS)
def test_groups_hold_what_their_name_says(group):
    for config in (VISION, *OF_ONE_SAMPLE, TURNING):
        model = make_model(config)
        parameters, names = ttt.collect_params(model, group)
        assert names == [name for name, _ in model.named_parameters() if in_group(name, group)]
        by_name = dict(model.named_parameters())
        assert all(by_name[name] is parameter for name, parameter in zip(names, parameters, strict=True))


@pytest.mark.parametrize("method", [ttt.batch_statistics, ttt.tent, ttt.eata, ttt.sar, ttt.rotation])
def test_a_single_sample_has_no_batch_statistics(method):
    model = make_model(TURNING)
    state = ttt.start(model, SETTINGS[method])
    with pytest.raises(ValueError, match="at least 2, got 1"):
        method(model, state, make_inputs(VISION, 1, n=1), SETTINGS[method])


@pytest.mark.parametrize("config", OF_ONE_SAMPLE, ids=lambda config: config.norm)
@pytest.mark.parametrize("method", [ttt.tent, ttt.eata, ttt.sar])
def test_a_norm_of_one_sample_learns_from_one_sample(method, config):
    model = make_model(config)
    state, image = ttt.start(model, SETTINGS[method]), make_inputs(config, 1, n=1)
    model.head.weight.mul_(2)  # sure enough of any image
    before = model(image).entropy.item()
    assert method(model, state, image, SETTINGS[method]).selected == 1
    assert model(image).entropy.item() < before


def test_what_cannot_be_is_refused():
    language, vision = make_model(model_config("language", "tiny")), make_model(VISION)
    with pytest.raises(ValueError, match="group 'router' is empty for this Linear"):
        ttt.collect_params(torch.nn.Linear(2, 2), "router")
    with pytest.raises(ValueError, match="group must be one of"):
        ttt.collect_params(vision, "heads")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="norm 'batch'"):
        ttt.start(language, ttt.BatchStatistics())
    with pytest.raises(ValueError, match="without parameters"):
        ttt.tent(vision, ttt.start(vision, ttt.BatchStatistics()), make_inputs(VISION, 1), ttt.Tent())
    dynamic = ttt.DynamicEvaluation()
    with pytest.raises(ValueError, match="task 'language'"):
        ttt.dynamic_evaluation(vision, ttt.start(vision, dynamic), make_inputs(VISION, 1), dynamic)
    with pytest.raises(ValueError, match="at least 2 bytes"):
        one = torch.zeros(3, 1, dtype=torch.uint8)
        ttt.dynamic_evaluation(language, ttt.start(language, dynamic), one, dynamic)
    with pytest.raises(ValueError, match="task 'vision'"):
        ttt.eata(language, ttt.start(language, ttt.Eata()), torch.zeros(3, 9).byte(), ttt.Eata())


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (ttt.Tent, {"learning_rate": 0.0}),
        (ttt.Tent, {"momentum": 1.0}),
        (ttt.BatchStatistics, {"statistics_momentum": 1.5}),
        (ttt.Eata, {"entropy_margin": math.nan}),
        (ttt.Eata, {"anchor_strength": -1.0}),
        (ttt.Sar, {"rho": 0.0}),
        (ttt.Sar, {"recover_below_nats": -0.1}),
        (ttt.DynamicEvaluation, {"decay": 1.0}),
        (ttt.RmsDynamicEvaluation, {"epsilon": 0.0}),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        make(**values)
