"""The live service of tokens for a scenario: its engine, and the problem at the quality of weights here."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moe.lm.adapt import HeadSettings
from moe.lm.engine.engine import Engine
from moe.lm.text import documents
from moe.lm.weights import identity
from moe.profiles import ProfileError
from moe.profiling.tokens import measure_quality, open_engine
from moe.service.budget import EnergyBudget
from moe.service.generate.lengths import token_lengths
from moe.service.generate.lesson_budget import LessonBudget
from moe.service.generate.live import GenerateWorkload
from moe.service.generate.sequences import Texts
from moe.token_profile import TokenProfile, TokenQuality, load_token_profile, save_token_profile
from moe.training.checkpoint import cache_folder
from thermoe_env.configs import config_path
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Scenario
from thermoe_env.problem.token_tables import token_work

NOTED_POINTS = 0.01
"""Difference of accuracy from the profile's that is said."""
_LOG = logging.getLogger("thermoe_env")


@dataclass(frozen=True)
class Promises:
    """Terms of service, see `moe.service.generate.live`."""

    ttft_s: tuple[float, float]
    tpot_s: tuple[float, float]
    deadline_s: tuple[float, float]
    expire_after_s: tuple[float, float]


def token_service(scenario: Scenario, device: torch.device) -> tuple[Problem, GenerateWorkload]:
    """Build what decodes, and the problem that it plays.

    Args:
        scenario: of task `generate`.
        device: a card serves the model of the scenario's profile; a CPU serves `small`, by its own profile.

    Raises:
        WeightsError: no weights of this size here; names the command that makes them.
        ProfileError: a profile cannot be used.
    """
    terms, promised = scenario.service, scenario.generate
    assert promised is not None
    name = scenario.profile if device.type == "cuda" else "cpu-generate"
    measured = load_token_profile(config_path("profiles", name, ".json"))
    if scenario.adapts and measured.adaptation is None:
        raise ProfileError(
            f"profile {name!r} measured no adaptation: take ttt_steps out of `knobs` and `static`, or "
            "measure it again (python -m moe.profiling tokens)"
        )
    adapts = HeadSettings() if scenario.adapts else None
    engine, texts = open_engine(measured.quality.size, device, promised.cache_positions, adapts)
    profile = replace(measured, quality=quality_here(measured, engine, texts))
    lengths = token_lengths(promised.lengths, engine.model.config.context)
    problem = Problem.of(scenario, profile)
    workload = GenerateWorkload(
        engine, texts, documents().domain, lengths, scenario.traffic, problem.capacity_rps,
        scenario.episode_s + 1,
        Promises(promised.ttft_s, promised.tpot_s, terms.deadline_s, terms.expire_after_s),
        budget=lesson_budget(problem),
    )  # fmt: skip
    workload.warm_up()
    return problem, workload


def lesson_budget(problem: Problem) -> LessonBudget | None:
    """What pays for the lessons of a problem of task `generate`; None: they are unlimited."""
    if not len(problem.purse):
        return None
    assert problem.tokens is not None
    adaptation, cost, power_w = problem.tokens.adaptation, token_work(problem).cost, problem.serving_power_w
    assert adaptation is not None
    rates = cost.time.rate * power_w if cost.energy is None else cost.energy.rate
    return LessonBudget(EnergyBudget.of(problem.purse), cost, rates, adaptation.energy_j(power_w))


def quality_here(profile: TokenProfile, engine: Engine, texts: Texts) -> TokenQuality:
    """How good the answers of the weights on this machine are.

    Where they are not those that the profile measured (every training of `base` gives others) they are
    measured now, which takes a minute or two, and kept for the next time. A difference of more than a point
    is logged.
    """
    here = identity(profile.quality.size)
    if here["weights_sha256"] == profile.quality.weights_sha256:
        return profile.quality
    kept = cache_folder() / f"generate-quality-{here['weights_sha256'][:12]}.json"
    if kept.is_file():
        quality = load_token_profile(kept).quality
    else:
        _LOG.warning("other weights than the profile's: measuring the quality of those here, once")
        quality = measure_quality(profile.quality.size, engine, texts)
        save_token_profile(replace(profile, quality=quality), kept)
    _note_difference(profile.quality, quality, kept)
    return quality


def _note_difference(measured: TokenQuality, here: TokenQuality, kept: Path) -> None:
    """Log where the weights here answer more than a point better or worse."""
    before, now = (
        {(c.running, c.top_k, c.routing_bias): c.accuracy for c in quality.cells}
        for quality in (measured, here)
    )
    gaps = {cell: now[cell] - before[cell] for cell in before.keys() & now.keys()}
    if gaps and np.abs(list(gaps.values())).max() > NOTED_POINTS:
        running, top_k, bias = worst = max(gaps, key=lambda cell: abs(gaps[cell]))
        _LOG.warning(
            "the weights here answer otherwise than the profile's: accuracy %+.1f points at %d running "
            "sequences, %d experts per token, routing bias %g; their own is used (%s)",
            100 * gaps[worst], running, top_k, bias, kept,
        )  # fmt: skip
