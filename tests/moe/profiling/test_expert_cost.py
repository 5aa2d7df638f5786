"""The measured cost of experts: who is alike, who gets the tokens, and what becomes of the readings."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from moe.device.base import Tick
from moe.model.config import ModelConfig, model_config
from moe.model.experts import Experts
from moe.model.transformer import MoEModel, initialise
from moe.profiling import expert_cost
from moe.profiling.expert_cost import measure_expert_cost

KINDS = ("zero", "copy", "copy", "constant")
CONFIG = dataclasses.replace(
    model_config("vision", "tiny"), expert_widths=(160, 160, 96, 0, 0, 0, 0), zero_computation=KINDS,
    top_k=2, top_k_choices=(1, 2),
)  # fmt: skip
IMAGES = torch.randint(0, 256, (40, 28, 28), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture
def model() -> MoEModel:
    return initialise(MoEModel(CONFIG), torch.Generator().manual_seed(0)).requires_grad_(False).eval()


def test_a_unit_of_work_is_every_token_of_every_layer_in_one_group(model, monkeypatch):
    seen: list[tuple[list[int], int]] = []
    real = Experts.forward

    def spy(self: Experts, x: Any, routing: Any) -> Any:
        seen.append((torch.bincount(routing.experts.flatten(), minlength=7).tolist(), len(x)))
        return real(self, x, routing)

    monkeypatch.setitem(expert_cost.TOKENS, "cpu", 1000)
    monkeypatch.setitem(expert_cost.WINDOW_S, "cpu", 0.0)
    monkeypatch.setitem(expert_cost.WARM_S, "cpu", 0.0)
    monkeypatch.setattr(expert_cost, "REPEATS", 2)
    monkeypatch.setattr(Experts, "forward", spy)
    measure_expert_cost(model, IMAGES, None)
    passes = seen[CONFIG.n_layers :]  # the first is the model's own, which fetches the tokens
    assert all(n == 1000 for _, n in passes)
    expected = [[500, 500, 0, 0, 0, 0, 0], [0, 0, 1000, 0, 0, 0, 0], [0, 0, 0, 1000, 0, 0, 0],
                [0, 0, 0, 0, 500, 500, 0], [0, 0, 0, 0, 0, 0, 1000]]  # fmt: skip
    assert {tuple(counts) for counts, _ in passes} == {tuple(counts) for counts in expected}


class Device:
    """A device whose passes take a time and an energy known from the group."""

    def __init__(self) -> None:
        self.now, self.energy_j, self.idle_w = 0.0, 0.0, 50.0

    def work(self, seconds: float, joules: float) -> None:
        self.now += seconds
        self.energy_j += joules + self.idle_w * seconds

    def window(self, between: Any, seconds: float) -> tuple[Tick, Tick]:
        between()
        start = Tick(self.energy_j, self.now)
        while self.now < start.time_s + seconds:
            between()
        return start, Tick(self.energy_j, self.now)


def test_costs_are_those_of_the_device_per_token_and_layer_above_idle(model, monkeypatch):
    device: Any = Device()
    costs = {0: (0.02, 8.0), 2: (0.015, 5.0), 3: (0.004, 1.0), 4: (0.005, 1.2), 6: (0.006, 1.5)}

    def unit(layers: Any, group: list[int], n_experts: int) -> Any:
        return lambda: device.work(*costs[group[0]])

    monkeypatch.setattr(expert_cost, "_unit", unit)
    monkeypatch.setattr(expert_cost, "idle_power_w", lambda meter: 50.0)
    monkeypatch.setattr(expert_cost.time, "perf_counter", lambda: device.now)
    found = measure_expert_cost(model, IMAGES, device)
    n_tokens = CONFIG.n_layers * expert_cost.TOKENS["cpu"]
    of_expert = [costs[first] for first in (0, 0, 2, 3, 4, 4, 6)]
    np.testing.assert_allclose(found.latency_s, [seconds / n_tokens for seconds, _ in of_expert])
    assert found.energy_j is not None
    np.testing.assert_allclose(found.energy_j, [joules / n_tokens for _, joules in of_expert])
    np.testing.assert_allclose(found.relative(), [joules / 8.0 for _, joules in of_expert])


def test_without_a_meter_cost_is_time():
    latency_s, none = np.array([3.0, 1.5]), np.zeros(2)
    assert expert_cost.ExpertCost(latency_s, none, None, None).relative().tolist() == [1.0, 0.5]


def test_a_config_of_another_length_names_the_rule():
    with pytest.raises(ValueError, match="zero_computation needs one of"):
        dataclasses.replace(CONFIG, zero_computation=("zero",))
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG
