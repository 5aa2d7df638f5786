"""`ThermalMoEEnv`: the control problem as a Gymnasium environment, in either world."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gymnasium as gym
import numpy as np

from moe.workload import STAT_NAMES, WorkStats
from thermoe_env.errors import ReadingError
from thermoe_env.fields import FIELDS, RAW_DTYPE, encode_row, fields_table, observation_space
from thermoe_env.interval import COST_NAMES, TRACK_DTYPE, begin, knob_level, prices_of, rules_of, settle
from thermoe_env.profiled import WORK_DTYPE
from thermoe_env.reward import REWARD_TERMS
from thermoe_env.scenario import Scenario, load_scenario
from thermoe_env.seeding import episode_seed
from thermoe_env.signals import STAGES, draw_power_budget
from thermoe_env.telemetry import READING_NAMES, GpuReading
from thermoe_env.twin import GPU_DTYPE
from thermoe_env.worlds import build_world


class ThermalMoEEnv(gym.Env[np.ndarray, Any]):
    """Steer a Mixture-of-Experts service under power and thermal limits.

    ## Description
    A MoE model answers two classes of requests (interactive, deferrable) in dynamic batches and can
    adapt itself to shifted inputs. Every control interval the agent sets the knobs; the device heats up,
    the queue moves, energy is spent. Temperature limits are virtual: they lie below the hardware's.

    ## Action Space
    One level per controlled knob of the scenario: `MultiDiscrete` (default), `Discrete` (flattened) or
    `Box` in [-1, 1]. Knobs: `routing_bias`, `batch_size`, `expert_count`, `ttt_steps`, `pace`, `sm_clock`.

    ## Observation Space
    A flat float32 `Box` in [-1, 1], scaled from these fields:

    {fields}

    ## Rewards
    goodput - energy - lateness - power over budget - heat - missing quality, in units of the standard
    service at full load; the terms are in `info["reward_terms"]`, constraint costs in `info["cost"]`.

    ## Starting State
    A device settled at idle, an empty queue, an unadapted model.

    ## Episode End
    Truncated after the scenario's length. Terminated when the device shuts itself down
    (`info["reason"]`). A GPU that stops answering raises `GpuLostError`.

    ## Arguments
    `scenario`: name, YAML path or `Scenario`. `world`: `auto`, `twin`, `live`. `action_mode`:
    `multi_discrete`, `discrete`, `box`. `overrides`: scenario keys to replace.

    ## Version History
    v0: first version.
    """

    metadata = {"render_modes": [], "render_fps": 1}  # noqa: RUF012  (Gymnasium's own form)

    def __init__(
        self,
        scenario: str | Scenario = "default",
        world: str = "auto",
        action_mode: str = "multi_discrete",
        overrides: dict[str, Any] | None = None,
        render_mode: None = None,
    ) -> None:
        if render_mode is not None:
            raise ValueError(f"render_mode must be None, got {render_mode!r}; figures come from evaluate.py")
        self.scenario = load_scenario(scenario, **(overrides or {}))
        self._world = build_world(self.scenario, world)
        self.world = self._world.name
        """Which world this is: `twin`, `live` or `live-cpu`."""
        self.problem = self._world.problem
        self.render_mode = None
        self.action_mode = action_mode
        self.action_space = self.problem.knobs.action_space(action_mode)
        self.observation_space = observation_space()
        self._rules, self._prices = rules_of(self.problem), prices_of(self.problem)
        self._seed: int | None = None
        self._episode = 0
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode. With `seed`, episode 0 of that seed; without, the next one."""
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode = seed, 0
        elif self._seed is None:
            self._seed, self._episode = int(self.np_random.integers(2**31)), 0
        else:
            self._episode += 1
        episode = episode_seed(self._seed, self._episode)
        scenario = self.problem.scenario
        self._world.workload.reset(episode)
        reading = self._world.telemetry.reset(episode)
        self._budget = draw_power_budget(scenario.power_budget, episode, scenario.steps, scenario.interval_s)
        self._track = np.zeros(1, TRACK_DTYPE)
        raw = np.zeros(1, RAW_DTYPE)
        level = knob_level(self.problem, np.array(self.problem.knobs.default_index))
        begin(self._rules, self._track[0], _gpu_row(reading), self._budget, level, raw[0])
        self._running = True
        return self._encode(raw), {"world": self.world, "reading": asdict(reading)}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Play one control interval.

        Raises:
            ValueError: an action outside the space.
            ResetNeeded: before the first reset, or after the end of an episode.
            GpuLostError, ReadingError: the live device failed; the episode is over.
        """
        if not self._running:
            raise gym.error.ResetNeeded("call reset() before step(): no episode is running")
        index = self.problem.knobs.indices(np.asarray(action)[None], self.action_mode)[0]
        knobs = self.problem.knobs.knobs(index)
        scenario, track = self.problem.scenario, self._track[0]
        self._running = False  # an interval that fails ends the episode
        serve_deferrable = bool(track["stage"] < self._rules.deferrable_below)
        work = self._world.workload.run(knobs, scenario.interval_s, serve_deferrable)
        reading = self._world.telemetry.read(work, scenario.interval_s)
        raw, terms, cost = np.zeros(1, RAW_DTYPE), np.zeros(len(REWARD_TERMS)), np.zeros(len(COST_NAMES))
        budget_w = float(self._budget[int(track["step"])])
        reward = settle(
            self._rules, self._prices, track, _work_row(work), _gpu_row(reading), self._budget,
            knobs.ttt_steps, knob_level(self.problem, index), raw[0], terms, cost,
        )  # fmt: skip
        terminated = bool(self._world.telemetry.tripped)
        truncated = not terminated and int(track["step"]) >= scenario.steps
        self._running = not (terminated or truncated)
        info: dict[str, Any] = {
            "world": self.world,
            "knobs": asdict(knobs),
            "work": {name: getattr(work, name) for name in STAT_NAMES},
            "latency_histogram": work.latency_histogram,
            "tokens_per_expert": work.tokens_per_expert,
            "reading": asdict(reading),
            "stage": STAGES[int(track["stage"])],
            "budget_w": budget_w,
            "reward_terms": dict(zip(REWARD_TERMS, terms.tolist(), strict=True)),
            "cost": dict(zip(COST_NAMES, cost.tolist(), strict=True)),
        }
        if terminated:
            info["reason"] = "the device passed its shutdown temperature"
        return self._encode(raw), float(reward), terminated, truncated, info

    def close(self) -> None:
        """Release model and device. May be called twice."""
        self._running = False
        self._world.close()

    def _encode(self, raw: np.ndarray) -> np.ndarray:
        row = raw.view(np.float64)
        if not np.all(np.isfinite(row)):
            bad = [f.name for f, value in zip(FIELDS, row, strict=True) if not np.isfinite(value)]
            self._running = False
            raise ReadingError(
                f"not a number in the observation's {bad}; the episode is over, check the sensors"
            )
        observation = np.zeros(len(FIELDS), np.float32)
        encode_row(row, observation)
        return observation


ThermalMoEEnv.__doc__ = (ThermalMoEEnv.__doc__ or "").replace(
    "{fields}", fields_table().replace("\n", "\n    ")
)


def _work_row(work: WorkStats) -> np.ndarray:
    row = np.zeros(1, WORK_DTYPE)
    for name in STAT_NAMES:
        row[0][name] = getattr(work, name)
    return row[0]


def _gpu_row(reading: GpuReading) -> np.ndarray:
    row = np.zeros(1, GPU_DTYPE)
    for name in READING_NAMES:
        row[0][name] = getattr(reading, name)
    return row[0]
