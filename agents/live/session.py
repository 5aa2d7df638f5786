"""A sitting at a live service: episode after episode from the same temperature, each saved as it ends."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich.console import Console

from agents.live.episodes import LiveEpisode, LiveEpisodes, policy_of
from agents.live.segments import Segments
from agents.play.rollout import COOL_WITHIN_C, cool_down, device_name, play_live
from agents.policies.policy import Policy, for_episodes
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.worlds import weights_file

PER_EPISODE_S = 3.0
"""Time set aside beside each episode's own length and its cool-down: the service's clock stands still
between intervals."""
IDLE_FOR_S = 10.0
"""The device counts as settled at idle when its temperature has not fallen for so long."""


class Timed:
    """A policy, and how long each of its decisions took."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.decision_s: list[float] = []

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """What the policy answers; see `Policy.predict`."""
        began = time.perf_counter()
        answer = self._policy.predict(observation, state, episode_start, deterministic)
        self.decision_s.append(time.perf_counter() - began)
        return answer


@dataclass
class LiveSession:
    """Plays into a folder of live episodes until the work, the time or the device is at an end."""

    env: ThermalMoEEnv
    live: LiveEpisodes
    recipes: dict[str, dict[str, Any]]
    """Policies by label, see `agents.live.episodes.recipe_of`."""
    machine: dict[str, str]
    """What plays, see `machine_of`."""
    segments: Segments
    say: Console
    cool_down_s: float
    """Longest wait before an episode for the device to idle back to its first start temperature."""
    end: float = math.inf
    """No episode begins that would end after this `time.monotonic()`."""
    _expected_s: dict[str, float] = field(default_factory=dict)
    """Wall-clock time that an episode of each policy took, or will by its first decisions."""
    _cooled_s: list[float] = field(default_factory=list)
    """Cool-downs between episodes."""

    def play(self, todo: Iterable[tuple[str, int]]) -> None:
        """Play (label, seed) after (label, seed); where the device fails, what is recorded stays.

        Raises:
            ValueError: a policy foresees a twin, or its recipe does not fit the problem.
        """
        idle_c: float | None = None
        try:
            for label, seed in todo:
                if not self.fits(label):
                    self.say.print(f"{label}, seed {seed} and what follows: not played, the time is over")
                    return
                if idle_c is None:
                    idle_c = settle(self.env, seed, self.cool_down_s)
                    self.say.print(f"{self.machine['device']}, idle at {idle_c:g} °C")
                began = time.monotonic()
                start_c = cool_down(self.env, seed, idle_c + COOL_WITHIN_C, self.cool_down_s)
                self._cooled_s.append(time.monotonic() - began)
                idle_c = min(idle_c, start_c)
                if not self._episode(label, seed, idle_c, start_c):
                    return
        except RuntimeError as error:  # between episodes
            self.live.lose(f"playing ended: {type(error).__name__} {error}")
            self.say.print(self.live.lost[-1])

    def fits(self, label: str) -> bool:
        """Whether an episode of a policy, begun now, would end in time by what others took."""
        if self.end == math.inf:
            return True
        if label not in self._expected_s:
            self._expected_s[label] = self._expect_s(label)
        # Before the first episode the device is settled, which says nothing of the cool-downs to come.
        cooling_s = max(self._cooled_s[1:], default=self.cool_down_s)
        return time.monotonic() + cooling_s + self._expected_s[label] <= self.end

    def _expect_s(self, label: str) -> float:
        """How long an episode took on this machine before, or would at the pace of two decisions now."""
        played = [
            e.wall_s
            for e in self.live.episodes
            if e.recording.policy == label and e.machine == self.machine and e.wall_s is not None
        ]
        if played:
            return max(played)
        timed = Timed(policy_of(self.recipes[label], self.env.problem))
        first, _ = self.env.reset(seed=0)
        for _ in range(2):  # the first may compile
            timed.predict(first[None], None, np.ones(1, bool))
        scenario = self.env.problem.scenario
        return scenario.episode_s + PER_EPISODE_S + scenario.steps * timed.decision_s[-1]

    def _episode(self, label: str, seed: int, idle_c: float, start_c: float) -> bool:
        """Play one and save it; False where the user wants no more."""
        policy = for_episodes(policy_of(self.recipes[label], self.env.problem), [seed], self.env.world)
        timed = Timed(policy)
        began, began_s, t0 = _now(), time.monotonic(), self.segments.now_s()
        recording = play_live(self.env, timed, seed, label)
        wall_s = time.monotonic() - began_s
        self.segments.add(recording, t0)
        if recording.error is not None:
            played_s = float(recording.length[0]) * recording.interval_s
            error = f"{type(recording.error).__name__} {recording.error}"
            self.live.lose(f"{label}, seed {seed}, at {began}: cut short after {played_s:g} s by {error}")
            self.say.print(self.live.lost[-1])
            return not isinstance(recording.error, KeyboardInterrupt)
        self._expected_s[label] = max(wall_s, self._expected_s.get(label, 0.0))
        self.live.add(
            LiveEpisode(
                recording=recording, recipe=self.recipes[label], idle_c=idle_c, start_c=start_c, began=began,
                machine=self.machine, decision_s=timed.decision_s, wall_s=wall_s,
            )
        )  # fmt: skip
        power_w, temp_c = recording.gpu["power_w"], recording.gpu["temp_c"]
        self.say.print(
            f"{label}, seed {seed}: {recording.length[0]} intervals from {start_c:g} °C, mean "
            f"{power_w.mean():.0f} W, peak {temp_c.max():g} °C"
        )
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def settle(env: ThermalMoEEnv, seed: int, at_most_s: float) -> float:
    """Wait until a real device idles; returns its temperature. A modelled one idles at every reset."""
    lowest_c = cool_down(env, seed, math.inf, 0.0)
    since = began = time.monotonic()
    while (
        env.world == "live" and time.monotonic() - began < at_most_s and time.monotonic() - since < IDLE_FOR_S
    ):
        temp_c = cool_down(env, seed, lowest_c - 1.0, 1.0)
        if temp_c < lowest_c:
            lowest_c, since = temp_c, time.monotonic()
    return lowest_c


def machine_of(env: ThermalMoEEnv) -> dict[str, str]:
    """What plays: device, which card of that kind, driver, versions, weights."""
    import torch

    driver = card = "-"
    if env.world == "live":
        from moe.device.nvml import Gpu
        from moe.device.torch_device import uuid_of

        gpu = Gpu(uuid_of(torch.device("cuda")))
        driver, card = gpu.driver, hashlib.sha256(gpu.uuid.encode()).hexdigest()[:8]
        gpu.close()
    return {
        "device": device_name(env),
        "card": card,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        "python": platform.python_version(),
        "weights_sha256": hashlib.sha256(weights_file(env.problem).read_bytes()).hexdigest(),
    }
