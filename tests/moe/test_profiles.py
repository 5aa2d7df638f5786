"""Profile files come back as written, doubtful ones are refused; and the arithmetic behind them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import meter, profile, profile_quality
from moe.config import ModelConfig
from moe.model import MoEModel, initialise
from moe.profile_cost import Cell, Visit, adaptation_cell, costs, measure_cells
from moe.profile_quality import CURVE_STEPS, adapt_rate, carry_over, measure_quality
from moe.profiles import Profile, ProfileError, load_profile, save_profile
from moe.runner import ADAPT_BATCH, Runner


def made_up() -> Profile:
    rng = np.random.default_rng(0)
    share = rng.random((2, 2, 2, 4))
    return Profile(
        task="vision", size="tiny", device="a device made up for tests", provenance={"note": "not measured"},
        model_sha256="0" * 64, batch_size=np.array([1.0, 8.0, 64.0]), expert_count=np.array([1.0, 2.0]),
        routing_bias=np.array([0.0, 1.0]), shifts=("clean", "blur@5"), latency_s=rng.random((3, 2, 2)) + 0.01,
        energy_j=rng.random((3, 2, 2)) + 0.01, idle_power_w=70.0, ttt_latency_s=rng.random((3, 2)) + 0.01,
        ttt_energy_j=rng.random((3, 2)) + 0.01, accuracy=rng.random((2, 2, 2, 2)),
        confidence=rng.random((2, 2, 2, 2)), entropy=rng.random((2, 2, 2, 2)),
        adapt_rate=np.array([0.0, 0.1]), carry_over=-0.2,
        expert_share=share / share.sum(axis=-1, keepdims=True),
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "made-up.json"
    save_profile(made_up(), path)
    return path


def test_a_profile_comes_back_as_it_was_written(saved):
    written, again = made_up(), load_profile(saved)
    for field in fields(Profile):
        value, loaded = getattr(written, field.name), getattr(again, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(loaded, value, rtol=1e-5)
        else:
            assert loaded == value
    assert [path.name for path in saved.parent.iterdir()] == ["made-up.json"]


def test_interpolation_is_linear_in_the_logarithms(saved):
    loaded = load_profile(saved)
    row = loaded.latency_s[:, 1, 0]
    assert loaded.latency_at(8, 2) == pytest.approx(row[1])
    middle = np.sqrt(row[1] * row[2])  # halfway in log N is halfway in log s
    assert loaded.latency_at(np.sqrt(8 * 64), 2) == pytest.approx(middle)
    assert loaded.latency_at(8, 2, 0.5) == pytest.approx(loaded.latency_s[1, 1].mean())
    assert loaded.energy_j is not None
    expected = loaded.energy_j[2, 0, 0] / loaded.latency_s[2, 0, 0]
    assert loaded.active_power_w(64, 1) == pytest.approx(expected)
    with pytest.raises(ProfileError, match="expert_count=3"):
        loaded.latency_at(8, 3)


def edited(path: Path, **changes: Any) -> Path:
    raw = json.loads(path.read_text())
    for name, change in changes.items():
        raw[name] = change(raw[name])
    path.write_text(json.dumps(raw))
    return path


def cell_set(value: Any):
    def change(table: list) -> list:
        inner = table
        while isinstance(inner[0], list):
            inner = inner[0]
        inner[0] = value
        return table

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_s": lambda t: [t[0], t[1], [t[2][0]]]}, "latency_s is ragged"),
        ({"latency_s": lambda t: t[:2]}, r"latency_s has shape \(2, 2, 2\).*a cell is missing"),
        ({"energy_j": cell_set(-0.5)}, r"energy_j\[0, 0, 0\] is negative"),
        ({"energy_j": cell_set(None)}, r"energy_j\[0, 0, 0\] is negative or not a number"),
        ({"energy_j": cell_set(0.0)}, "energy_j holds a zero"),
        ({"accuracy": cell_set(1.2)}, "accuracy holds a value above 1"),
        ({"accuracy": lambda _: None}, "accuracy is absent"),
        ({"batch_size": lambda _: None}, "batch_size is absent"),
        ({"batch_size": lambda _: []}, "batch_size is absent, empty"),
        ({"batch_size": lambda _: [8, 1, 64]}, "batch_size must ascend"),
        ({"batch_size": lambda _: [0, 1, 64]}, "batch_size must start at 1"),
        ({"routing_bias": lambda _: [0.1, 1.0]}, "routing_bias must start at 0"),
        ({"shifts": lambda _: ["blur@5", "clean"]}, "shifts with"),
        ({"shifts": lambda _: None}, "shifts must list"),
        ({"idle_power_w": lambda _: None}, "measured together"),
        ({"idle_power_w": lambda _: float("nan")}, "idle_power_w must be above 0"),
        ({"ttt_energy_j": lambda _: None}, "ttt_energy_j is measured where"),
        ({"carry_over": lambda _: float("nan")}, "carry_over"),
        ({"carry_over": lambda _: 1.5}, "carry_over"),
        ({"expert_share": lambda t: (np.array(t) / 2).tolist()}, "expert_share does not sum to 1"),
    ],
)
def test_doubtful_profiles_are_refused(saved, changes, message):
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(edited(saved, **changes))
    assert str(saved) in str(caught.value)


@given(st.floats(0.0, 0.999))
def test_a_cut_file_is_refused(share):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up.json"
        save_profile(made_up(), path)
        whole = path.read_text()
        path.write_text(whole[: int(share * len(whole))])
        with pytest.raises(ProfileError, match="not a JSON document"):
            load_profile(path)


def test_unknown_and_missing_fields_and_files_are_refused(saved, tmp_path):
    raw = json.loads(saved.read_text())
    saved.write_text(json.dumps({**raw, "colour": "blue"}))
    with pytest.raises(ProfileError, match="colour"):
        load_profile(saved)
    del raw["energy_j"]
    saved.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match="energy_j"):
        load_profile(saved)
    with pytest.raises(ProfileError, match=r"moe\.profile"):
        load_profile(tmp_path / "none.json")


def test_a_doubtful_profile_is_not_written_and_the_old_one_stays(saved):
    before = saved.read_text()
    with pytest.raises(ProfileError):
        save_profile(replace(made_up(), carry_over=float("inf")), saved)
    with pytest.raises(TypeError):
        save_profile(replace(made_up(), provenance={"bad": object()}), saved)
    assert saved.read_text() == before and len(list(saved.parent.iterdir())) == 1


@given(st.floats(0.01, 0.9), st.floats(0.05, 0.4), st.floats(0.2, 0.5))
def test_the_fit_finds_the_rate_behind_a_curve(rate, gain, start):
    curve = start + gain * (1.0 - (1.0 - rate) ** np.array(CURVE_STEPS))
    if curve[-1] - start >= 0.02:
        assert adapt_rate(curve) == pytest.approx(rate, rel=0.02)


def test_no_rate_is_made_of_noise():
    assert adapt_rate(np.array([0.8, *np.full(len(CURVE_STEPS) - 1, 0.805)])) == 0.0
    assert adapt_rate(np.linspace(0.8, 0.5, len(CURVE_STEPS))) == 0.0


def test_carry_over_by_hand():
    unadapted = np.array([0.9, 0.5, 0.4])
    # Shift 0 gains nothing and is a source only; 1 gains 0.2 of its own and 0.1, 0.0 from the others.
    adapted = np.array([[0.9, 0.6, 0.4], [0.8, 0.7, 0.5], [0.7, 0.5, 0.8]])
    assert carry_over(unadapted, adapted) == pytest.approx((0.1 + 0.0 + 0.0 + 0.1) / (2 * (0.2 + 0.4)))
    assert carry_over(unadapted, np.tile(unadapted, (3, 1))) == 0.0


def test_costs_are_above_idle_and_spread_is_relative():
    visits = [Visit(0.010, 100.0, 500.0), Visit(0.012, 80.0, 480.0)]
    result = costs(visits, 100.0)
    assert result.latency_s == pytest.approx(0.011)
    assert result.energy_j == pytest.approx((400 / 100 + 380 / 80) / 2)
    assert result.spread == pytest.approx(0.002 / 0.011)
    assert np.isnan(costs([visits[0]._replace(power_w=float("nan"))], 0.0).energy_j)


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


def test_quality_tables_agree_with_the_bare_model(runner, monkeypatch):
    monkeypatch.setattr(profile_quality, "CURVE_STEPS", (0, 1, 2, 4))
    monkeypatch.setattr(profile_quality, "ADAPT_BATCH", 32)
    quality = measure_quality(runner, [1, 2], [0.0, 1.0], samples=300, seed=3)
    samples, model = runner.samples, runner.model
    for shift in range(2):
        output = model(samples.inputs[shift], 2, 1.0)
        right = (output.predictions == samples.targets[shift]).float().mean().item()
        assert quality.accuracy[shift, 1, 1, 0] == pytest.approx(right, abs=2 / 300)
        assert quality.confidence[shift, 1, 1, 0] == pytest.approx(output.confidence.mean().item(), rel=1e-4)
        assert quality.entropy[shift, 1, 1, 0] == pytest.approx(output.entropy.mean().item(), rel=1e-4)
        if shift == 0:
            share = output.tokens_per_expert / output.tokens_per_expert.sum(dim=-1, keepdim=True)
            np.testing.assert_allclose(quality.expert_share[1, 1], share.numpy(), atol=1e-3)
    assert np.all(quality.entropy[..., 1] != quality.entropy[..., 0])
    assert quality.curve[:, 0] == pytest.approx(quality.accuracy[:, 1, 0, 0])
    assert quality.curve[:, -1] == pytest.approx(quality.accuracy[:, 1, 0, 1])


def test_every_cell_is_visited_in_random_order_and_the_model_stays_as_it_was(runner):
    state = {name: value.clone() for name, value in runner.model.state_dict().items()}
    cells = [Cell(2, 1, 0.0, False), Cell(8, 2, 1.0, False), adaptation_cell(1, 2), adaptation_cell(10**6, 2)]
    assert [cell.batch_size for cell in cells[2:]] == [2, ADAPT_BATCH]
    visits = measure_cells(runner, cells, None, 0.04, 2, np.random.default_rng(0))
    assert {cell: len(seen) for cell, seen in visits.items()} == dict.fromkeys(cells, 2)
    assert all(visit.latency_s > 0 and visit.units_per_s > 0 for seen in visits.values() for visit in seen)
    assert all(torch.equal(value, state[name]) for name, value in runner.model.state_dict().items())


def test_the_command_writes_a_profile_that_loads(runner, monkeypatch, tmp_path, capsys):
    weights, out = tmp_path / "model.safetensors", tmp_path / "cpu.json"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(profile, "load_model", lambda task, size, device: runner.model)
    monkeypatch.setattr(profile, "weights_path", lambda task, size: weights)
    monkeypatch.setattr(profile, "SamplePool", lambda task, shifts, device: runner.samples)
    monkeypatch.setattr(profile_quality, "CURVE_STEPS", (0, 1))
    options = profile.Options(
        task="vision", size="tiny", device="cpu", out=out, batch_sizes=(4, 1), shifts=("clean", "dark"),
        expert_counts=(2,), seconds_per_cell=0.02, samples=100,
    )  # fmt: skip
    profile.main(options)
    measured = load_profile(out)
    assert (
        measured.latency_s.shape == (2, 1, 3) and measured.energy_j is None and measured.idle_power_w is None
    )
    assert measured.ttt_latency_s is not None and measured.ttt_energy_j is None
    assert measured.batch_size.tolist() == [1, 4] and measured.shifts == ("clean", "dark")
    assert measured.model_sha256 == hashlib.sha256(b"weights").hexdigest()
    assert measured.provenance["spread"]["max"] >= measured.provenance["spread"]["median"] >= 0.0
    assert str(out) in capsys.readouterr().out


class Nvml:
    """A card that draws `power_w` and whose counter ticks every 100 ms; reads and waits take time."""

    def __init__(self, power_w: float) -> None:
        self.power_w, self.time_s = power_w, 50.0

    def perf_counter(self) -> float:
        return self.time_s

    def read_mj(self, handle) -> int:
        self.time_s += 3e-3
        return round(self.power_w * 1e3 * 0.1 * int(self.time_s / 0.1 + 1e-9))

    def wait(self) -> None:
        self.time_s += 1e-3


def test_a_window_runs_from_tick_to_tick(monkeypatch):
    card = Nvml(300.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=card.perf_counter))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", card.read_mj)
    counter: Any = meter.EnergyCounter.__new__(meter.EnergyCounter)
    counter._handle = None
    start, end = counter.window(card.wait, 0.5)
    assert end.energy_j - start.energy_j == pytest.approx(300.0 * 0.5)
    assert end.time_s - start.time_s == pytest.approx(0.5, abs=5e-3)
    card.power_w = 0.0  # a counter that stands still
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 7)
    with pytest.raises(meter.MeterUnavailableError, match="stood still"):
        counter.next_tick(card.wait)


def test_a_cpu_has_no_meter_and_cuda_without_nvml_is_an_error(monkeypatch):
    assert meter.open_meter(torch.device("cpu")) is None

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    with pytest.raises(meter.MeterUnavailableError, match="libnvidia-ml"):
        meter.open_meter(torch.device("cuda"))
