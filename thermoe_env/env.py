"""`ThermalMoEEnv`: the control problem as a Gymnasium environment, in either world."""

from __future__ import annotations

import struct
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from moe.memory import Held, address_of
from moe.workload import WORK_DTYPE, Knobs, WorkStats
from thermoe_env.device.telemetry import READING_NAMES, GpuReading
from thermoe_env.errors import ReadingError
from thermoe_env.mdp.account import Account, account_alone, account_rows
from thermoe_env.mdp.fields import (
    FIELDS,
    RAW_DTYPE,
    fields_table,
    observation_space,
    ranges_of,
)
from thermoe_env.mdp.interval import COST_NAMES, TRACK_DTYPE, prices_of, rules_of
from thermoe_env.mdp.limits import CAUSES_OF
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import ANNOUNCED, STAGES, announced_terms
from thermoe_env.problem.knobs import INDEX_DTYPE
from thermoe_env.problem.scenario import Scenario, as_overrides, load_scenario
from thermoe_env.seeding import as_seed, episode_seed
from thermoe_env.twin.heat import GPU_DTYPE
from thermoe_env.worlds import Checkpoint, build_world

if TYPE_CHECKING:
    from thermoe_env.render import Dashboard, Window


class ThermalMoEEnv(gym.Env[np.ndarray, Any]):
    """Steer a Mixture-of-Experts service under power and thermal limits.

    ## Description
    A MoE model answers two classes of requests (interactive, deferrable) in dynamic batches and can
    adapt itself to shifted inputs. Every control interval the agent sets the knobs; the device heats up,
    the queue moves, energy is spent. Temperature limits are virtual: they lie below the hardware's.

    ## Action Space
    One level per controlled knob of the scenario: `MultiDiscrete` (default), `Discrete` (flattened) or
    `Box` in [-1, 1]. Knobs: `routing_bias`, `batch_size`, `expert_count`, `ttt_steps`, `pace`, `sm_clock`,
    `admission`.

    ## Observation Space
    A flat float32 `Box` in [-1, 1], scaled from the ranges of these fields; `ranges_of(problem).decode` of
    `thermoe_env.mdp.fields` gives their physical values:

    {fields}

    ## Rewards
    goodput - energy - lateness - power over budget - heat - missing quality, in units of the standard
    service at full load; the terms are in `info["reward_terms"]`, constraint costs in `info["cost"]`.

    Infos have the same keys and types at reset, where nothing has been done yet, as at every step.
    `info["knobs"]` are those asked for; `info["limits"]` says what limits left of them in the interval:
    `duty`, the share of time for which the device might run (0 where no request was begun), `why` (of
    `brake`, `slowdown`, `alarm`; else empty), and `temperature_c`, the limit then in force.

    `info["devices"]` has temperatures, power and clock as tuples of one number per device, where
    `info["reading"]` has the hottest, the sum and the slowest.

    ## Starting State
    A device settled at idle, an empty queue, an unadapted model.

    ## Episode End
    Truncated after the scenario's length; `gymnasium.make(id, max_episode_steps=N)` shortens it and never
    lengthens it. Terminated when the device shuts itself down (`info["reason"]`, else empty). A GPU that
    stops answering raises `GpuLostError`.

    ## Arguments
    `scenario`: name, YAML path or `Scenario`. `world`: `auto`, `twin`, `live`. `action_mode`:
    `multi_discrete`, `discrete`, `box`. `overrides`: scenario keys to replace. `render_mode`: `rgb_array`, a
    dashboard as uint8 [540, 960, 3], or `human`, the same in a window. `model`, `profile`: a Hugging Face
    checkpoint's folder and its profile, for the live world (docs/hf.md).

    ## Copies
    `copy.deepcopy` and pickle give a twin that continues bit for bit, in the middle of an episode too, and
    shares nothing that changes. A live world, and a window, refuse by `TypeError`.

    ## Version History
    v0: first version.
    """

    # Ten intervals in a second of film.
    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012  (Gymnasium's form)

    def __init__(
        self,
        scenario: str | Scenario = "default",
        world: str = "auto",
        action_mode: str = "multi_discrete",
        overrides: dict[str, Any] | None = None,
        render_mode: str | None = None,
        model: str | None = None,
        profile: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            known = self.metadata["render_modes"]
            raise ValueError(f"render_mode must be None or one of {known}, got {render_mode!r}")
        self.render_mode = render_mode
        self._window: Window | None = None
        self._dashboard: Dashboard | None = None
        if render_mode == "human":
            from thermoe_env.render import Window

            self._window = Window(self.metadata["render_fps"])
        self.scenario = load_scenario(scenario, **as_overrides(overrides))
        self._world = build_world(self.scenario, world, Checkpoint.of(model, profile))
        self.world = self._world.name
        """Which world this is: `twin`, `live` or `live-cpu`."""
        self.problem = self._world.problem
        self._missing = ", ".join(self._world.telemetry.missing)
        if render_mode is not None:
            from thermoe_env.render import Dashboard

            self._dashboard = Dashboard(self.problem, self.world)
        self.action_mode = action_mode
        self.action_space = self.problem.knobs.action_space(action_mode)
        self.observation_space = observation_space()
        ranges, rules = ranges_of(self.problem), rules_of(self.problem)
        self._limits_c = self._world.limits_c()
        gpu, raw = np.zeros(1, GPU_DTYPE), np.zeros(1, RAW_DTYPE)
        self._here = Account(
            rules, prices_of(self.problem), self.problem.quality_floor, ranges.low, ranges.scale,
            np.array(self.problem.knobs.default_index, np.int64),
            announced_terms(self.scenario),
            np.zeros((1, len(ANNOUNCED), self.scenario.steps + int(rules[0]["notice"]) + 1)),
            np.zeros(1, INDEX_DTYPE),
            np.zeros(1, TRACK_DTYPE), np.zeros(1, WORK_DTYPE), gpu, raw, np.zeros((1, len(REWARD_TERMS))),
            np.zeros((1, len(COST_NAMES))), gpu, raw,
        )  # fmt: skip
        self._experts = self.problem.expert_tokens.shape[2:]
        self._hold()
        self._seed: int | None = None
        self._episode = 0
        self._running = False

    def __getstate__(self) -> dict[str, Any]:
        """All but compiled functions and where they find their memory."""
        return {**vars(self), "_held": None, "_begin_one": None, "_settle_one": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the place of what was copied, with views of the same memory again."""
        self.__dict__.update(state)
        self._hold()

    def _hold(self) -> None:
        """Let compiled code find what stays where it is."""
        here = self._here
        # Plain numbers are filled and read several times faster than records.
        self._index, self._work_row = here.levels.view(np.int64), here.work.view(np.float64)
        self._gpu_row, self._raw_row = here.gpu.view(np.float64), here.raw.view(np.float64)
        self._terms, self._cost = here.terms[0], here.cost[0]
        self._budget, self._price, self._promised_tpot = here.announced[0]
        self._held = Held(here)
        begin_row, settle_row = account_rows(self._held.kind)
        self._begin_one, self._settle_one = account_alone(self._held.kind)
        self._begin_row = address_of(begin_row, self._held.address, np.uint64(0), 0, 0.0)
        self._settle_row = address_of(settle_row, self._held.address, 0, 0.0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode. With `seed`, episode 0 of that seed; without, the next one.

        Raises:
            ValueError: a seed that is no integer in [0, 2**64), of Python or NumPy.
        """
        seed = None if seed is None else as_seed(seed)
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode = seed, 0
        elif self._seed is None:
            self._seed, self._episode = int(self.np_random.integers(2**31)), 0
        else:
            self._episode += 1
        episode = episode_seed(self._seed, self._episode)
        self._world.workload.reset(episode)
        reading = self._world.telemetry.reset(episode)
        self._terms[:] = 0.0
        self._cost[:] = 0.0
        _pack_reading(self._gpu_row.data, 0, *_reading_row(reading))
        observation = np.empty(len(FIELDS), np.float32)
        finite, self._coming = self._begin_one(
            self._begin_row, self._held.address, np.uint64(episode), self._limits_c[0], observation
        )
        self._running = False
        self._check(finite)
        self._count = 0
        self._running = True
        if self._dashboard is not None:
            self._dashboard.begin(reading.temp_c, reading.power_w, self._coming[0])
            self._show()
        nothing = WorkStats(budget_share=float(self._here.rules["first_budget_share"][0]))
        return observation, self._info(
            self.problem.knobs.knobs(self._here.default_index), nothing, reading, 1.0, 0
        )

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Play one control interval.

        Raises:
            ValueError: an action outside the space.
            ResetNeeded: before the first reset, or after the end of an episode.
            GpuLostError, ReadingError: the live device failed; the episode is over.
        """
        if not self._running:
            raise gym.error.ResetNeeded("call reset() before step(): no episode is running")
        index, knobs = self.problem.knobs.one(action, self.action_mode)
        scenario = self.problem.scenario
        _, open_classes, duty, held = self._coming
        limit_c = self._limits_c[self._count]
        self._running = False  # an interval that fails ends the episode
        promised_s = float(self._promised_tpot[self._count]) or None
        work = self._world.workload.run(knobs.under(duty), scenario.interval_s, open_classes, promised_s)
        reading = self._world.telemetry.read(work, scenario.interval_s)
        self._work_row[:], self._index[:] = work.row, index
        _pack_reading(self._gpu_row.data, 0, *_reading_row(reading))
        observation = np.empty(len(FIELDS), np.float32)
        reward, finite, self._coming = self._settle_one(
            self._settle_row, self._held.address, limit_c, observation
        )
        self._check(finite)
        self._count += 1
        terminated = bool(self._world.telemetry.tripped)
        truncated = not terminated and self._count >= scenario.steps
        self._running = not (terminated or truncated)
        info = self._info(knobs, work, reading, duty if open_classes else 0.0, held)
        if self._dashboard is not None:
            notice = len(self._budget) - scenario.steps - 1
            self._dashboard.add(info, self._budget[self._count : self._count + notice])
            self._show()
        return observation, reward, terminated, truncated, info

    def _info(
        self, knobs: Knobs, work: WorkStats, reading: GpuReading, duty: float, held: int
    ) -> dict[str, Any]:
        """What is told of the interval just played, or of a beginning."""
        tokens, last = work.tokens_per_expert, max(0, self._count - 1)
        return {
            "world": self.world,
            "missing": self._missing,
            "knobs": dict(vars(knobs)),
            "work": work.counted,
            "latency_histogram": work.latency_histogram,
            "tokens_per_expert": np.zeros(self._experts) if tokens is None else tokens,
            "reading": dict(vars(reading)),
            "devices": self._world.telemetry.per_device(reading),
            "stage": STAGES[self._coming[0]],
            "budget_w": float(self._budget[last]),
            "price": float(self._price[last]),
            "promised_tpot_s": float(self._promised_tpot[last]),
            "limits": {"duty": duty, "why": CAUSES_OF[held], "temperature_c": self._limits_c[last]},
            "reward_terms": dict(zip(REWARD_TERMS, self._terms.tolist(), strict=True)),
            "cost": dict(zip(COST_NAMES, self._cost.tolist(), strict=True)),
            "reason": "the device passed its shutdown temperature" if self._world.telemetry.tripped else "",
        }

    def render(self) -> np.ndarray | None:
        """The dashboard as it stands: uint8 [540, 960, 3], or None where a window shows it or nobody asked.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self._dashboard is None:
            return None
        if self._seed is None:
            raise gym.error.ResetNeeded("call reset() before render(): there is nothing to show yet")
        return None if self._window is not None else self._dashboard.frame()

    def _show(self) -> None:
        """Bring the window up to date, where there is one."""
        if self._window is not None and self._dashboard is not None:
            self._window.show(self._dashboard.frame())

    def close(self) -> None:
        """Release model, device and window. May be called twice."""
        self._running = False
        self._world.close()
        if self._window is not None:
            self._window.close()

    def _check(self, finite: bool) -> None:
        """Refuse an observation that is not `finite`."""
        if not finite:
            bad = [f.name for f, value in zip(FIELDS, self._raw_row, strict=True) if not np.isfinite(value)]
            raise ReadingError(
                f"not a number in the observation's {bad}; the episode is over, check the sensors"
            )


ThermalMoEEnv.__doc__ = (ThermalMoEEnv.__doc__ or "").replace(
    "{fields}", fields_table().replace("\n", "\n    ")
)


_reading_row = attrgetter(*READING_NAMES)
# Fills an array of one record several times faster than NumPy does from a tuple.
_pack_reading = struct.Struct(f"{len(READING_NAMES)}d").pack_into
