"""Shared problems: the default scenario on a small hand-made profile, so tests need no measured file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.profiles import Profile, save_profile
from thermoe_env.problem import Problem
from thermoe_env.scenario import load_scenario

SHIFTS = ("clean", "gaussian_noise@5", "contrast@5", "blur@5")


def make_profile() -> Profile:
    """A plausible device: latency with a floor, energy linear in work, adaptation that helps."""
    batch, experts, bias = np.array([32.0, 256, 2048, 8192]), np.array([1.0, 2, 4, 8]), np.array([0.0, 1.0])
    work = batch[:, None, None] * (1.0 + experts[None, :, None]) * (1.0 - 0.2 * bias[None, None, :])
    latency = 0.004 + work * 3.5e-6
    quality = np.array([0.9, 0.6, 0.55, 0.5])[:, None, None] - 0.02 / experts[None, :, None] - 0.005 * bias
    adapted = quality + np.array([0.0, 0.2, 0.25, 0.15])[:, None, None]
    accuracy = np.stack([quality, adapted], axis=-1)  # [S, K, R, 2]
    return Profile(
        task="vision",
        size="base",
        device="a device made up for tests",
        provenance={"note": "not measured"},
        model_sha256="0" * 64,
        batch_size=batch,
        expert_count=experts,
        routing_bias=bias,
        shifts=SHIFTS,
        latency_s=latency,
        energy_j=latency * 350.0 + work * 4e-4,
        idle_power_w=122.0,
        ttt_latency_s=np.full((4, 4), 0.015),
        ttt_energy_j=np.full((4, 4), 5.0),
        accuracy=accuracy,
        confidence=np.clip(accuracy + 0.03, 0.0, 1.0),
        entropy=np.clip(0.5 * (1.0 - accuracy), 0.0, 1.0),
        adapt_rate=np.full(4, 0.05),
        carry_over=0.1,
        expert_share=np.full((4, 2, 2, 8), 0.125),
    )


@pytest.fixture(scope="session")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up profile as a file."""
    path = tmp_path_factory.mktemp("profiles") / "made-up.json"
    save_profile(make_profile(), path)
    return path


@pytest.fixture(scope="session")
def problem(profile_path: Path) -> Problem:
    """The default scenario on the made-up profile."""
    return Problem.of(load_scenario("default", profile=str(profile_path)))
