"""What the calibration tests share: the recorded trace, the shipped twin, and traces of made-up devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.integrate import solve_ivp

from thermoe_env.calibration.driver_info import load_driver_info
from thermoe_env.calibration.traces import COLUMNS, SENSOR_LAG_S
from thermoe_env.device.parameters import TwinParams

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "configs/traces/h100_steps_telemetry.csv"
SHIPPED = ROOT / "configs/twin/h100.yaml"
INFO = load_driver_info(ROOT / "configs/traces/h100_steps_nvml_info.json")


def write_trace(path: Path, columns: dict[str, np.ndarray]) -> Path:
    rows = zip(*(columns[name] for name in COLUMNS), strict=True)
    path.write_text(
        "\n".join([",".join(COLUMNS), *(",".join(f"{v:.10g}" for v in row) for row in rows)]) + "\n"
    )
    return path


def simulate(twin: TwinParams, seconds: int, seed: int) -> dict[str, np.ndarray]:
    """A trace of a known device at 20 Hz, through `solve_ivp`, whole-degree sensors and a ticking counter."""
    rng = np.random.default_rng(seed)
    t = np.arange(0.0, seconds, 0.05)
    phases = rng.integers(0, 4, size=seconds // 20 + 1)
    phases[:4] = (0, 3, 3, 0)
    work = np.array([0.0, 150.0, 300.0, 500.0])[np.minimum(phases[(t // 20).astype(int)], 3)]
    asleep = t < 8.0  # no context yet: the lowest clock

    def rates(now: float, x: np.ndarray, power: float) -> list[float]:
        return [
            (twin.r_spreader_c_per_w * power - x[0]) / twin.tau_spreader_s,
            (twin.r_sink_c_per_w * power - x[1]) / twin.tau_sink_s,
            (twin.r_fan_c_per_w * power - x[2]) / twin.tau_fan_s,
            (twin.r_mem_c_per_w * power - x[3]) / twin.tau_mem_s,
        ]

    def power_at(die_c: float, dynamic_w: float) -> float:
        return twin.idle_power_w * (1.0 + twin.leakage_per_c * (die_c - twin.idle_reference_c)) + dynamic_w

    power, die, memory = np.empty_like(t), np.empty_like(t), np.empty_like(t)
    x, last = np.array([1.0, 4.0, -1.5, 3.0]), 40.0
    for begin in range(0, len(t), 5):  # power is constant within 0.25 s
        p = twin.low_clock_power_w if asleep[begin] else power_at(last, work[begin])
        end = min(begin + 5, len(t))
        span = (0.0, 0.05 * (end - begin))
        solved = solve_ivp(rates, span, x, args=(p,), t_eval=0.05 * np.arange(end - begin), rtol=1e-8)
        power[begin:end] = p
        shared = twin.inlet_c + solved.y[1] + solved.y[2]
        die[begin:end] = shared + twin.r_die_c_per_w * p + solved.y[0]
        memory[begin:end] = shared + twin.mem_offset_c + twin.r_stack_c_per_w * p + solved.y[3]
        x = solve_ivp(rates, span, x, args=(p,), rtol=1e-8).y[:, -1]
        last = die[end - 1]
    late = np.maximum(0, np.arange(len(t)) - round(SENSOR_LAG_S / 0.05))
    energy_mj = 1e3 * np.append(0.0, np.cumsum(power[:-1] * 0.05))
    return {
        "t": t,
        "temp_c": np.floor(die[late] + 0.5),
        "mem_temp_c": np.floor(memory[late] + 0.5),
        "power_w": power,
        "power_inst_w": power,
        "energy_mj": energy_mj[np.arange(len(t)) // 2 * 2],
        "sm_mhz": np.where(asleep, twin.low_clock_mhz, twin.max_clock_mhz),
        "mem_mhz": np.full(len(t), 2619.0),
        "util": np.where(work > 0.0, 100.0, 0.0),
        "reasons": np.where(work >= 500.0, 4.0, 0.0),
    }
