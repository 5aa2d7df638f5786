"""The forecast of tokens under heat: against the profile it is made from, and against the model itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data import datasets as data
from moe.placement import Placement, PlacementError
from moe.profiles import Profile, ProfileError, load_profile
from moe.profiling.heat import forecast_expert_share
from moe.training.weights import load_model

NAMES = ("cpu-vision", "h100-vision", "h100-language")
FOLDER = Path(__file__).parents[3] / "configs" / "profiles"
PROFILES = {name: load_profile(FOLDER / f"{name}.json") for name in NAMES}
SIGNAL = st.floats(0, 1)


def even(profile: Profile, n_devices: int) -> Placement:
    return Placement.even(profile.model["config"]["expert_widths"], n_devices)


def device_share(profile: Profile, placement: Placement, signal: list[float]) -> np.ndarray:
    return placement.per_device(forecast_expert_share(profile, placement, signal))  # [K, R, L, D]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_devices", [1, 2, 4])
def test_ends_are_what_was_measured(name: str, n_devices: int) -> None:
    """Without heat the unbiased shares; at signals of 1 the tokens of each width under each bias."""
    profile = PROFILES[name]
    cool, hot = (
        forecast_expert_share(profile, even(profile, n_devices), [s] * n_devices) for s in (0.0, 1.0)
    )
    np.testing.assert_allclose(cool, np.broadcast_to(profile.expert_share[:, :1], cool.shape), atol=1e-5)
    half = profile.expert_share.shape[-1] // 2  # the wide ones
    for part in (slice(None, half), slice(half, None)):
        measured = profile.expert_share[..., part].sum(axis=-1)
        np.testing.assert_allclose(hot[..., part].sum(axis=-1), measured, atol=1e-4)


@settings(max_examples=30)
@given(
    st.sampled_from(NAMES), st.sampled_from([1, 2, 4]), st.lists(SIGNAL, min_size=4, max_size=4),
    st.integers(0, 3), SIGNAL,
)  # fmt: skip
def test_all_tokens_stay_and_a_hotter_device_never_gets_more(name, n_devices, signals, device, other) -> None:
    profile, device = PROFILES[name], device % n_devices
    placement = even(profile, n_devices)
    cool, hot = sorted((signals[device], other))
    shares = []
    for value in (cool, hot):
        signal = [value if d == device else s for d, s in enumerate(signals[:n_devices])]
        shares.append(device_share(profile, placement, signal))
        np.testing.assert_allclose(shares[-1].sum(axis=-1), 1.0, rtol=1e-9)
        assert np.all(shares[-1] >= 0.0)
    assert np.all(shares[1][..., device] <= shares[0][..., device] + 1e-9)


@pytest.mark.parametrize("n_devices", [2, 4])
def test_a_hot_device_s_share_falls_with_the_bias(n_devices: int) -> None:
    profile = PROFILES["h100-vision"]
    signal = [0.0] * (n_devices - 1) + [1.0]
    hot = device_share(profile, even(profile, n_devices), signal)[..., -1]  # [K, R, L]
    assert np.all(np.diff(hot, axis=1) < 0.0)


def test_experts_that_are_all_chosen_cannot_be_avoided() -> None:
    profile = PROFILES["cpu-vision"]
    assert profile.expert_count[-1] == profile.expert_share.shape[-1]
    share = device_share(profile, even(profile, 2), [0.0, 1.0])[-1]
    np.testing.assert_allclose(share, 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("devices", "signal"),
    [
        ((0, 1) * 4, (0.0, 1.0)),
        ((0, 1) * 4, (0.5, 1.0)),
        ((0,) * 4 + (1,) * 4, (1.0, 0.0)),
        ((0, 1, 2, 3) * 2, (0.0, 0.3, 0.6, 1.0)),
    ],
)
def test_forecast_against_the_model(devices, signal) -> None:
    """Routed with the very costs, the shipped model sends each device what was forecast, nearly."""
    profile, placement = PROFILES["cpu-vision"], Placement(devices, max(devices) + 1)
    model, (images, _) = load_model("vision", "tiny", "cpu"), data.load_vision("test")
    cost = placement.thermal_cost(model.config.expert_widths, signal)
    forecast = device_share(profile, placement, list(signal))
    cool = device_share(profile, placement, [0.0] * placement.n_devices)
    found = np.empty_like(forecast)
    for k, r in np.ndindex(found.shape[:2]):
        top_k, bias = int(profile.expert_count[k]), float(profile.routing_bias[r])
        with torch.no_grad():
            counts = model(images[:300], top_k, bias, cost).tokens_per_expert.numpy()  # [L, E]
        found[k, r] = placement.per_device(counts) / counts.sum(axis=-1, keepdims=True)
    error, without = (np.sqrt(np.mean((share - found) ** 2)) for share in (forecast, cool))
    assert error < 0.04
    assert error < 0.3 * without  # a forecast that heat moves nothing


def test_what_cannot_be_forecast_is_refused() -> None:
    profile = PROFILES["cpu-vision"]
    with pytest.raises(PlacementError, match="8 experts and device_of_expert places 2"):
        forecast_expert_share(profile, Placement((0, 1), 2), [0.0, 1.0])
    with pytest.raises(PlacementError, match="device_signal must lie within"):
        forecast_expert_share(profile, even(profile, 2), [0.0, 2.0])
    config = profile.model["config"] | {"expert_widths": [64] * 8}
    alike = replace(profile, model=profile.model | {"config": config})
    with pytest.raises(ProfileError, match=r"all experts .* have width 64"):
        forecast_expert_share(alike, even(profile, 2), [0.0, 1.0])
