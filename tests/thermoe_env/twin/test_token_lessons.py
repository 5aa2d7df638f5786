"""Lessons of the token service in the twin, against the live service's code over a modelled engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe.lm.text import DOMAINS
from moe.service.budget import EnergyBudget
from moe.token_profile import Learned, TokenAdaptation
from moe.workload import WorkStats
from tests.thermoe_env.twin.test_generate import STANDARD, Reference, reference, twin
from tests.thermoe_env.twin.token_engine import ModelledLessons
from thermoe_env.errors import ScenarioError
from thermoe_env.live_tokens import lesson_budget
from thermoe_env.problem.problem import Problem, profile_of
from thermoe_env.problem.scenario import load_scenario

NOTHING = Learned(accuracy=0.0, confidence=0.0, entropy=0.0, loss=0.0)
BETTER = Learned(accuracy=0.04, confidence=0.02, entropy=-0.03, loss=-0.1)
WORSE = Learned(accuracy=-0.03, confidence=0.0, entropy=0.0, loss=0.06)
LESSON_S, LESSON_J, ROWS = 3e-3, 2.0, 512
ADAPTING = replace(STANDARD, ttt_steps=1)


def adaptation(rate: float = 0.3, lesson_s: float = LESSON_S) -> TokenAdaptation:
    """Made up: logs are worth learning, and what was learned of them is worse about prose."""
    changed: dict[str, dict[str, Learned]] = {about: dict.fromkeys(DOMAINS, NOTHING) for about in DOMAINS}
    changed["logs"]["logs"], changed["prose"]["logs"] = BETTER, WORSE
    curve = {name: ((0.0, 0.0), (1.0, 0.25 * rate * changed[name][name].loss)) for name in DOMAINS}
    return TokenAdaptation(
        lesson_rows=ROWS, margin=0.005, lesson_s=lesson_s, lesson_j=LESSON_J, curve=curve, changed=changed,
        visits=(), provenance={},
    )  # fmt: skip


def problem(shift: int = 0, load: float = 0.4, budget: float | None = None, **made: Any) -> Problem:
    own = {} if budget is None else {"budget": {"fraction": budget, "window_s": 2.0, "bank_windows": 1}}
    scenario = load_scenario(
        "default", episode_s=60, randomize={"steps": 0.0}, knobs=["batch_size", "ttt_steps"],
        adaptation={"method": "head", "group": "head", **own} if own else {},
        traffic={"kind": "poisson", "low_load": load, "high_load": load, "shifts": [shift]},
    )  # fmt: skip
    measured: Any = profile_of(scenario, scenario.profile)
    return Problem.of(scenario, replace(measured, adaptation=adaptation(**made)))


def adapting(of: Problem) -> Reference:
    found = reference(of)
    found.engine.adapter = ModelledLessons(ROWS, LESSON_S, [0, 0])
    found.workload._budget = lesson_budget(of)
    found.workload.reset(0)
    return found


def accuracy(row: WorkStats) -> float:
    return row.right_tokens / row.output_tokens


def mean(rows: list[WorkStats], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in rows]))


@pytest.mark.parametrize("load", [0.2, 0.6])
def test_lessons_come_as_often_and_last_as_long_as_in_the_service(load: float) -> None:
    made = problem(load=load)
    live, modelled = adapting(made), twin(made)
    rows = [live.run(ADAPTING)[0] for _ in range(55)]
    played = [modelled.run(ADAPTING, 1.0) for _ in range(55)]
    assert mean(played, "output_tokens") == pytest.approx(mean(rows, "output_tokens"), rel=0.03)
    assert mean(played, "ttt_steps") == pytest.approx(mean(rows, "ttt_steps"), rel=0.06)
    assert mean(played, "ttt_busy_s") == pytest.approx(mean(rows, "ttt_busy_s"), rel=0.06)
    assert mean(played, "busy_s") == pytest.approx(mean(rows, "busy_s"), rel=0.05)
    assert mean(played, "tpot_s") == pytest.approx(mean(rows, "tpot_s"), rel=0.06)
    idle = [twin(made).run(STANDARD, 1.0) for _ in range(1)]
    assert mean(idle, "ttt_steps") == 0.0


def test_a_budget_pays_for_as_many_lessons_as_in_the_service_and_refuses_the_rest() -> None:
    made = problem(budget=0.02)
    live, modelled = adapting(made), twin(made)
    rows = [live.run(ADAPTING)[0] for _ in range(40)]
    played = [modelled.run(ADAPTING, 1.0) for _ in range(40)]
    assert 0.0 < mean(rows, "ttt_steps") < mean(rows, "ttt_refused")
    assert mean(played, "ttt_steps") == pytest.approx(mean(rows, "ttt_steps"), rel=0.1)
    assert mean(played, "ttt_refused") == pytest.approx(mean(rows, "ttt_refused"), rel=0.1)
    assert all(0.0 <= row.budget_share <= 1.0 for row in rows + played)
    serving = sum(row.slot_energy_j.sum() for row in played if row.slot_energy_j is not None)
    spent = LESSON_J * sum(row.ttt_steps for row in played)
    start_j = EnergyBudget.of(made.purse).balance_j
    assert spent <= 0.02 * (serving - spent) + start_j + 1e-6
    assert modelled.run(replace(ADAPTING, ttt_steps=0), 1.0).budget_share > 0.0  # it earns without spending


def test_what_is_learned_is_gained_and_a_worse_head_goes_back() -> None:
    logs, plain = twin(problem(shift=3)), twin(problem(shift=3))
    learned = [logs.run(ADAPTING, 1.0) for _ in range(8)]
    without = [plain.run(STANDARD, 1.0) for _ in range(8)]
    gain = [accuracy(row) - accuracy(other) for row, other in zip(learned, without, strict=True)]
    assert gain[0] < gain[2] and gain[-1] == pytest.approx(0.04, abs=0.004)
    assert sum(row.ttt_rolled_back for row in learned) == 0
    kept = [logs.run(STANDARD, 1.0) for _ in range(2)]  # no more lessons: what was learned stays
    assert accuracy(kept[-1]) == pytest.approx(accuracy(without[-1]) + 0.04, abs=0.004)


def test_a_head_that_learned_another_domain_goes_back_at_its_first_lesson() -> None:
    made = problem(shift=0)
    workload = twin(made)
    state: Any = workload.state
    state.weights[0] = 0.0
    state.weights[0, 1 + DOMAINS.index("logs")] = 1.0
    row = workload.run(ADAPTING, 1.0)
    assert row.ttt_rolled_back == 2.0  # of either half
    assert state.weights[0, 1 + DOMAINS.index("logs")] == 0.0
    assert state.server["trust"][0] == 0.0625


def test_devices_that_share_experts_do_not_adapt_and_the_guard_stays() -> None:
    with pytest.raises(ScenarioError, match="take ttt_steps out"):
        load_scenario(
            "default", knobs=["ttt_steps"],
            devices=[{"experts": list(range(32))}, {"experts": list(range(32, 64))}],
        )  # fmt: skip
    with pytest.raises(ScenarioError, match="cannot be off"):
        load_scenario("default", adaptation={"method": "head", "group": "head", "guard": False})
    with pytest.raises(ScenarioError, match="both 'head' or neither"):
        load_scenario("default", adaptation={"method": "head", "group": "norms"})
    with pytest.raises(ScenarioError, match="not for task"):
        load_scenario("default", adaptation={"method": "tent", "group": "router"})
