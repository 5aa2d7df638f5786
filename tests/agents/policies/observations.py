"""Observations made of physical values."""

from __future__ import annotations

import numpy as np

from thermoe_env.mdp.fields import FIELDS, RAW_DTYPE, encode_row, ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

RANGES = ranges_of(Problem.of(load_scenario("vision")))


def observation(**values: float) -> np.ndarray:
    """An observation in `RANGES`, float32 [1, fields]: calm unless `values` say otherwise, else zero."""
    calm = {
        "margin_c": 30.0,
        "power_w": 150.0,
        "budget_w": 700.0,
        "budget_ahead_w": 700.0,
        "sm_clock_share": 1.0,
    }
    raw = np.zeros(1, RAW_DTYPE)
    for name, value in (calm | values).items():
        raw[name] = value
    encoded = np.zeros((1, len(FIELDS)), np.float32)
    encode_row(raw.view(np.float64), RANGES.low, RANGES.scale, encoded[0])
    return encoded
