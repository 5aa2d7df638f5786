"""Batches that are filled up against the same batches alone; on a card captured against launched.

On a CPU a call that is made again stands for a graph: it overwrites what it gave, as a replay does.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe import ttt
from moe.data.pools import SamplePool
from moe.device.torch_device import serving_dtype
from moe.model.config import ModelConfig, model_config
from moe.model.layers import BatchNorm
from moe.model.router import Routing
from moe.model.transformer import ModelOutput, MoEModel
from moe.model.variants import with_norm
from moe.profiling.command import BATCH_SIZES
from moe.service.score.answers import Answers, pack
from moe.service.score.graphs import AnswerGraphs, ladder
from moe.service.score.runner import BatchResult, Runner
from moe.workload import Knobs
from tests.moe.ttt.ttt_models import OF_ONE_SAMPLE, TURNING, VISION, make_inputs, make_model

POOL = 200
LANGUAGE = model_config("language", "tiny")
FREE = replace(
    VISION, expert_widths=(160, 160, 96, 96, 96, 0, 0, 0), zero_computation=("zero", "copy", "constant")
)
BALANCED = replace(VISION, balance_bias=True)
MODELS = (VISION, *OF_ONE_SAMPLE, LANGUAGE, with_norm(LANGUAGE, "layer"), FREE, BALANCED)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COUNTS = (1, 4, 8)
KNOBS = [(1, 0.0), (4, 0.3), (8, 1.0), (4, 0.0)]


class Pool(SamplePool):
    """Random samples under two shifts."""

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (28, 28) if config.task == "vision" else (128,)
        self.task, self.shifts = config.task, ("clean", "other")
        self.inputs = torch.randint(256, (2, POOL, *shape), dtype=torch.uint8, generator=generator).to(device)
        self.targets = torch.randint(10, (2, POOL), generator=generator).to(device)


class Again:
    """A call made again, in place of a CUDA graph."""

    def __init__(self, call: Any) -> None:
        self.call, self.answers, self.replays = call, call(), 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        now = self.call()
        for name in ("inputs", "logits", "packed"):
            getattr(self.answers, name).copy_(getattr(now, name))


class Recorder:
    """As `moe.model.graph.Recorder`, on a CPU."""

    def __init__(self) -> None:
        self.calls = 0

    @torch.no_grad()
    def record(self, call: Any) -> tuple[Again, Answers]:
        self.calls += 1
        again = Again(call)
        return again, again.answers

    def reserved_bytes(self) -> int:
        return 100 * self.calls


def spread_norms(model: MoEModel) -> MoEModel:
    """Statistics and gains of batch norms as they could have been trained."""
    generator = torch.Generator().manual_seed(1)
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(std=0.3, generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("balance_bias"):
            buffer.normal_(std=0.1, generator=generator)
    return model


def make_runner(config: ModelConfig, device: str = "cpu", captured: bool = True, **settings: Any) -> Runner:
    model = spread_norms(make_model(config)).requires_grad_(False).to(device)
    model.cast_weights(serving_dtype(torch.device(device)))
    adapter = ttt.Adapter(model, **settings) if config.norm == "batch" else None
    runner = Runner(model, Pool(config, device), device, adapter=adapter)
    if captured and device == "cpu":
        runner._graphs = AnswerGraphs(model, runner.samples, runner.order, Recorder())
    return runner


def launched(runner: Runner, *arguments: Any) -> BatchResult:
    """Answer kernel by kernel."""
    graphs, runner._graphs = runner._graphs, None
    result = finished(runner, runner.launch(*arguments))
    runner._graphs = graphs
    return result


def finished(runner: Runner, batch: Any) -> BatchResult:
    runner.synchronize()
    assert batch.done()
    return batch.result()


def assert_alike(found: BatchResult, expected: BatchResult, device: str) -> None:
    """Equal but for the order of sums; in bfloat16 near ties may fall to either side."""
    exact = device == "cpu"
    assert found.correct.shape == expected.correct.shape
    assert (found.correct != expected.correct).mean() <= (0.0 if exact else 0.05)
    rel = 1e-4 if exact else 2e-2
    assert found.confidence_sum == pytest.approx(expected.confidence_sum, rel=rel)
    assert found.entropy_sum == pytest.approx(expected.entropy_sum, rel=rel)
    load, plain = found.tokens_per_expert, expected.tokens_per_expert
    assert np.array_equal(load.sum(axis=-1), plain.sum(axis=-1))
    assert np.abs(load - plain).sum() <= (0.0 if exact else 0.02) * plain.sum()


@pytest.mark.parametrize(("top_k", "bias"), KNOBS)
@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.task}-{config.norm}")
def test_what_fills_a_batch_up_changes_nothing(config, top_k, bias):
    model = spread_norms(make_model(config))
    inputs = make_inputs(config, 0)
    n = len(inputs) * 2 // 3
    other = torch.cat([inputs[:n], inputs[:1].expand(len(inputs) - n, *inputs.shape[1:])])
    with torch.no_grad():
        alone = model(inputs[:n], top_k, bias)
        padded, otherwise = (
            model(rows, top_k, torch.tensor(bias), n_samples=torch.tensor(n)) for rows in (inputs, other)
        )
    torch.testing.assert_close(padded.logits[:n], alone.logits, rtol=1e-4, atol=1e-3)
    assert torch.equal(padded.logits[:n], otherwise.logits[:n])
    assert torch.equal(padded.tokens_per_expert, alone.tokens_per_expert)
    for routing, plain in zip(padded.routing, alone.routing, strict=True):
        real = len(plain.experts)
        assert torch.equal(routing.experts[:real], plain.experts)
        assert (routing.experts[real:] == config.n_experts).all() and not routing.weights[real:].any()
        assert routing.dispatch.expert_ends[-1] == real * top_k  # rows that experts compute


def test_no_sum_sees_what_fills_a_batch_up():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 10, generator=generator), torch.arange(6)
    experts = torch.tensor([0, 3, 1, 1, 4, 4])[:, None]  # the last two reach none of four
    routing = Routing(torch.zeros(6, 4), torch.ones(6, 1), experts)
    spoilt = logits.clone()
    spoilt[4:] = math.nan
    packed = pack(ModelOutput(spoilt, (routing,)), targets, torch.tensor(4))
    p = logits[:4].double().softmax(dim=-1)
    assert packed[0].item() == pytest.approx(p.max(dim=-1).values.sum().item(), rel=1e-6)
    assert packed[1].item() == pytest.approx(-(p * p.log()).sum().item() / math.log(10), rel=1e-6)
    assert packed[2:6].tolist() == [1, 2, 0, 1]
    assert packed[6:10].tolist() == (p.argmax(dim=-1) == targets[:4]).tolist()


def test_a_batch_takes_the_next_size_and_fills_it_by_a_quarter_at_most():
    for tokens in (16, 64, 128, 49):
        sizes = ladder(tokens)
        assert list(sizes) == sorted(set(sizes))
        assert all(b / a <= 1.25 + 1 / a for a, b in itertools.pairwise(sizes))
    runner = make_runner(VISION)
    runner.capture(200, (1, 4))
    graphs = runner._graphs
    assert graphs is not None
    assert [graphs.size_of(n, 4) for n in (1, 64, 65, 81, 128, 129, 193, 224)] == [
        64, 64, 80, 96, 128, 160, 224, 224,
    ]  # fmt: skip
    assert (
        graphs.size_of(225, 4) is None and graphs.size_of(64, 2) is None and graphs.size_of(9999, 4) is None
    )
    assert runner.graph_memory_bytes == 100 * 2 * 8
    runner.capture(100, (4,))  # all there
    assert runner.graph_memory_bytes == 100 * 2 * 8


@pytest.mark.parametrize(("task", "tokens"), [("vision", 16), ("language", 128)])
def test_sizes_that_are_measured_are_sizes_of_graphs(task, tokens):
    sizes = ladder(tokens)
    assert all(n in sizes or n > sizes[-1] for n in BATCH_SIZES[task, "base"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [VISION, OF_ONE_SAMPLE[0], LANGUAGE], ids=lambda config: config.task)
def test_graphs_answer_what_launched_batches_answer(config, device):
    runner = make_runner(config, device)
    runner.capture(160, COUNTS)
    graphs = runner._graphs
    assert graphs is not None and runner.captured
    batches = [
        [(0, 64)], [(5, 30), (3, 40)], [(0, 0), (150, 215)], [(199, 201), (0, 0)], [(7, 8)], [(0, 130)],
    ]  # fmt: skip
    for seed, (ranges, (top_k, bias)) in enumerate(zip(batches, itertools.cycle(KNOBS), strict=False)):
        runner.reset(seed)
        n = sum(last - first for first, last in ranges)
        assert runner.replays(n, top_k)
        arguments = (ranges, seed % 2, Knobs(batch_size=n, expert_count=top_k, routing_bias=bias))
        assert_alike(finished(runner, runner.launch(*arguments)), launched(runner, *arguments), device)


class Operators(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "unique_dim",
    "_unique2", "repeat_interleave", "lift_fresh", "lift_fresh_copy", "randperm",
}  # fmt: skip
"""What reads a value on the host, or brings one there, neither of which a graph can hold."""


@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.task}-{config.norm}")
def test_a_step_asks_nothing_of_the_host(config):
    graphs = make_runner(config)._graphs
    assert graphs is not None
    graphs.set([(0, 20), (3, 10)], 1, 0.5)
    with torch.no_grad(), Operators() as seen:
        graphs.step(graphs.sizes[0], 2)
    assert {"index_select", "sort", "cat"} <= seen.names and not seen.names & WAITING
    with Operators() as asked:
        float(torch.ones(()))
    assert asked.names & WAITING


@pytest.mark.parametrize("device", DEVICES)
def test_batches_without_a_graph_are_launched(device):
    runner = make_runner(VISION, device)
    runner.capture(64, (4,))
    for n, top_k in ((100, 4), (50, 2)):
        arguments = ([(0, n)], 0, Knobs(batch_size=n, expert_count=top_k))
        assert not runner.replays(n, top_k)
        assert_alike(finished(runner, runner.launch(*arguments)), launched(runner, *arguments), device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_launched_ahead_by_the_same_graph_leaves_the_one_before_alone(device):
    runner = make_runner(VISION, device)
    runner.capture(64, (4,))
    arguments = [([(first, first + 60)], 0, Knobs(batch_size=60)) for first in (0, 60, 120)]
    batches = [runner.launch(*each) for each in arguments]
    results = [finished(runner, batch) for batch in batches]
    for result, each in zip(results, arguments, strict=True):
        assert_alike(result, launched(runner, *each), device)
    assert len({result.entropy_sum for result in results}) == 3
    assert runner._graphs is not None
    graph, _ = runner._graphs._graphs[64, 4]
    assert device == "cuda" or graph.replays == 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_answers_with_the_adapted_model_and_after_a_reset_with_the_first(device):
    runner = make_runner(VISION, device, guard=None)
    runner.capture(128, (4,))
    first = ([(0, 100)], 0, Knobs(batch_size=100))
    unadapted = finished(runner, runner.launch(*first))
    for step in range(3):
        arguments = ([(100 * step, 100 * step + 100)], 1, Knobs(batch_size=100, ttt_steps=2))
        assert finished(runner, runner.launch(*arguments)).ttt_steps == 2
    adapted = finished(runner, runner.launch(*first))
    assert abs(adapted.entropy_sum / unadapted.entropy_sum - 1) > 0.01
    assert_alike(adapted, launched(runner, *first), device)
    runner.reset(0)
    again = finished(runner, runner.launch(*first))
    assert again.entropy_sum == unadapted.entropy_sum and np.array_equal(again.correct, unadapted.correct)


def test_steps_learn_from_a_graph_s_answers_as_from_launched_ones():
    """Guarded, on weights that are the same bit for bit: a step reads the inputs, the guard the answers."""
    runners = [make_runner(VISION, captured=captured) for captured in (True, False)]
    runners[0].capture(128, (2, 4))
    for step in range(4):
        arguments = ([(30 * step, 30 * step + 90)], step % 2, Knobs(batch_size=90, ttt_steps=1))
        found, expected = (runner.launch(*arguments).result() for runner in runners)
        assert_alike(found, expected, "cpu")
        assert found.ttt_steps == expected.ttt_steps
    left, right = (runner.model.state_dict() for runner in runners)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("device", DEVICES)
def test_batches_answered_again_from_a_restored_model_keep_their_own_answers(device):
    runner = make_runner(VISION, device)
    runner.capture(64, (4,))
    arguments = [([(first, first + 50)], 0, Knobs(batch_size=50)) for first in (0, 50)]
    expected = [finished(runner, runner.launch(*each)) for each in arguments]
    runner.launch([(0, 60)], 0, Knobs(batch_size=60, ttt_steps=1))  # known as good is the start
    next(runner.model.norm.parameters()).data.fill_(math.nan)
    batches = [runner.launch(*each) for each in arguments]  # the second ahead
    results = [finished(runner, batch) for batch in batches]
    for result, plain in zip(results, expected, strict=True):
        assert result.ttt_rolled_back == 1
        assert_alike(result, plain, device)


def addresses(model: MoEModel) -> dict[str, int]:
    """Where every parameter and buffer lies."""
    return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize(
    ("method", "group"),
    [*((method, "norms") for method in ttt.METHODS), *((m, "last_block") for m in ttt.METHODS if m != "eva")],
)
def test_adaptation_moves_no_tensor_to_another_place(method, group):
    """A graph reads weights and statistics where they were when it was captured."""
    config = {"rotation": TURNING, "dynamic_evaluation": LANGUAGE}.get(method, VISION)
    model = spread_norms(make_model(config))
    settings = ttt.METHODS[method][0]()
    adapter = ttt.Adapter(model, settings, group, ttt.GuardSettings(warm_up=1, doubt_margin=0.9))
    before, values = addresses(model), copy.deepcopy(model.state_dict())
    kept = 0
    for seed in range(3):
        inputs = make_inputs(config, seed)
        kept += adapter.adapt(inputs, model(inputs).logits.detach(), 2)
        assert addresses(model) == before
    assert kept and any(not torch.equal(values[name], now) for name, now in model.state_dict().items())
    saved = adapter.snapshot()
    with torch.no_grad():
        for parameter in adapter.state.parameters:
            parameter.fill_(math.nan)
    assert adapter.rescue()
    adapter.restore(saved)
    adapter.reset()
    assert addresses(model) == before
    assert all(torch.equal(values[name], now) for name, now in model.state_dict().items())


def test_a_reset_draws_the_order_where_graphs_read_it():
    runner = make_runner(VISION)
    place, first = runner.order.data_ptr(), runner.order.clone()
    runner.reset(1)
    assert runner.order.data_ptr() == place and not torch.equal(runner.order, first)
    assert torch.equal(runner.order.sort().values, torch.arange(POOL))


def test_samples_are_the_same_by_a_shift_that_only_the_device_reads():
    pool, index = Pool(VISION), torch.tensor([3, 199, 0, 3])
    for shift in (0, 1):
        inputs, targets = pool.take(torch.tensor(shift), index)
        assert torch.equal(inputs, pool.inputs[shift][index])
        assert torch.equal(targets, pool.targets[shift][index])


@pytest.mark.gpu
def test_graphs_of_all_sizes_share_the_memory_of_the_largest():
    one, all_sizes = (make_runner(VISION, "cuda") for _ in range(2))
    assert one._graphs is not None
    one._graphs.sizes = one._graphs.sizes[-1:]
    for runner in (one, all_sizes):
        runner.capture(10_000, (1, 8))
    assert 0 < one.graph_memory_bytes <= all_sizes.graph_memory_bytes < 2 * one.graph_memory_bytes + 2**27


def tensors_of(answers: Answers) -> list[Tensor]:
    return [answers.inputs, answers.logits, answers.packed]


def test_a_view_of_the_first_requests_copies_nothing():
    whole = Answers(torch.zeros(8, 3), torch.zeros(8, 10), torch.arange(2.0 + 4 + 8), 2)
    part = whole.first(5)
    assert [len(tensor) for tensor in tensors_of(part)] == [5, 5, 2 + 4 + 5]
    for view, full in zip(tensors_of(part), tensors_of(whole), strict=True):
        assert view.data_ptr() == full.data_ptr() and torch.equal(view, full[: len(view)])
