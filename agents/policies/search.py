"""Search over all constant actions: the best setting that never changes."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from agents.files import write_file
from moe.errors import DataCorruptError
from moe.files import read_json
from moe.service.traffic import traffic_of
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.core import TwinBatch

SEARCH_SEEDS = tuple(range(900_000, 900_008))
"""Episodes the search looks at; evaluation uses other seeds."""

_LOG = logging.getLogger(__name__)


def best_constant(problem: Problem) -> np.ndarray:
    """The constant action (int64 [controlled]) with the best mean return in the twin.

    Every combination of levels is played on `SEARCH_SEEDS`. The result is kept in the user's cache,
    keyed by everything it depends on.

    Raises:
        DataCorruptError: what is kept there is no such result.
    """
    cache = _cache_file(problem)
    if cache.exists():
        return _kept(cache, problem.knobs.nvec)
    actions = np.array(list(itertools.product(*(range(n) for n in problem.knobs.nvec))), np.int64)
    returns = constant_returns(problem, actions)
    best = actions[int(np.argmax(returns))]
    try:
        write_file(cache, json.dumps({"action": best.tolist(), "return": float(returns.max())}))
    except OSError as error:
        _LOG.warning(
            f"the best constant will be searched again: {error}; let THERMALMOE_CACHE name a folder that can "
            "be written"
        )
    return best


def constant_returns(problem: Problem, actions: np.ndarray) -> np.ndarray:
    """Mean return of each constant action over `SEARCH_SEEDS`, float [actions]."""
    seeds = np.array(SEARCH_SEEDS)
    chunk = 64
    returns = np.zeros(len(actions))
    batch = TwinBatch(problem, chunk * len(seeds))
    for start in tqdm(range(0, len(actions), chunk), desc="search constants", unit_scale=chunk, leave=False):
        part = actions[start : start + chunk]
        padded = np.concatenate([part, np.tile(part[-1], (chunk - len(part), 1))])
        index = problem.knobs.indices(np.repeat(padded, len(seeds), axis=0), "multi_discrete")
        batch.reset(np.tile(seeds, chunk))
        total = np.zeros(len(index))
        for _ in range(problem.scenario.steps):
            total += batch.step(index).reward
        returns[start : start + len(part)] = total.reshape(chunk, -1).mean(axis=1)[: len(part)]
    return returns


def _kept(cache: Path, nvec: np.ndarray) -> np.ndarray:
    """The action in a file of the cache."""
    remedy = "remove it, it will be searched again"
    action = read_json(cache, remedy, ("action",))["action"]
    levels = [range(n) for n in nvec]
    played = isinstance(action, list) and len(action) == len(levels)
    if not (played and all(type(x) is int and x in known for x, known in zip(action, levels, strict=True))):
        raise DataCorruptError(f"{cache}: action {action!r} is none of this scenario: {remedy}")
    return np.array(action, np.int64)


def _cache_file(problem: Problem) -> Path:
    tables = [np.round(table, 12).tolist() for table in problem.tables]
    scenario = problem.scenario
    trace = traffic_of(scenario.traffic, scenario.episode_s + 1, problem.capacity_rps).trace_rps.tolist()
    key = json.dumps([asdict(scenario), asdict(problem.twin), tables, SEARCH_SEEDS, trace], default=str)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    root = Path(os.environ.get("THERMALMOE_CACHE", Path.home() / ".cache" / "thermalmoe"))
    return root / "best_constant" / f"{digest}.json"
