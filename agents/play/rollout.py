"""Playing policies: many episodes at once in the twin, single ones in any environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.policies.policy import Policy, decide, for_episodes
from moe.workload import KNOB_NAMES, WORK_DTYPE
from thermoe_env.device.telemetry import READING_NAMES
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import FIELDS, Ranges, ranges_of
from thermoe_env.mdp.interval import COST_NAMES
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.mdp.signals import draw_power_budget
from thermoe_env.problem.problem import Problem
from thermoe_env.seeding import episode_seed
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.heat import GPU_DTYPE
from thermoe_env.twin.service import HISTOGRAM_BINS


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Episodes of one policy. T intervals, n episodes, L layers, E experts.

    Rows from `length[i]` on, after the end of episode i, are zero.
    """

    policy: str
    world: str
    """`twin`, `live` or `live-cpu`."""
    device: str
    """Whose power and temperature these are."""
    seeds: np.ndarray
    """int64 [n]; the same seed means the same requests, device and budgets."""
    interval_s: float
    length: np.ndarray
    """int64 [n] intervals played."""
    shut_down: np.ndarray
    """bool [n]: the device passed its shutdown temperature."""
    observation: np.ndarray
    """float32 [T, n, fields], as the policy saw it after each interval."""
    ranges: np.ndarray
    """float64 [2, fields], the `Ranges` that observations are scaled from; [2, 0] where an earlier version
    recorded none."""
    index: np.ndarray
    """int64 [T, n, knobs], level of every knob."""
    budget_w: np.ndarray
    """float64 [T, n], power budget in force."""
    work: np.ndarray
    """`WORK_DTYPE` [T, n]."""
    gpu: np.ndarray
    """`GPU_DTYPE` [T, n]."""
    reward: np.ndarray
    """float64 [T, n]."""
    terms: np.ndarray
    """float64 [T, n, 6], in `REWARD_TERMS` order."""
    cost: np.ndarray
    """float64 [T, n, 3], in `COST_NAMES` order."""
    histogram: np.ndarray
    """int32 [T, n, bins], answered requests by latency."""
    tokens_per_expert: np.ndarray
    """float64 [T, n, L, E], tokens routed."""
    error: RuntimeError | KeyboardInterrupt | None = None
    """What cut the last episode short, None when it is whole."""

    def field(self, name: str) -> np.ndarray:
        """One observed quantity in physical units, clipped to its range, [T, n]."""
        return Ranges(*self.ranges).decode(self.observation)[name]

    @property
    def origin(self) -> str:
        """Where the numbers come from, for every title that shows them."""
        return origin(self.world, self.device)

    @property
    def played(self) -> np.ndarray:
        """Which intervals belong to an episode, bool [T, n]."""
        return np.arange(len(self.reward))[:, None] < self.length

    def episode(self, i: int) -> Recording:
        """Episode i alone (n = 1), cut to its length."""
        stop = int(self.length[i])
        per_interval = {name: getattr(self, name)[:stop, i : i + 1] for name in _PER_INTERVAL}
        per_episode = {name: getattr(self, name)[i : i + 1] for name in ("seeds", "length", "shut_down")}
        return replace(self, **per_interval, **per_episode)


def origin(world: str, device: str) -> str:
    """Where numbers of a world come from, in words."""
    if world == "live":
        return f"measured (live, {device})"
    if world == "live-cpu":
        return f"measured work, simulated device (live-cpu, {device})"
    return f"simulated (twin), {device}"


_PER_INTERVAL = (
    "observation", "index", "budget_w", "work", "gpu", "reward", "terms", "cost", "histogram",
    "tokens_per_expert",
)  # fmt: skip


def empty_rows(steps: int, n: int, layers_experts: tuple[int, ...]) -> dict[str, Any]:
    """What a `Recording` holds per interval, all zero: name -> array."""
    return {
        "observation": np.zeros((steps, n, len(FIELDS)), np.float32),
        "index": np.zeros((steps, n, len(KNOB_NAMES)), np.int64),
        "budget_w": np.zeros((steps, n)),
        "work": np.zeros((steps, n), WORK_DTYPE),
        "gpu": np.zeros((steps, n), GPU_DTYPE),
        "reward": np.zeros((steps, n)),
        "terms": np.zeros((steps, n, len(REWARD_TERMS))),
        "cost": np.zeros((steps, n, len(COST_NAMES))),
        "histogram": np.zeros((steps, n, HISTOGRAM_BINS), np.int32),
        "tokens_per_expert": np.zeros((steps, n, *layers_experts)),
    }


def play_twin(problem: Problem, policy: Policy, seeds: Sequence[int], name: str = "policy") -> Recording:
    """Play one twin episode per seed, all at once.

    Args:
        problem: what to play.
        policy: whose actions.
        seeds: episode 0 of each, as `ThermalMoEEnv.reset(seed=...)` starts it.
        name: label of the policy.

    Raises:
        PolicyError: the policy answers with what is no action.
    """
    scenario, n = problem.scenario, len(seeds)
    batch = TwinBatch(problem, n, latencies=True)
    tokens = problem.expert_tokens  # [K, B, L, E]
    data = empty_rows(scenario.steps, n, tokens.shape[2:])
    for i, seed in enumerate(seeds):
        budget = draw_power_budget(
            scenario.power_budget, episode_seed(seed, 0), scenario.steps, scenario.interval_s
        )
        data["budget_w"][:, i] = budget[: scenario.steps]
    length, shut_down = np.zeros(n, np.int64), np.zeros(n, bool)
    policy = for_episodes(policy, seeds, "twin")
    observation, state, start = batch.reset(seeds), None, np.ones(n, bool)
    running = np.ones(n, bool)
    for t in tqdm(range(scenario.steps), desc=f"{name}, {n} episodes", unit="step", delay=2.0, leave=False):
        action, state = decide(policy, name, problem.knobs, observation, state, start)
        step = batch.step(problem.knobs.indices(action, "multi_discrete"))
        done = step.terminated | step.truncated
        rows = {
            "observation": np.where(done[:, None], step.final_observation, step.observation),
            **{key: getattr(batch, key) for key in ("index", "work", "gpu", "terms", "cost")},
            "histogram": batch.histogram[:, :HISTOGRAM_BINS],  # of whole answers
            "reward": step.reward,
            "tokens_per_expert": _tokens(tokens, batch),
        }
        for key, row in rows.items():
            data[key][t, running] = row[running]
        length += running
        shut_down |= running & step.terminated
        running &= ~done
        if not running.any():
            break
        observation, start = step.observation, done
    data["budget_w"][np.arange(scenario.steps)[:, None] >= length] = 0.0
    return Recording(
        policy=name, world="twin", device=problem.twin.gpu, seeds=np.array(seeds, np.int64),
        interval_s=scenario.interval_s, length=length, shut_down=shut_down,
        ranges=np.array(ranges_of(problem)), **data,
    )  # fmt: skip


def _tokens(tokens: np.ndarray, batch: TwinBatch) -> np.ndarray:
    """Tokens that the interval's answers sent to each expert, [n, L, E]; `tokens` [K, B, L, E] per answer."""
    k = batch.index[:, KNOB_NAMES.index("expert_count")]
    b = batch.index[:, KNOB_NAMES.index("routing_bias")]
    answered = batch.work["answered"].sum(axis=-1)
    return tokens[k, b] * answered[:, None, None]


def play_live(
    env: ThermalMoEEnv,
    policy: Policy,
    seed: int,
    name: str = "policy",
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> Recording:
    """Play one episode of an environment of any world.

    What was recorded is kept when the world fails (`ThermoeError` or another `RuntimeError`) or the user
    interrupts; `error` of the recording is then what stopped it.

    Args:
        env: its action mode must be `multi_discrete`.
        policy: whose actions.
        seed: episode 0 of it.
        name: label of the policy.
        on_step: called after each interval with its number and `info`.

    Raises:
        ValueError: another action mode, or a policy that foresees a twin in another world.
        PolicyError: the policy answers with what is no action.
        ThermoeError: the world failed at its reset.
    """
    if env.action_mode != "multi_discrete":
        raise ValueError(
            f"policies answer with levels: action_mode must be 'multi_discrete', got {env.action_mode!r}"
        )
    policy = for_episodes(policy, [seed], env.world)
    problem = env.problem
    steps = problem.scenario.steps
    data = empty_rows(steps, 1, problem.profile.expert_share.shape[2:])
    first, _ = env.reset(seed=seed)
    observation, state, start = first[None], None, np.ones(1, bool)
    length, terminated, error = 0, False, None
    try:
        for t in tqdm(range(steps), desc=f"{name}, seed {seed}", unit="step", delay=2.0, leave=False):
            action, state = decide(policy, name, problem.knobs, observation, state, start)
            after, reward, terminated, truncated, info = env.step(action[0])
            row = {key: rows[t] for key, rows in data.items()}
            row["observation"][0], row["reward"][0] = after, reward
            row["index"][0] = problem.knobs.indices(action, "multi_discrete")[0]
            row["budget_w"][0] = info["budget_w"]
            row["work"][0] = tuple(info["work"][key] for key in WORK_DTYPE.names or ())
            row["gpu"][0] = tuple(info["reading"][key] for key in READING_NAMES)
            row["terms"][0] = [info["reward_terms"][key] for key in REWARD_TERMS]
            row["cost"][0] = [info["cost"][key] for key in COST_NAMES]
            row["histogram"][0] = info["latency_histogram"]
            row["tokens_per_expert"][0] = info["tokens_per_expert"]
            length = t + 1
            if on_step is not None:
                on_step(t, info)
            if terminated or truncated:
                break
            observation, start = after[None], np.zeros(1, bool)
    except (RuntimeError, KeyboardInterrupt) as stop:
        error = stop
    data = {key: rows[:length] for key, rows in data.items()}
    return Recording(
        policy=name, world=env.world, device=device_name(env), seeds=np.array([seed]),
        interval_s=problem.scenario.interval_s, length=np.array([length]), shut_down=np.array([terminated]),
        ranges=np.array(ranges_of(problem)), error=error, **data,
    )  # fmt: skip


COOL_WITHIN_C = 1.0
"""A device is as cool as another time if it is no more than this above."""


def cool_down(env: ThermalMoEEnv, seed: int, below_c: float, at_most_s: float, every_s: float = 1.0) -> float:
    """Leave the device idle until it is no warmer than `below_c`, or `at_most_s` have passed.

    Args:
        env: each look at its temperature resets it.
        seed: for those resets.
        below_c: temperature to wait for.
        at_most_s: patience.
        every_s: time between looks.

    Returns:
        Die temperature at the last look.
    """
    deadline = time.monotonic() + at_most_s
    with tqdm(desc=f"cools to {below_c:g} °C", unit="look", delay=2.0, leave=False) as bar:
        while True:
            _, info = env.reset(seed=seed)
            temp_c = float(info["reading"]["temp_c"])
            left_s = deadline - time.monotonic()
            if temp_c <= below_c or left_s <= 0.0:
                return temp_c
            bar.set_postfix(temp_c=temp_c, refresh=False)
            bar.update()
            time.sleep(min(every_s, left_s))


def device_name(env: ThermalMoEEnv) -> str:
    """Whose power and temperature an environment reads."""
    if env.world != "live":
        return env.problem.twin.gpu
    import torch

    return torch.cuda.get_device_name()
