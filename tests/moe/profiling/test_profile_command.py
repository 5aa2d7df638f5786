"""What `moe.profiling` measures: cells and their costs, states of the adaptation, and the energy meter."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe import ttt
from moe.device.base import Tick
from moe.model.config import ModelConfig
from moe.model.transformer import MoEModel, initialise
from moe.profiles import HELD_OUT, ProfileError, load_profile
from moe.profiling import command as profile
from moe.profiling import cost as profile_cost
from moe.profiling import quality as profile_quality
from moe.profiling.cost import (
    Cell,
    Costs,
    Visit,
    adaptation_cell,
    costs,
    held_out_cells,
    measure_cells,
    serving_cells,
)
from moe.profiling.quality import measure_quality
from moe.service.score.runner import Runner
from moe.workload import Knobs
from tests.moe.conftest import IDENTITY, made_up


def test_costs_are_medians_above_idle_with_their_spread():
    visits = [
        Visit(0.010, 100.0, 500.0, 40.0),
        Visit(0.012, 80.0, 480.0, 42.0),
        Visit(0.011, 90.0, 460.0, 44.0),
    ]
    result = costs(visits, 100.0)
    energies = [400 / 100, 380 / 80, 360 / 90]
    assert (result.latency_s, result.visits, result.start_temperature_c) == (0.011, 3, 42.0)
    assert result.energy_j == pytest.approx(statistics.median(energies))
    assert result.latency_spread == pytest.approx(0.001 / 0.011)
    assert result.energy_spread == pytest.approx(statistics.stdev(energies) / statistics.median(energies))
    without_meter = costs([v._replace(power_w=float("nan")) for v in visits], 0.0)
    assert np.isnan(without_meter.energy_j)
    assert without_meter.uncertainty == pytest.approx(0.001 / 0.011 / 3**0.5)


def test_held_out_cells_lie_between_those_of_the_tables():
    sizes, counts, biases = [64, 256, 1024], [1, 2, 4], [0.0, 1.0]
    table, held_out = serving_cells(sizes, counts, biases), held_out_cells(sizes, counts, biases)
    assert not set(table) & set(held_out)
    assert {161, 641} < {cell.batch_size for cell in held_out} and {0.0, 0.5} == {
        cell.routing_bias for cell in held_out
    }
    assert {cell.expert_count for cell in held_out} <= set(counts)
    assert held_out_cells([1, 2], counts, [0.0]) == []


def test_the_error_of_interpolation_is_that_of_the_tables():
    known = made_up()
    at = (36, 2, 0.5)
    cost = Costs(known.latency_at(*at) / 1.1, 0.0, known.energy_at(*at) / 0.8, 0.0, 2, 40.0)
    entry = profile.interpolation_error(known, Cell(*at, False), cost)
    assert entry["latency_error"] == pytest.approx(0.1) and entry["energy_error"] == pytest.approx(-0.2)
    assert tuple(entry) == HELD_OUT


class Images:
    """Random images under two shifts."""

    task, shifts = "vision", ("clean", "dark")

    def __init__(self) -> None:
        self.inputs = torch.randint(
            0, 256, (2, 300, 28, 28), generator=torch.Generator().manual_seed(0)
        ).byte()
        self.targets = torch.arange(600).view(2, 300) % 10

    def __len__(self) -> int:
        return 300

    def take(self, shift, index):
        return self.inputs[shift][index], self.targets[shift][index]


@pytest.fixture
def runner() -> Runner:
    config = ModelConfig(
        task="vision", d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, expert_widths=(16,) * 4,
        top_k=2, top_k_choices=(1, 2), norm="batch", n_classes=10,
    )  # fmt: skip
    model = initialise(MoEModel(config), torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    samples: Any = Images()
    return Runner(model, samples, "cpu")


def test_the_most_images_of_a_step_follow_from_the_runners_device(runner, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runner.adapt_batch == 64
    runner.device = torch.device("cuda")
    assert runner.adapt_batch == 256


def test_quality_tables_agree_with_the_bare_model(runner, monkeypatch):
    monkeypatch.setattr(profile_quality, "ADAPTED_STEPS", 4)
    monkeypatch.setattr(profile_quality, "LONG_STEPS", 5)
    monkeypatch.setattr(Runner, "adapt_batch", 32)
    samples, model = runner.samples, runner.model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quality = measure_quality(runner, [1, 2], [0.0, 1.0], samples=300, seed=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert quality.pure.shape == (2, 3, 2, 2, 3) and quality.mixed is not None
    assert quality.mixed.shape == (2, 3, profile_quality.MIXTURES, 3)
    for shift in range(2):
        output = model(samples.inputs[shift], 2, 1.0)
        right = (output.predictions == samples.targets[shift]).float().mean().item()
        expected = [right, output.confidence.mean().item(), output.entropy.mean().item()]
        np.testing.assert_allclose(quality.pure[shift, 0, 1, 1], expected, rtol=1e-4, atol=2 / 300)
        if shift == 0:
            share = output.tokens_per_expert / output.tokens_per_expert.sum(dim=-1, keepdim=True)
            np.testing.assert_allclose(quality.expert_share[1, 1], share.numpy(), atol=1e-3)
    assert np.all(quality.pure[:, 1:, ..., 2] != quality.pure[:, :1, ..., 2])
    sequence = quality.sequences[0]
    assert all(p.shift != q.shift for p, q in zip(sequence[2::3], sequence[3::3], strict=False))
    error = profile_quality.adaptation_error(quality, [0.0, 1.0], 1, 0.2)
    assert error is not None and error["points"] == sum(map(len, quality.sequences)) == 72
    assert 0.0 < error["confidence_rmse"] < error["confidence_max"] < 0.1


def test_a_mixture_of_states_is_the_mean_of_their_norms(runner):
    adapter, images = runner.adapter, runner.samples.inputs[1, :32]
    first = adapter.snapshot()
    answers = runner.answer(images, 2, 0.0).logits
    assert runner.adapt(images, answers, Knobs(expert_count=2, ttt_steps=3)) == 3
    second = adapter.snapshot()
    adapter.restore(profile_quality.mix(first, second, 0.25))
    moved = 0
    states = (adapter_tensors(saved) for saved in (adapter.snapshot(), first, second))
    for mixed, ours, others in zip(*states, strict=True):
        torch.testing.assert_close(mixed, 0.75 * ours + 0.25 * others)
        moved += not torch.equal(ours, others)
    assert moved > len(adapter.state.parameters)
    for part, end in ((0.0, first), (1.0, second)):
        ends = profile_quality.mix(first, second, part)
        assert all(
            torch.equal(a, b) for a, b in zip(adapter_tensors(ends), adapter_tensors(end), strict=True)
        )


def adapter_tensors(saved: ttt.Saved) -> list[torch.Tensor]:
    return [tensor for tensor in [*saved.parameters, *saved.statistics] if tensor.is_floating_point()]


def test_every_cell_is_visited_in_random_order_and_the_model_stays_as_it_was(runner):
    state = {name: value.clone() for name, value in runner.model.state_dict().items()}
    cells = [
        Cell(2, 1, 0.0, False),
        Cell(8, 2, 1.0, False),
        adaptation_cell(1, 2, 64),
        adaptation_cell(10**6, 2, 64),
    ]
    assert [cell.batch_size for cell in cells[2:]] == [2, 64]
    visits = measure_cells(runner, cells, None, 0.02, 0.0, 0.0, np.random.default_rng(0))
    assert {cell: len(seen) for cell, seen in visits.items()} == dict.fromkeys(cells, 2)
    assert all(visit.latency_s > 0 and visit.units_per_s > 0 for seen in visits.values() for visit in seen)
    assert all(torch.equal(value, state[name]) for name, value in runner.model.state_dict().items())


def test_time_that_is_left_goes_to_the_least_certain_cells(monkeypatch):
    cells = [Cell(2, 1, 0.0, False), Cell(8, 1, 0.0, False)]
    rng = np.random.default_rng(0)
    noisy = {2: 0.5, 8: 0.01}

    def visited(runner, cell, meter, window_s):
        return Visit(1.0 + noisy[cell.batch_size] * rng.random(), 1.0, float("nan"), float("nan"))

    monkeypatch.setattr(profile_cost, "visit", visited)
    monkeypatch.setattr(profile_cost, "Load", lambda runner, cell: SimpleNamespace(step=int, drain=int))
    idle = SimpleNamespace(reset=lambda seed: None)
    visits = measure_cells(idle, cells, None, 0.1, 1e3, 0.0, np.random.default_rng(0))  # pyright: ignore[reportArgumentType]
    assert [len(visits[cell]) for cell in cells] == [profile_cost.MOST_VISITS] * 2
    now = iter(range(100))
    monkeypatch.setattr(profile_cost, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    visits = measure_cells(idle, cells, None, 0.1, 4.5, 0.0, np.random.default_rng(0))  # pyright: ignore[reportArgumentType]
    assert [len(visits[cell]) for cell in cells] == [6, 2]


def test_the_command_writes_a_profile_that_loads(runner, monkeypatch, tmp_path, capsys):
    out = tmp_path / "cpu.json"
    monkeypatch.setattr(profile, "load_model", lambda task, size, device: runner.model)
    monkeypatch.setattr(
        profile, "identity", lambda task, size: {**IDENTITY, "config": runner.model.config.to_dict()}
    )
    monkeypatch.setattr(profile, "SamplePool", lambda task, shifts, device: runner.samples)
    monkeypatch.setattr(profile_quality, "ADAPTED_STEPS", 1)
    monkeypatch.setattr(profile_quality, "LONG_STEPS", 2)
    options = profile.Options(
        task="vision", size="tiny", device="cpu", out=out, batch_sizes=(4, 1), shifts=("clean", "dark"),
        expert_counts=(2,), window_s=0.01, within_s=0.1, samples=100,
    )  # fmt: skip
    profile.main(options)
    measured = load_profile(out)
    assert measured.latency_s.shape == measured.visits.shape == (2, 1, 2) and measured.visits.min() >= 2
    assert measured.energy_j is None and measured.idle_power_w is None
    assert measured.ttt_latency_s is not None and measured.ttt_energy_j is None
    assert measured.batch_size.tolist() == [1, 4] and measured.shifts == ("clean", "dark")
    assert measured.provenance["captured"] is False  # on a CPU
    assert measured.model["data_sha256"] == IDENTITY["data_sha256"] and measured.samples == 100
    assert {(cell["batch_size"], cell["routing_bias"]) for cell in measured.held_out} == {(3, 0.0), (4, 0.5)}
    spread = measured.provenance["spread"]["latency_spread"]
    assert spread["max"] >= spread["median"] >= 0.0
    printed = capsys.readouterr().out
    for part in (str(out), "latency spread", "latency interpolation", "adaptation model", "in the long run"):
        assert part in printed


class FakeMeter:
    """Draws 70 W at rest and 300 W under load, exactly."""

    def __init__(self) -> None:
        self.loads = 0

    def window(self, between, seconds: float) -> tuple[Tick, Tick]:
        load = isinstance(getattr(between, "__self__", None), profile_cost.Load)
        loaded = load or between.__name__ == "step"  # a cell, or a group of experts
        self.loads += load
        start = time.perf_counter()
        between()
        while (now := time.perf_counter()) < start + min(seconds, 0.02):
            between()
        return Tick(0.0, start), Tick((300.0 if loaded else 70.0) * (now - start), now)

    @property
    def gpu(self) -> SimpleNamespace:
        return SimpleNamespace(
            driver="none", missing=("mem_temp_c",), temperature_c=lambda: 45.0 + self.loads
        )


def test_a_metered_profile_has_energies_above_idle(runner, monkeypatch, tmp_path, capsys):
    card: Any = FakeMeter()
    monkeypatch.setattr(profile, "load_model", lambda task, size, device: runner.model)
    monkeypatch.setattr(profile, "identity", lambda task, size: IDENTITY)
    monkeypatch.setattr(profile, "SamplePool", lambda task, shifts, device: runner.samples)
    monkeypatch.setattr(profile, "open_meter", lambda device: card)
    monkeypatch.setattr(profile_quality, "ADAPTED_STEPS", 1)
    monkeypatch.setattr(profile_quality, "LONG_STEPS", 2)
    monkeypatch.setattr(profile_quality, "SEQUENCES", 1)
    monkeypatch.setattr(profile_cost, "REST_S", 0.0)
    out = tmp_path / "card.json"
    profile.main(
        profile.Options(
            task="vision", size="tiny", device="cpu", out=out, batch_sizes=(4, 16), shifts=("clean", "dark"),
            expert_counts=(2,), window_s=0.01, within_s=0.1, samples=50,
        )
    )  # fmt: skip
    measured = load_profile(out)
    assert measured.idle_power_w == pytest.approx(70.0) and measured.energy_j is not None
    # 230 W above idle, back to back: energy over latency is that, or more with gaps between the units.
    assert 230.0 * 0.5 < measured.active_power_w(16, 2) < 230.0 * 3
    assert measured.ttt_energy_j is not None and measured.start_temperature_c is not None
    assert 45.0 <= measured.start_temperature_c.min() < measured.start_temperature_c.max()
    assert card.loads == measured.provenance["spread"]["visits"]["total"]
    assert all(cell["energy_error"] is not None for cell in measured.held_out)
    assert measured.provenance["missing"] == ["mem_temp_c"]
    assert "energy interpolation" in capsys.readouterr().out


def test_a_count_of_experts_without_the_models_own_is_refused(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "load_model", lambda task, size, device: runner.model)
    monkeypatch.setattr(profile, "SamplePool", lambda task, shifts, device: runner.samples)
    options = profile.Options(
        task="vision", size="tiny", device="cpu", out=tmp_path / "none.json", expert_counts=(1,)
    )
    with pytest.raises(ProfileError, match="expert_count=2"):
        profile.measure(options)


@pytest.mark.parametrize(("method", "rate"), [("neo", 0.5), ("bank", 1.0)])
def test_a_profile_says_what_share_a_step_of_its_method_replaces(runner, method, rate, monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "load_model", lambda task, size, device: runner.model)
    monkeypatch.setattr(profile, "identity", lambda task, size: IDENTITY)
    monkeypatch.setattr(profile, "SamplePool", lambda task, shifts, device: runner.samples)
    for name, value in (("ADAPTED_STEPS", 8), ("LONG_STEPS", 8), ("SEQUENCES", 1), ("MIXTURES", 2)):
        monkeypatch.setattr(profile_quality, name, value)
    out = tmp_path / "cpu.json"
    options = profile.Options(
        task="vision", size="tiny", device="cpu", out=out, method=method, batch_sizes=(4,),
        expert_counts=(2,), routing_biases=(0.0,), cost_biases=(0.0,), shifts=("clean", "dark"),
        window_s=0.01, within_s=0.1, samples=20,
    )  # fmt: skip
    profile.main(options)
    measured = load_profile(out)
    assert measured.adapt_rate == rate and measured.adapted_by == (method, "norms")
    assert measured.adaptation_error is not None and measured.adaptation_error["points"] == 18
