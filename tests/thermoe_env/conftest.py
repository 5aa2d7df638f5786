"""Shared problems: the default scenario on a small hand-made profile, so tests need no measured file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from moe.profiles import Profile, save_profile
from tests.thermoe_env.recorded import RECORDED, SHIPPED
from thermoe_env.calibration.traces import Trace, load_trace
from thermoe_env.device.parameters import TwinParams, load_twin
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario

WIDTHS = [160] * 4 + [96] * 4
SHIFTS = ("clean", "gaussian_noise@5", "contrast@5", "blur@5")


def make_profile() -> Profile:
    """A plausible device: latency with a floor, energy linear in work, adaptation that helps."""
    batch, experts, bias = np.array([32.0, 256, 2048, 8192]), np.array([1.0, 2, 4, 8]), np.array([0.0, 1.0])
    work = batch[:, None, None] * (1.0 + experts[None, :, None]) * (1.0 - 0.2 * bias[None, None, :])
    latency = 0.004 + work * 3.5e-6
    quality = np.array([0.9, 0.6, 0.55, 0.5])[:, None, None] - 0.02 / experts[None, :, None] - 0.005 * bias
    gain = np.diag([0.0, 0.2, 0.25, 0.15]) + 0.02  # [S, S], what adaptation to one shift gains under another
    adapted = quality[:, None] + gain[:, :, None, None]  # [S, S, K, R]
    accuracy = np.concatenate([quality[:, None], adapted], axis=1)  # [S, Q, K, R]
    confidence, entropy = np.clip(accuracy + 0.03, 0.0, 1.0), np.clip(0.5 * (1.0 - accuracy), 0.0, 1.0)
    own = np.stack([accuracy, confidence, entropy], axis=-1)[:, :, 2, 0]  # [S, Q, 3]
    first, second = np.triu_indices(5, 1)
    energy = latency * 350.0 + work * 4e-4
    wide = 0.125 + 0.02 / experts[:, None] - 0.05 * bias[None, :]  # [K, R] share of each of the wide experts
    return Profile(
        task="vision",
        size="base",
        device="a device made up for tests",
        provenance={"note": "not measured"},
        model={
            "key": "0" * 12,
            "config": {"top_k": 4, "expert_widths": WIDTHS},
            "data_sha256": "0" * 64,
            "weights_sha256": "0" * 64,
        },
        batch_size=batch,
        expert_count=experts,
        routing_bias=bias,
        cost_bias=bias,
        shifts=SHIFTS,
        latency_s=latency,
        latency_spread=np.full(latency.shape, 0.02),
        energy_j=energy,
        energy_spread=np.full(latency.shape, 0.03),
        visits=np.full(latency.shape, 2.0),
        start_temperature_c=np.full(latency.shape, 50.0),
        idle_power_w=122.0,
        ttt_latency_s=np.full((4, 4), 0.015),
        ttt_latency_spread=np.full((4, 4), 0.02),
        ttt_energy_j=np.full((4, 4), 5.0),
        ttt_energy_spread=np.full((4, 4), 0.03),
        held_out=[],
        samples=4000,
        accuracy=accuracy,
        confidence=confidence,
        entropy=entropy,
        mixture=np.repeat(0.5 * (own[:, first] + own[:, second])[:, :, None], 3, axis=2),
        adapt_rate=0.05,
        adaptation_error={"points": 0.0},
        expert_share=np.repeat(np.stack([wide, 0.25 - wide], -1)[:, :, None].repeat(2, axis=2), 4, axis=3),
        expert_cost=np.array(WIDTHS) / max(WIDTHS),
        expert_latency_s=np.array(WIDTHS) * 1e-10,
        expert_energy_j=np.array(WIDTHS) * 5e-8,
    )


@pytest.fixture(scope="session")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up profile as a file."""
    path = tmp_path_factory.mktemp("profiles") / "made-up.json"
    save_profile(make_profile(), path)
    return path


@pytest.fixture(scope="session")
def problem(profile_path: Path) -> Problem:
    """The scenario vision on the made-up profile, without what acts."""
    return Problem.of(load_scenario("vision", profile=str(profile_path), power_budget={"brake": None}))


@pytest.fixture(scope="session")
def calm(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """The default scenario on a device whose idle power knows no temperature, in still air."""
    twin = yaml.safe_load(SHIPPED.read_text()) | {"leakage_per_c": 0.0, "inlet_drift_c": 0.0}
    twin |= {"r_fan_c_per_w": 0.0, "power_cap_w": 2000.0, "cap_onset_w": 2000.0}
    alike = {"resistance": 0.0, "time_constant": 0.0, "leakage": 0.0, "energy": 0.0, "inlet_c": 0.0}
    path = tmp_path_factory.mktemp("twin") / "calm.yaml"
    path.write_text(yaml.safe_dump(twin))
    return load_scenario(problem.scenario, twin=str(path), randomize=alike)


@pytest.fixture(scope="session")
def shipped() -> TwinParams:
    return load_twin(SHIPPED)


@pytest.fixture(scope="session")
def cut_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 400 s of the recorded trace."""
    head, *rows = RECORDED.read_text().splitlines()
    path = tmp_path_factory.mktemp("traces") / "cut_telemetry.csv"
    path.write_text("\n".join([head, *(row for row in rows if float(row.split(",", 1)[0]) < 400.0)]) + "\n")
    return path


@pytest.fixture(scope="session")
def cut(cut_path: Path) -> Trace:
    return load_trace(cut_path)
