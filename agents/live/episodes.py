"""Live episodes on disk, each with what is needed to play the same policy and requests again elsewhere."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from agents.load import load_policy, model_file
from agents.play.archive import load_recordings, save_recordings
from agents.play.rollout import Recording
from agents.policies.gates import load_gate_config
from agents.policies.policy import ConstantPolicy, Policy
from agents.policies.registry import POLICIES, make_policy
from agents.policies.rules import RuleBased, RuleConfig, load_rule_config
from thermoe_env.configs import configs_dir
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario

EPISODES_FILE = "episodes.npz"
ASIDE = "aside"
"""Folder, within a folder of live episodes, of those that have been replaced."""
CONTRASTS: dict[str, dict[str, int]] = {"small_batches": {"batch_size": 1, "expert_count": 0}}
"""Constant actions as levels from 0: what differs from the standard service."""


# ---------------------------------------------------------------- policies


def recipe_of(spec: str, live: Problem, twin: Problem) -> dict[str, Any]:
    """What identifies a policy beyond changes of profiles and configuration: settings, thresholds, or a file.

    Args:
        spec: name in `POLICIES` or `CONTRASTS`, run folder, or zip.
        live: what is played live.
        twin: what `best_constant` is searched in; levels stand for each other in order.
    """
    if spec == "rule_based":
        return {"rules": asdict(load_rule_config())}
    if spec in CONTRASTS:
        levels = CONTRASTS[spec]
        wanted = {name: live.knobs.levels[name][level] for name, level in levels.items()}
        policy: Policy = ConstantPolicy(live.knobs.action(**wanted))
    else:
        policy = make_policy(spec, twin) if spec == "best_constant" else load_policy(spec, live)
    if isinstance(policy, ConstantPolicy):
        index = live.knobs.indices(policy.action[None], "multi_discrete")[0]
        return {"constant": asdict(live.knobs.knobs(index))}
    return {"model": spec, "sha256": _sha256(spec)}


def policy_of(recipe: dict[str, Any], problem: Problem) -> Policy:
    """Build the policy of a recipe.

    Raises:
        ValueError: the problem lacks a level, or the model's file, or its settings, are others by now.
    """
    if "rules" in recipe:
        return RuleBased(problem, RuleConfig(**recipe["rules"]))
    if "constant" in recipe:
        wanted = {name: float(value) for name, value in recipe["constant"].items()}
        for name, value in wanted.items():
            if value not in problem.knobs.levels[name]:
                raise ValueError(
                    f"{name}={value} was played, this profile has the levels {problem.knobs.levels[name]}: "
                    "name the profile that was used, or one with these levels"
                )
        return ConstantPolicy(
            problem.knobs.action(**{name: wanted[name] for name in problem.knobs.controlled})
        )
    if _sha256(recipe["model"]) != recipe["sha256"]:
        raise ValueError(f"{recipe['model']} is not what was played; bring that model, or its settings, here")
    return load_policy(recipe["model"], problem)


def _sha256(spec: str) -> str | None:
    """Hash of a model's file, or of a named policy's settings; None where there are none, or not here."""
    files = [model_file(spec)]
    if spec in POLICIES:
        gate = spec.removeprefix("gate-")
        names = (spec,) if gate == spec else ("gates", load_gate_config().base_of(gate))
        files = [configs_dir() / "agents" / f"{name}.yaml" for name in names]
    content = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(content)).hexdigest() if content else None


# ---------------------------------------------------------------- what was played


@dataclass(frozen=True, kw_only=True)
class LiveEpisode:
    """One whole live episode and its circumstances."""

    recording: Recording
    recipe: dict[str, Any]
    """Of its policy, see `recipe_of`."""
    idle_c: float
    """Lowest die temperature seen at idle until then, with the service up."""
    start_c: float
    """Die temperature just before it began."""
    began: str
    """UTC, ISO 8601."""
    machine: dict[str, str]
    """Card, driver, versions, and the hash of the weights that answered."""
    decision_s: list[float] = field(default_factory=list)
    """Time of each of the policy's decisions; none in files of earlier versions."""
    wall_s: float | None = None
    """Time that the episode took, decisions and all."""

    @property
    def bench(self) -> tuple[str, ...]:
        """What must be the same where energies are compared: the kind of device, the card, the weights."""
        return tuple(self.machine.get(name, "-") for name in ("device", "card", "weights_sha256"))


@dataclass
class LiveEpisodes:
    """The live half of a folder; the file is whole after every `add`."""

    folder: Path
    scenario: Scenario
    capacity_rps: float
    """Requests per second that load 1.0 stood for."""
    episodes: list[LiveEpisode] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """What is missing and why: episodes that did not end, telemetry."""

    @classmethod
    def load(cls, folder: Path) -> LiveEpisodes | None:
        """Read a folder; None where nothing has been played.

        Raises:
            ValueError: damaged.
        """
        path = folder / EPISODES_FILE
        if not path.exists():
            return None
        recordings, about = load_recordings(path)
        pairs = zip(recordings, about["episodes"], strict=True)
        episodes = [LiveEpisode(recording=recording, **rest) for recording, rest in pairs]
        scenario = TypeAdapter(Scenario).validate_python(about["scenario"])
        return cls(folder, scenario, about["capacity_rps"], episodes, about["lost"])

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Of the policies that have been played, by label."""
        return {e.recording.policy: e.recipe for e in self.episodes}

    def refuse_other_requests(self, problem: Problem) -> None:
        """Episodes of a folder are comparable only if load 1.0 is as many requests in all of them.

        Raises:
            ValueError: in this problem it is not.
        """
        if not math.isclose(self.capacity_rps, problem.capacity_rps, rel_tol=1e-9):
            raise ValueError(
                f"{self.folder} was recorded at {self.capacity_rps:.6g} requests/s for load 1.0, profile "
                f"{problem.scenario.profile} gives {problem.capacity_rps:.6g}: name that profile, or another "
                "--out"
            )

    def set_aside(self, seed: int, machine: dict[str, str]) -> list[LiveEpisode]:
        """Move a seed's episodes that were played on another bench than this into the folder `aside`."""
        others = [
            e for e in self.episodes
            if e.recording.seeds[0] == seed and e.bench != replace(e, machine=machine).bench
        ]  # fmt: skip
        if others:
            folder = self.folder / ASIDE
            aside = LiveEpisodes.load(folder) or LiveEpisodes(folder, self.scenario, self.capacity_rps)
            kept = {(e.recording.policy, e.began) for e in aside.episodes}
            aside.episodes += [e for e in others if (e.recording.policy, e.began) not in kept]
            aside.save()  # first: an interruption may leave them in both places, but never in none
            self.episodes = [e for e in self.episodes if not any(e is other for other in others)]
            self.save()
        return others

    def add(self, episode: LiveEpisode) -> None:
        """Take in an episode."""
        self.episodes.append(episode)
        self.save()

    def lose(self, reason: str) -> None:
        """Note what is missing."""
        self.lost.append(reason)
        self.save()

    def settled_c(self, episode: LiveEpisode) -> float:
        """Temperature at which the die idles once it has settled: the lowest seen on that machine and day."""
        where = (episode.machine, episode.began[:10])
        return min(e.idle_c for e in self.episodes if (e.machine, e.began[:10]) == where)

    def has(self, policy: str, seed: int) -> bool:
        """Whether an episode has been played."""
        return any(e.recording.policy == policy and e.recording.seeds[0] == seed for e in self.episodes)

    def save(self) -> None:
        """Write the file anew, in one step."""
        rest = [
            {f.name: getattr(episode, f.name) for f in fields(LiveEpisode) if f.name != "recording"}
            for episode in self.episodes
        ]
        about = {
            "scenario": TypeAdapter(Scenario).dump_python(self.scenario, mode="json"),
            "capacity_rps": self.capacity_rps,
            "lost": self.lost,
            "episodes": rest,
        }
        save_recordings(self.folder / EPISODES_FILE, [e.recording for e in self.episodes], about)
