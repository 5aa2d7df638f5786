"""Placement as data: its rules, an even one against all possible ones, and the cost that heat makes of it."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import model_config
from moe.model.router import route
from moe.model.usage import tokens_per_expert
from moe.placement import Placement, PlacementError

N_EXPERTS = 8
LOGITS = st.builds(
    lambda seed, scale: scale * torch.randn(40, N_EXPERTS, generator=torch.Generator().manual_seed(seed)),
    st.integers(0, 9999),
    st.sampled_from([0.01, 1.0, 30.0]),
)
TOP_K = st.integers(1, N_EXPERTS)
BIAS = st.floats(0, 1, width=32)
SIGNAL = st.floats(0, 1)


@st.composite
def placements(draw: st.DrawFn, n_experts: int = N_EXPERTS) -> Placement:
    n_devices = draw(st.integers(1, 4))
    devices = st.lists(st.integers(0, n_devices - 1), min_size=n_experts, max_size=n_experts)
    return Placement(tuple(draw(devices)), n_devices)


@given(placements())
def test_every_expert_is_on_one_device(placement: Placement) -> None:
    held = [placement.experts_on(device) for device in range(placement.n_devices)]
    assert sorted(itertools.chain(*held)) == list(range(N_EXPERTS))
    assert Placement.of_devices(held, N_EXPERTS) == placement
    assert Placement.from_dict(placement.to_dict()) == placement
    placement.check(N_EXPERTS)
    with pytest.raises(PlacementError, match=r"has 9 experts and device_of_expert places 8; give one device"):
        placement.check(9)


@given(placements(), st.lists(st.integers(0, 99), min_size=N_EXPERTS, max_size=N_EXPERTS))
def test_sums_over_devices_are_those_over_experts(placement: Placement, amounts: list[int]) -> None:
    per_device = placement.per_device(np.array([amounts, amounts[::-1]]))  # [2, D]
    for row, given_amounts in zip(per_device, (amounts, amounts[::-1]), strict=True):
        by_hand = [0] * placement.n_devices
        for amount, device in zip(given_amounts, placement.device_of_expert, strict=True):
            by_hand[device] += amount
        assert row.tolist() == by_hand


@pytest.mark.parametrize(
    ("devices", "n_devices", "message"),
    [
        ((0, 1, 2), 2, r"names devices \[2\], present are 0\.\.1; move their experts"),
        ((0, -1), 2, r"names devices \[-1\]"),
        ((0, None, 1, None), 2, r"leaves out experts \[1, 3\].*give each the number of a device, 0\.\.1"),
        ((0, "1"), 2, r"leaves out experts \[1\]"),
        ((), 2, "places no expert"),
        ((0,), 0, "n_devices must be at least 1, got 0"),
    ],
)
def test_impossible_placements_are_refused(devices, n_devices, message) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(devices, n_devices)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([[0, 1], [1, 2]], r"experts \[1\] are named more than once"),
        ([[0], [2]], r"left out are \[1\], unknown are \[\]; correct"),
        ([[0, 1], [2, 3]], r"left out are \[\], unknown are \[3\]"),
    ],
)
def test_lists_that_place_no_model_are_refused(held, message) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement.of_devices(held, 3)


def test_unknown_devices_and_fields_are_refused() -> None:
    placement = Placement((0, 1), 2)
    for device in (-1, 2):
        with pytest.raises(PlacementError, match=f"device {device} is absent, present are 0..1"):
            placement.experts_on(device)
    with pytest.raises(PlacementError, match="exactly the fields"):
        Placement.from_dict({"device_of_expert": [0, 1]})
    with pytest.raises(PlacementError, match="n_devices must be at least 1"):
        Placement.even([8, 8], 0)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0, 8, 16, 24, 40]), min_size=1, max_size=6), st.integers(1, 3))
def test_an_even_placement_is_near_the_best_of_all(widths: list[int], n_devices: int) -> None:
    widths.sort(reverse=True)
    placement = Placement.even(widths, n_devices)
    fullest = placement.per_device(np.array(widths)).max()
    best = min(
        max(np.bincount(devices, widths, n_devices))
        for devices in itertools.product(range(n_devices), repeat=len(widths))
    )
    assert best <= fullest <= 4 / 3 * best
    assert Placement.even(widths, n_devices) == placement


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("n_devices", [1, 2, 4])
def test_shipped_models_are_placed_evenly(size: str, n_devices: int) -> None:
    widths = np.array(model_config("vision", size).expert_widths)
    units = Placement.even(widths.tolist(), n_devices).per_device(widths)
    assert units.tolist() == [widths.sum() / n_devices] * n_devices


def test_cost_by_hand() -> None:
    placement = Placement((0, 1, 0, 2), 3)
    cost = placement.thermal_cost([4.0, 2.0, 1.0, 3.0], [1.0, 0.5, 0.0])
    assert cost.dtype == torch.float32
    assert cost.tolist() == [1.0, 0.25, 0.25, 0.0]


@given(LOGITS, TOP_K, BIAS, placements(), SIGNAL, st.floats(1e-6, 1e6))
def test_equal_heat_and_energy_change_no_routing(logits, top_k, bias, placement, signal, energy) -> None:
    cost = placement.thermal_cost([energy] * N_EXPERTS, [signal] * placement.n_devices)
    plain, biased = route(logits, top_k), route(logits, top_k, bias, cost)
    assert torch.equal(plain.experts, biased.experts)
    assert torch.equal(plain.weights, biased.weights)


@settings(max_examples=200)
@given(
    LOGITS,
    TOP_K,
    BIAS,
    placements(),
    st.lists(SIGNAL, min_size=4, max_size=4),
    st.integers(0, 3),
    SIGNAL,
    st.lists(st.floats(0.1, 1.0), min_size=N_EXPERTS, max_size=N_EXPERTS),
)
def test_a_hotter_device_never_gets_more_tokens(
    logits, top_k, bias, placement, signals, device, other, energy
) -> None:
    """And a token whose choice stays is mixed as before: the bias selects, it does not weigh."""
    device %= placement.n_devices
    signals = signals[: placement.n_devices]
    cool, hot = sorted((signals[device], other))
    decisions = []
    for signal in (cool, hot):
        heat = [signal if d == device else s for d, s in enumerate(signals)]
        decisions.append(route(logits, top_k, bias, placement.thermal_cost(energy, heat)))
    on_device = list(placement.experts_on(device))
    before, after = (int(tokens_per_expert(routing)[on_device].sum()) for routing in decisions)
    assert after <= before
    cooler, hotter = decisions
    same = (cooler.experts == hotter.experts).all(dim=-1)  # [T]
    assert torch.equal(cooler.weights[same], hotter.weights[same])


@given(LOGITS, TOP_K, placements(), SIGNAL)
def test_heat_without_bias_changes_nothing(logits, top_k, placement, signal) -> None:
    heat = [signal, *[0.0] * (placement.n_devices - 1)]
    cost = placement.thermal_cost(range(1, N_EXPERTS + 1), heat)
    assert torch.equal(route(logits, top_k).experts, route(logits, top_k, 0.0, cost).experts)


@pytest.mark.parametrize(
    ("energy", "signal", "message"),
    [
        ([1.0], [0.0, 0.0], "needs 2 expert energies and 2 device signals"),
        ([1.0, 1.0], [0.0], "needs 2 expert energies and 2 device signals"),
        ([1.0, math.nan], [0.0, 0.0], "expert_energy must be finite.*measure it again"),
        ([1.0, -1.0], [0.0, 0.0], "expert_energy"),
        ([0.0, 0.0], [0.0, 0.0], "not all 0"),
        ([1.0, 1.0], [0.0, math.nan], r"device_signal must lie within 0\.\.1.*clip it"),
        ([1.0, 1.0], [0.0, 1.1], "device_signal"),
        ([1.0, 1.0], [-0.1, 0.0], "device_signal"),
    ],
)
def test_impossible_heat_and_energy_are_refused(energy, signal, message) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement((0, 1), 2).thermal_cost(energy, signal)
