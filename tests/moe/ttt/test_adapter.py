"""The adapter, alone and behind the runner: its steps, its refusals, and that it can undo all."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe import ttt
from moe.model.config import ModelConfig, model_config
from moe.model.layers import BatchNorm
from moe.model.transformer import MoEModel, initialise
from moe.service.score.runner import NonFiniteAnswersError, Runner
from moe.workload import Knobs

VISION = model_config("vision", "tiny")
QUICK = ttt.GuardSettings(
    concentration_limit=0.8, entropy_limit=0.2, average_decay=0.5, probation=3, warm_up=4
)
STEP = Knobs(batch_size=16, expert_count=2, ttt_steps=1)


class Pool:
    """Random images of one shift."""

    task, shifts = "vision", ("clean",)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(256, (1, 200, 28, 28), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.inputs.shape[1]

    def take(self, shift: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[shift][index], index % 10


def make_model(config: ModelConfig = VISION) -> MoEModel:
    return initialise(MoEModel(config), torch.Generator().manual_seed(0)).eval()


def make_runner(guard: ttt.GuardSettings | None, settings: ttt.BatchStatistics | None = None) -> Any:
    model, pool = make_model(), Pool()
    runner: Any = Runner(model, pool, "cpu", adapter=ttt.Adapter(model, settings, guard=guard))  # pyright: ignore[reportArgumentType]
    return runner


def whole_state(adapter: ttt.Adapter) -> dict[str, Tensor]:
    """Every tensor that a step could change, found without the code under test."""
    tensors = {**adapter.model.state_dict(), **adapter.state.averages}
    if adapter.state.optimizer is not None:
        for i, memory in adapter.state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {i} {key}": value for key, value in memory.items() if value is not None}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_service_s_unguarded_tent_is_the_hand_written_loop_bit_for_bit():
    """Batches of the runner against batch statistics, mean entropy and SGD with momentum, written out."""
    runner = make_runner(None)
    other = copy.deepcopy(runner.model)
    norms = [module for module in other.modules() if isinstance(module, BatchNorm)]
    weights = [weight for norm in norms for weight in (norm.weight, norm.bias)]
    velocity: list[Tensor] = []
    batches = [((0, 30), 4, 0.0, 1), ((30, 60), 2, 0.3, 2), ((60, 170), 8, 0.0, 1)]
    for (first, last), top_k, bias, steps in batches:
        images = runner.samples.inputs[0][runner.order[first:last]]
        knobs = Knobs(batch_size=last - first, expert_count=top_k, routing_bias=bias, ttt_steps=steps)
        result = runner.launch([(first, last)], 0, knobs).result()
        assert (result.ttt_steps, result.ttt_left_out, result.ttt_rolled_back) == (steps, 0, 0)
        with torch.no_grad():
            log_p = other(images, top_k, bias).logits.log_softmax(dim=-1)
        expected = -(log_p.exp() * log_p).sum().double().item() / math.log(10)
        assert result.entropy_sum == pytest.approx(expected, rel=1e-6)
        for _ in range(steps):
            for norm in norms:
                norm.train()
            log_p = other(images[:64], top_k, bias).logits.log_softmax(dim=-1)
            for norm in norms:
                norm.eval()
            loss = (-(log_p.exp() * log_p).sum(dim=-1) / math.log(10)).mean()
            gradient = torch.autograd.grad(loss, weights)
            velocity = velocity or [torch.zeros_like(g) for g in gradient]
            velocity = [v * 0.9 + g for v, g in zip(velocity, gradient, strict=True)]
            with torch.no_grad():
                for weight, v in zip(weights, velocity, strict=True):
                    weight.add_(v, alpha=-1e-3)
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert runner.adapter.counters == ttt.GuardCounters(steps=4)


@pytest.mark.parametrize("guard", [None, QUICK])
@pytest.mark.parametrize("kind", ["batch_statistics", "tent", "eata", "sar"])
def test_a_reset_adapter_does_what_a_fresh_one_does(kind, guard):
    def settings() -> ttt.BatchStatistics:
        make: Any = ttt.METHODS[kind][0]
        return make(entropy_margin=1.0) if kind in ("eata", "sar") else make()

    runner, fresh = make_runner(guard, settings()), make_runner(guard, settings())
    start = whole_state(runner.adapter)
    for i in range(6):
        runner.launch([(16 * i, 16 * i + 16)], 0, STEP)
    assert not same(whole_state(runner.adapter), start) and runner.adapter.adapted
    seen = runner.adapter.counters
    runner.reset(3)
    fresh.reset(3)
    assert same(whole_state(runner.adapter), start) and not runner.adapter.adapted
    for i in range(8):
        results = [r.launch([(16 * i, 16 * i + 16)], 0, STEP).result() for r in (runner, fresh)]
        assert results[0].entropy_sum == results[1].entropy_sum
    assert same(whole_state(runner.adapter), whole_state(fresh.adapter))
    new = {name: value - getattr(seen, name) for name, value in vars(runner.adapter.counters).items()}
    assert ttt.GuardCounters(**new) == fresh.adapter.counters


def test_a_snapshot_is_put_back_bit_for_bit():
    runner = make_runner(QUICK)
    runner.launch([(0, 16)], 0, STEP)
    saved, then = runner.adapter.snapshot(), whole_state(runner.adapter)
    runner.launch([(16, 32)], 0, STEP)
    assert not same(whole_state(runner.adapter), then)
    runner.adapter.restore(saved)
    assert same(whole_state(runner.adapter), then) and runner.adapter.adapted


@pytest.mark.parametrize("guard", [None, QUICK])
def test_a_batch_of_one_is_a_counted_refusal(guard):
    runner = make_runner(guard)
    before = whole_state(runner.adapter)
    result = runner.launch([(5, 6)], 0, Knobs(batch_size=1, expert_count=2, ttt_steps=2)).result()
    assert (result.ttt_steps, result.ttt_left_out, result.ttt_rolled_back) == (0, 2, 0)
    assert runner.adapter.counters == ttt.GuardCounters(empty=1)
    assert same(whole_state(runner.adapter), before)


@pytest.mark.parametrize("ttt_steps", [0, 1])
def test_an_adapted_model_without_finite_answers_is_restored_and_answers_again(ttt_steps):
    runner, unspoilt = make_runner(QUICK), make_runner(QUICK)
    start = whole_state(runner.adapter)
    runner.launch([(0, 16)], 0, STEP)  # fewer steps than the probation: the start is what is known as good
    with torch.no_grad():
        runner.model.blocks[0].attention_norm.weight[0] = math.nan
    result = runner.launch([(16, 32)], 0, Knobs(batch_size=16, expert_count=2, ttt_steps=ttt_steps)).result()
    expected = unspoilt.launch([(16, 32)], 0, Knobs(batch_size=16, expert_count=2)).result()
    assert np.array_equal(result.correct, expected.correct)
    assert (result.confidence_sum, result.entropy_sum) == (expected.confidence_sum, expected.entropy_sum)
    assert (result.ttt_steps, result.ttt_left_out) == (0, ttt_steps)
    assert runner.adapter.counters.non_finite == runner.adapter.counters.rollbacks == 1
    assert same(whole_state(runner.adapter), start)


def test_the_second_answer_takes_its_time():
    runner = make_runner(QUICK)
    runner.launch([(0, 16)], 0, STEP)
    with torch.no_grad():
        runner.model.blocks[0].attention_norm.weight[0] = math.nan
    batch = runner.launch([(16, 32)], 0, Knobs(batch_size=16, expert_count=2))
    first = batch.answered_at
    result = batch.result()
    assert batch.freed_at == batch.answered_at > first
    assert result.answer_s > 0 and result.ttt_rolled_back == 1
    assert batch.result() is not None  # reading twice answers once
    assert runner.adapter.counters.rollbacks == 1


@pytest.mark.parametrize("guard", [None, QUICK])
def test_an_unadapted_model_without_finite_answers_is_an_error(guard):
    runner = make_runner(guard)
    with torch.no_grad():
        runner.model.head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteAnswersError, match="not finite"):
        runner.launch([(0, 16)], 0, Knobs(batch_size=16, expert_count=2)).result()
    assert not runner.adapter.rescue()


def test_what_an_adapter_cannot_do_is_refused():
    language = make_model(model_config("language", "tiny"))
    with pytest.raises(ValueError, match=r"tent is not for task 'language'.*dynamic_evaluation"):
        ttt.Adapter(language)
    with pytest.raises(ValueError, match=r"dynamic_evaluation is not for task 'vision'.*tent"):
        ttt.Adapter(make_model(), ttt.DynamicEvaluation())

    class Strange(ttt.Tent):
        pass

    with pytest.raises(ValueError, match="got Strange"):
        ttt.Adapter(make_model(), Strange())
    with pytest.raises(ValueError, match="no adaptation"):
        pool: Any = Pool()
        pool.task = "language"
        Runner(language, pool, "cpu").adapt(torch.zeros(2, 8), torch.zeros(2, 256), STEP)


def test_language_adapts_where_it_is_told_to():
    model = make_model(model_config("language", "tiny"))
    adapter = ttt.Adapter(model, ttt.DynamicEvaluation(), "last_block", guard=None)
    chunk = torch.randint(256, (1, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert adapter.adapt(chunk, torch.empty(0), 2) == 2
    assert adapter.counters == ttt.GuardCounters(steps=2)
