"""A profile made up for the tests of the model and its service."""

from __future__ import annotations

import numpy as np

from moe.profiles import HELD_OUT, Profile

IDENTITY = {"key": "0" * 12, "config": {"top_k": 2}, "data_sha256": "0" * 64, "weights_sha256": "0" * 64}
CELL: dict[str, float | None] = {name: 0.1 for name in HELD_OUT}


def made_up() -> Profile:
    """A profile of random numbers: 3 batch sizes, 2 expert counts, 2 biases, 2 shifts."""
    rng = np.random.default_rng(0)
    cost, steps, quality = (3, 2, 2), (3, 2), (2, 3, 2, 2)
    share = rng.random((2, 2, 2, 4))
    return Profile(
        task="vision", size="tiny", device="a device made up for tests", provenance={"note": "not measured"},
        model=IDENTITY, batch_size=np.array([1.0, 8.0, 64.0]), expert_count=np.array([1.0, 2.0]),
        routing_bias=np.array([0.0, 1.0]), cost_bias=np.array([0.0, 1.0]), shifts=("clean", "blur@5"),
        latency_s=rng.random(cost) + 0.01, latency_spread=rng.random(cost), energy_j=rng.random(cost) + 0.01,
        energy_spread=rng.random(cost), visits=np.full(cost, 2.0), start_temperature_c=np.full(cost, 50.0),
        idle_power_w=70.0, ttt_latency_s=rng.random(steps) + 0.01, ttt_latency_spread=rng.random(steps),
        ttt_energy_j=rng.random(steps) + 0.01, ttt_energy_spread=rng.random(steps), held_out=[dict(CELL)],
        samples=500, accuracy=rng.random(quality), confidence=rng.random(quality),
        entropy=rng.random(quality), mixture=rng.random((2, 3, 5, 3)), adapt_rate=0.2,
        adaptation_error={"points": 12.0, "accuracy_rmse": 0.01},
        expert_share=share / share.sum(axis=-1, keepdims=True), expert_cost=np.array([1.0, 1.0, 0.5, 0.5]),
        expert_latency_s=np.full(4, 1e-8), expert_energy_j=np.full(4, 1e-6),
    )  # fmt: skip
