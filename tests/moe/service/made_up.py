"""A live service on a made-up model and a made-up clock, for tests that check it request by request."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moe.model.router import Routing
from moe.model.transformer import ModelOutput
from moe.service.score.live import LiveWorkload
from moe.service.score.runner import BatchResult, Runner
from moe.service.traffic import TrafficConfig
from moe.workload import Knobs

EXPERTS, LAYERS, POOL = 4, 2, 101
CAPACITY_RPS = 400.0
EPSILON_S = 1e-5


class Clock:
    """Time that passes when someone waits or computes, and a little whenever it is read."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def __call__(self) -> float:
        self.time_s += 1e-7
        return self.time_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.time_s += seconds


class Samples:
    """Sample number i of every shift is i; odd ones are answered wrongly."""

    task, shifts = "vision", ("clean", "dark", "loud")

    def __len__(self) -> int:
        return POOL

    def take(self, shift, index):
        return index, torch.zeros_like(index)


class Model:
    """Answers 0 to even samples and 1 to odd ones, in a time linear in the batch."""

    config = SimpleNamespace(task="vision", norm="rms", n_experts=EXPERTS)

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seen = clock, []
        self.answer = torch.tensor([2.0, 0.0])

    def __call__(self, inputs, top_k, routing_bias, n_samples=None):
        self.seen.append(inputs.tolist())
        self.clock.sleep(latency_s(len(inputs), top_k))
        logits = torch.where((inputs % 2 == 0)[:, None], self.answer, self.answer.flip(0))
        experts = torch.arange(top_k).expand(len(inputs), top_k)
        routing = Routing(torch.zeros(len(inputs), EXPERTS), torch.ones(len(inputs), top_k) / top_k, experts)
        return ModelOutput(logits, (routing,) * LAYERS)


def latency_s(n: int, top_k: int) -> float:
    return 0.004 + n * top_k * 1e-3


@dataclass(frozen=True)
class Service:
    deadline_s: tuple[float, float] = (0.15, 1.0)
    max_wait_s: tuple[float, float] = (0.04, 0.3)
    expire_after_s: tuple[float, float] = (0.5, 3.0)


@dataclass
class Launch:
    at_s: float
    ranges: list[tuple[int, int]]
    shift: int
    knobs: Knobs
    batch: Any


def make(
    traffic: TrafficConfig | None = None, service: Service = Service(), runner=None
) -> tuple[Any, Clock, list[Launch]]:
    """A workload, its clock and the launches it makes."""
    clock = Clock()
    model: Any = Model(clock)
    samples: Any = Samples()
    traffic = traffic or TrafficConfig(kind="poisson", low_load=0.8, high_load=0.8)
    served = Runner(model, samples, "cpu", clock)
    if runner is not None:
        served = runner(served, clock)
    workload: Any = LiveWorkload(served, traffic, CAPACITY_RPS, 12, service, clock=clock, sleep=clock.sleep)
    launches: list[Launch] = []
    launch = workload.runner.launch

    def spy(ranges, shift, knobs):
        at_s = workload._now()
        batch = launch(ranges, shift, knobs)
        launches.append(Launch(at_s, ranges, shift, knobs, batch))
        return batch

    workload.runner.launch = spy
    return workload, clock, launches


class PipelinedRunner:
    """A device of its own: a launch returns at once, and batches run one after another."""

    LAUNCH_S = 2e-3

    def __init__(self, runner, clock) -> None:
        self.samples, self.adapts, self.n_experts = runner.samples, False, runner.n_experts
        self.clock, self.free_at = clock, 0.0

    def replays(self, n: int, expert_count: int) -> bool:
        return False

    def reset(self, seed: int) -> None:
        self.free_at = 0.0

    def launch(self, ranges, shift, knobs):
        self.clock.sleep(self.LAUNCH_S)
        n = sum(last - first for first, last in ranges)
        start = max(self.clock(), self.free_at)
        self.free_at = start + latency_s(n, knobs.expert_count)
        result = BatchResult(
            np.arange(n) % 2 == 0,
            0.5 * n,
            0.5 * n,
            np.ones((LAYERS, EXPERTS), np.int64),
            self.free_at - start,
            0.0,
        )
        done = self.free_at
        return SimpleNamespace(
            done=lambda: self.clock() >= done, answered_at=done, freed_at=done, result=lambda: result
        )


class ReplayingRunner(PipelinedRunner):
    """A launch takes next to nothing."""

    LAUNCH_S = 1e-4

    def replays(self, n: int, expert_count: int) -> bool:
        return True
