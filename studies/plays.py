"""One policy on a study's episodes in the twin, as a task: what it is and what comes out of it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from agents.learning.models import ModelFileError
from agents.load import load_policy, policy_label
from agents.play.metrics import episode_metrics
from agents.play.rollout import Recording, play_twin
from agents.policies.policy import Policy
from agents.policies.registry import make_policy
from moe.model.usage import load_imbalance, specialisation
from studies.ttt_service_results import episode_rows
from studies.wrappers import Delayed, Held
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario, load_scenario

_MODEL = "best_model.zip"
_FILES = (_MODEL, "interface.json", "config.yaml")


@dataclass(frozen=True)
class Trained:
    """A trained agent: the files of its run that playing it takes, so that a worker needs no shared disk."""

    label: str
    files: dict[str, bytes]

    @classmethod
    def read(cls, run: Path) -> Trained:
        """Read a run folder.

        Raises:
            ModelFileError: it holds no best model.
        """
        if not (run / _MODEL).is_file():
            raise ModelFileError(f"{run} holds no {_MODEL}: give the folder of a training run")
        names = [name for name in _FILES if (run / name).is_file()]
        return cls(policy_label(run), {name: (run / name).read_bytes() for name in names})

    @property
    def digest(self) -> str:
        """SHA-256 of the model."""
        return hashlib.sha256(self.files[_MODEL]).hexdigest()

    def policy(self, problem: Problem) -> Policy:
        """The agent, as `agents.files.load_policy` loads it."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                (Path(folder) / name).write_bytes(content)
            return load_policy(folder, problem)


@lru_cache(maxsize=64)
def _problem(scenario: str, overrides: str) -> Problem:
    """A variant of a scenario, loaded once: reading its files takes longer than a short play."""
    return Problem.of(load_scenario(scenario, **json.loads(overrides)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command asks of every question."""

    seeds: tuple[int, ...]
    duration_s: int | None = None
    """Length of an episode, in place of the scenario's."""
    agent: Trained | None = None
    """Played beside the policies of the settings, in variants that say so."""
    routing: Path | None = None
    """Folder of a finished `python -m studies.routing`."""


@dataclass(frozen=True, kw_only=True)
class Play:
    """A policy on all seeds of a variant of a scenario. A task, see `studies.tasks`."""

    name: str
    policy: str | Trained
    """Name in `agents.policies.registry.POLICIES`, or an agent."""
    seeds: tuple[int, ...]
    scenario: str = "vision"
    overrides: dict[str, Any] = field(default_factory=dict)
    """Scenario keys to replace."""
    levels: dict[str, float] = field(default_factory=dict)
    """Knobs held at these values."""
    late_fields: tuple[str, ...] = ()
    """Fields of the observation that the policy sees late."""
    delay_s: float | None = None
    """How late; None: never."""

    @property
    def gpus(self) -> int:
        """None: the twin is played on a CPU."""
        return 0

    @property
    def loaded(self) -> Scenario:
        """The scenario with its keys replaced."""
        return self.problem.scenario

    @property
    def problem(self) -> Problem:
        """What is played."""
        return _problem(self.scenario, json.dumps(self.overrides))

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(self.policy, Trained):
            values["policy"] = self.policy.digest
        return values | {"scenario": dataclasses.asdict(self.loaded)}

    def record(self, episodes: int | None = None) -> Recording:
        """Play the first so many episodes, all by default. The twin gives the same bits every time."""
        problem = self.problem
        policy = (
            make_policy(self.policy, problem) if isinstance(self.policy, str) else self.policy.policy(problem)
        )
        if self.late_fields:
            policy = Delayed(policy, self.late_fields, self.delay_s, problem.scenario.interval_s)
        if self.levels:
            policy = Held(policy, self.levels, problem)
        return play_twin(problem, policy, self.seeds[:episodes], self.name)

    def run(self) -> dict[str, Any]:
        """See `Task.run`: `episodes` has a list per column of `indicators`, `tokens` those of `by_stage`."""
        recording = self.record()
        return {
            "settings": self.settings(),
            "origin": recording.origin,
            "machine": f"{platform.machine()} CPU, {platform.system()}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "episodes": indicators(recording, self.problem).to_dict("list"),
            "tokens": by_stage(recording).sum(axis=0).tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the service, and who runs it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str
    policies: tuple[str, ...] = ()
    scenario: str = "vision"
    overrides: dict[str, Any] = field(default_factory=dict)
    """Scenario keys to replace."""
    agent: bool = False
    """Whether a trained agent is played too; it must fit the scenario."""

    def play(self, name: str, policy: str | Trained, options: Options, **more: Any) -> Play:
        """A play of this variant; `more` are fields of `Play`, overrides are added to the variant's."""
        own = {} if options.duration_s is None else {"episode_s": options.duration_s}
        overrides = self.overrides | own | more.pop("overrides", {})
        return Play(
            name=name, policy=policy, seeds=options.seeds, scenario=self.scenario, overrides=overrides, **more
        )

    def players(self, options: Options) -> dict[str, str | Trained]:
        """Policies by label."""
        players: dict[str, str | Trained] = {name: name for name in self.policies}
        if self.agent and options.agent is not None:
            players[options.agent.label] = options.agent
        return players


def by_stage(recording: Recording) -> np.ndarray:
    """Tokens by episode, layer, thermal stage and expert, float64 [n, L, 4, E]."""
    stage = recording.field("stage").round().astype(int)  # [T, n]
    tokens = recording.tokens_per_expert  # [T, n, L, E]
    shares = [(tokens * (stage == s)[..., None, None]).sum(axis=0) for s in range(len(STAGES))]
    return np.stack(shares, axis=2)


def indicators(recording: Recording, problem: Problem) -> pd.DataFrame:
    """Indicators of every episode, one row each.

    Those of `agents.play.metrics.episode_metrics` and `studies.ttt_service_results.episode_rows`, and

    * `temp_sd_c`: spread of the die temperature over time, degC;
    * `device_spread_c`: hottest less coolest device, mean over time, degC; NaN where there is one;
    * `load_imbalance`: coefficient of variation of the tokens per expert, mean over layers;
    * `stage_bits`: mutual information of expert and thermal stage in bits, mean over layers;
    * `narrow_share`: share of the tokens whose expert is narrower than the widest, NaN where the profile does
      not say the widths.
    """
    rows = episode_metrics(recording)
    adaptation = episode_rows(recording, problem)
    rows = rows.assign(**{name: adaptation[name] for name in adaptation if name not in rows})
    tokens = by_stage(recording)  # [n, L, 4, E]
    load = tokens.sum(axis=(1, 2))  # [n, E]
    widths = np.array(problem.profile.model["config"].get("expert_widths", [np.nan]), np.float64)
    narrow = widths < widths.max()  # [E], or [1] and False
    share = (load * narrow).sum(axis=-1) / load.sum(axis=-1)
    played = np.where(recording.played, recording.gpu["temp_c"], np.nan)  # [T, n]
    spread_c = recording.gpu["temp_spread_c"].sum(axis=0) / recording.length
    return rows.assign(
        temp_sd_c=np.nanstd(played, axis=0),
        device_spread_c=spread_c if len(problem.scenario.devices) > 1 else np.nan,
        load_imbalance=load_imbalance(torch.from_numpy(tokens.sum(axis=2))).mean(-1).numpy(),
        stage_bits=specialisation(torch.from_numpy(tokens)).mean(-1).numpy(),
        narrow_share=np.where(np.isfinite(widths).all(), share, np.nan),
    )


def episodes_of(results: dict[str, dict[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    """Indicators per episode of some plays, with the play's name as `policy`."""
    tables = [pd.DataFrame(results[name]["episodes"]).assign(policy=name) for name in names]
    return pd.concat(tables, ignore_index=True)
