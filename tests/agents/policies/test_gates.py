"""Gates as policies: against one gate asked in order, and on episodes of the twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.play.rollout import play_twin
from agents.policies.gates import GATES, GateConfig, Gated, load_gate_config
from agents.policies.policy import ConstantPolicy, RandomPolicy
from agents.policies.registry import POLICIES, make_policy
from agents.tuning import gates as tune_gates
from agents.tuning.gates import BOUNDS
from agents.tuning.rules import mean_return, search
from moe.profiles import save_profile
from moe.service.gates import Observed
from moe.workload import KNOB_NAMES
from tests.thermoe_env.conftest import make_profile
from thermoe_env.errors import ScenarioError
from thermoe_env.mdp.fields import FIELD_NAMES, Ranges, ranges_of
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

SEEDS = [3, 11, 2**40]
TTT = KNOB_NAMES.index("ttt_steps")
CONFIG = GateConfig(
    every=3, entropy_above=0.2, change_threshold=0.1, change_tolerance=0.01, adapt_for=2, shift_threshold=0.1,
    shift_tolerance=0.01, shift_for=2,
)  # fmt: skip
Seen = tuple[float, float, int]
"""Confidence, entropy, number of the stage; no confidence where nothing was answered."""


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    path = tmp_path_factory.mktemp("profile") / "made-up.json"
    save_profile(make_profile(), path)
    # Stages other than NOMINAL come with any load.
    scenario = load_scenario("vision", profile=str(path), episode_s=40, limits={"temperature_c": 50.0})
    return Problem.of(scenario)


def observation(ranges: Ranges, rows: list[Seen]) -> np.ndarray:
    """Observations [n, fields] that hold these values, the others in the middle of their range."""
    out = np.zeros((len(rows), len(FIELD_NAMES)), np.float32)
    for column, name in enumerate(FIELD_NAMES):
        if name in ("confidence", "entropy", "stage"):
            values = np.array([row[("confidence", "entropy", "stage").index(name)] for row in rows])
            low, high = ranges.low[column], ranges.high[column]
            out[:, column] = np.clip(2.0 * (values - low) / (high - low) - 1.0, -1.0, 1.0)
    return out


def decisions(policy: Gated, courses: list[list[Seen]], starts: np.ndarray | None = None) -> np.ndarray:
    """Where a policy adapts, bool [T, n], on n environments' courses."""
    state, result = None, []
    for t, rows in enumerate(zip(*courses, strict=True)):
        start = np.full(len(courses), t == 0) if starts is None else starts[t]
        action, state = policy.predict(observation(policy._ranges, list(rows)), state, start)
        result.append(action[:, policy._column] > 0)
    return np.array(result)


def gated(problem: Problem, rule: str, config: GateConfig = CONFIG) -> Gated:
    return Gated(problem, ConstantPolicy(problem.knobs.action()), rule, config)


SEEN = st.tuples(st.floats(0.45, 1.0), st.floats(0.0, 0.6), st.integers(0, 3))
COURSES = st.integers(1, 12).flatmap(
    lambda t: st.lists(st.lists(SEEN, min_size=t, max_size=t), min_size=1, max_size=4)
)


@settings(max_examples=30)
@given(COURSES)
@pytest.mark.parametrize("rule", GATES)
def test_a_batch_decides_as_one_gate_asked_in_order(
    problem: Problem, rule: str, courses: list[list[Seen]]
) -> None:
    together = decisions(gated(problem, rule), courses)
    for i, course in enumerate(courses):
        gate = GATES[rule](CONFIG)
        for t, seen in enumerate(course):
            ranges = ranges_of(problem)
            value = observation(ranges, [seen])[0].astype(np.float64)  # rounded as the policy sees it
            confidence, entropy = (
                ranges.low[k] + (value[k] + 1.0) / 2.0 * (ranges.high[k] - ranges.low[k])
                for k in (FIELD_NAMES.index("confidence"), FIELD_NAMES.index("entropy"))
            )
            assert together[t, i] == gate.decide(Observed(entropy, confidence, STAGES[seen[2]]))


def test_a_new_episode_starts_with_a_new_gate(problem: Problem) -> None:
    sure, unsure = (0.95, 0.05, 0), (0.6, 0.4, 0)
    course = [
        sure,
        sure,
        sure,
        unsure,
        sure,
        sure,
    ]  # start and drop make the gate adapt in two intervals each
    starts = np.zeros((6, 2), bool)
    starts[0] = True
    assert decisions(gated(problem, "change"), [course] * 2, starts).T.tolist() == [[1, 1, 0, 1, 1, 0]] * 2
    starts[4, 1] = True
    assert decisions(gated(problem, "change"), [course] * 2, starts).T.tolist() == [
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 1, 1, 1],
    ]
    starts[1, 0] = True  # the first of every three intervals anew
    assert decisions(gated(problem, "periodic"), [course] * 2, starts).T.tolist() == [
        [1, 1, 0, 0, 1, 0],
        [1, 0, 0, 1, 1, 0],
    ]


def test_an_interval_without_answers_is_not_shown(problem: Problem) -> None:
    sure, nothing, unsure = (0.95, 0.05, 0), (0.0, 0.0, 0), (0.6, 0.4, 0)
    course = [nothing, sure, nothing, sure, sure, unsure, nothing, sure]
    # Nothing answered would look like the least confidence there is.
    assert decisions(gated(problem, "change"), [course])[:, 0].tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    assert decisions(gated(problem, "entropy"), [course])[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert decisions(gated(problem, "periodic"), [course])[:, 0].tolist() == [1, 1, 1, 0, 0, 1, 1, 0]
    assert decisions(gated(problem, "always"), [course]).all()
    assert not decisions(gated(problem, "never"), [course]).any()


@pytest.mark.parametrize("base", ["static", "rule_based", "random"])
def test_the_other_knobs_are_the_base_policys(problem: Problem, base: str) -> None:
    make = (
        (lambda: RandomPolicy(problem.knobs.nvec, 7))
        if base == "random"
        else lambda: make_policy(base, problem)
    )
    rows = [(0.9, 0.1, 0), (0.5, 0.5, 3), (0.0, 0.0, 1)]
    column = problem.knobs.controlled.index("ttt_steps")
    own, under = make(), Gated(problem, make(), "always", replace(CONFIG, steps=2))
    own_state, state, seen = None, None, observation(ranges_of(problem), rows)
    for _ in range(5):
        expected, own_state = own.predict(seen, own_state)
        action, state = under.predict(seen, state)
        assert (action[:, column] == 2).all()
        np.testing.assert_array_equal(np.delete(action, column, axis=1), np.delete(expected, column, axis=1))


def test_always_adapts_in_every_interval_and_never_in_none(problem: Problem) -> None:
    for base in ("rule_based", "static"):
        config = replace(CONFIG, base=base)
        gates = {rule: Gated(problem, POLICIES[base](problem), rule, config) for rule in ("always", "never")}
        level = {rule: play_twin(problem, gate, SEEDS).index[..., TTT] for rule, gate in gates.items()}
        assert (level["always"] == 1).all() and (level["never"] == 0).all()


@pytest.mark.parametrize(("base", "limit_c"), [("rule_based", 54.0), ("static", 62.0)])
def test_thermal_adapts_in_nominal_alone_and_only_where_change_would(
    problem: Problem, base: str, limit_c: float
) -> None:
    changes = {"limits": {"temperature_c": limit_c}, "traffic": {"shift_dwell_s": 6.0}, "episode_s": 90}
    problem = Problem.of(load_scenario(problem.scenario, **changes))
    config = replace(CONFIG, change_threshold=0.001, change_tolerance=0.0, adapt_for=5)
    recording = play_twin(problem, Gated(problem, POLICIES[base](problem), "thermal", config), SEEDS)
    adapts = recording.index[..., TTT] > 0
    stage = recording.field("stage").round()
    assert adapts.any()
    assert not adapts[1:][stage[:-1] > 0].any()
    courses = [
        list(zip(*(recording.field(name)[:, i] for name in ("confidence", "entropy", "stage")), strict=True))
        for i in range(len(SEEDS))
    ]
    wanted = decisions(gated(problem, "change", config), courses)[:-1]
    assert (wanted & (stage[:-1] > 0)).any()
    np.testing.assert_array_equal(adapts[1:], wanted & (stage[:-1] == 0))


def test_shift_sees_what_shows_in_entropy_alone(problem: Problem) -> None:
    before, after = (0.9, 0.1, 0), (0.9, 0.4, 0)
    course = [before] * 5 + [after] * 5
    assert np.flatnonzero(decisions(gated(problem, "change"), [course])).tolist() == [0, 1]
    assert np.flatnonzero(decisions(gated(problem, "shift"), [course])).tolist() == [0, 1, 5, 6]


@pytest.mark.usefixtures("own_cache")
def test_every_gate_is_a_policy_by_name_with_the_shipped_settings(problem: Problem) -> None:
    assert {name for name in POLICIES if name.startswith("gate-")} == {f"gate-{rule}" for rule in GATES}
    config, bases = load_gate_config(), {"shift": "best_constant"}
    for rule in GATES:
        named = play_twin(problem, make_policy(f"gate-{rule}", problem), SEEDS[:2])
        built = Gated(problem, make_policy(bases.get(rule, "rule_based"), problem), rule, config)
        np.testing.assert_array_equal(named.index, play_twin(problem, built, SEEDS[:2]).index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"entropy_above": 1.5}, "above must be within"),
        ({"change_threshold": 0.0}, "threshold must be positive"),
        ({"shift_threshold": 0.0}, "threshold must be positive"),
        ({"shift_base": "mpc"}, "best_constant"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"base": "gate-always"}, "rule_based"),
        ({"evry": 3}, "known keys"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(ScenarioError, match=message):
        load_gate_config(path)


def test_a_problem_without_the_knob_is_refused(problem: Problem) -> None:
    without = Problem.of(replace(problem.scenario, knobs=("batch_size",)))
    with pytest.raises(ValueError, match="control ttt_steps"):
        gated(without, "always")
    with pytest.raises(ValueError, match="0 or 5"):
        gated(problem, "always", replace(CONFIG, steps=5))
    with pytest.raises(ValueError, match=r"unknown gate 'allways'.*always"):
        gated(problem, "allways")


def test_the_search_finds_a_maximum_and_keeps_whole_numbers() -> None:
    def value(config: GateConfig) -> float:
        return -((config.adapt_for - 17) ** 2) - (100.0 * (config.change_threshold - 0.3)) ** 2

    found, best = search(CONFIG, BOUNDS["change"], value, trials=600, seed=0)
    assert found.adapt_for == 17 and isinstance(found.adapt_for, int)
    assert found.change_threshold == pytest.approx(0.3, abs=0.02)
    assert best == pytest.approx(value(found)) and found.every == CONFIG.every


def test_a_search_of_one_gate_leaves_the_others_as_shipped(
    short_scenario: str, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_gates, "TUNING_SEEDS", (1, 2))
    config = tune_gates.TuneConfig(rules=("shift",), scenario=short_scenario, trials=5)
    found, returns = tune_gates.tune(config)
    shipped = load_gate_config()
    assert replace(found, **{name: getattr(shipped, name) for name in BOUNDS["shift"]}) == shipped
    problem = Problem.of(load_scenario(short_scenario))
    policy = Gated(problem, make_policy("best_constant", problem), "shift", found)
    assert returns == {"shift": mean_return(problem, policy, (1, 2))}
    with pytest.raises(ValueError, match=r"rules must be of.*'periodic'"):
        tune_gates.TuneConfig(rules=("always",))
