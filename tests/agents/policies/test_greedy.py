"""Greedy against the next interval of the twin itself, under every action."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from agents.play.rollout import play_twin
from agents.policies.greedy import Greedy, GreedyConfig
from agents.policies.registry import make_policy
from moe.profiles import save_profile
from moe.service.queueing import SLOT_S
from tests.thermoe_env.conftest import make_profile
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

NO_LUCK = {"resistance": 0.0, "time_constant": 0.0, "leakage": 0.0, "energy": 0.0, "inlet_c": 0.0}
KNOBS = ["routing_bias", "batch_size", "expert_count", "pace", "sm_clock"]
WARM_UP = 3


def make_problem(folder: Path, knobs: list[str]) -> Problem:
    path = folder / "made-up.json"
    save_profile(make_profile(), path)
    overrides = {"profile": str(path), "knobs": knobs, "power_budget": {"brake": None}}
    return Problem.of(load_scenario("vision", randomize=NO_LUCK, **overrides))


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return make_problem(tmp_path_factory.mktemp("profile"), KNOBS)


def steady(
    problem: Problem, load: float, budget_w: float, shift: int, copies: int
) -> tuple[TwinBatch, np.ndarray]:
    """Twins under a load that does not vary, after some seconds of the static service; and what they show."""
    twins = TwinBatch(problem, copies)
    twins.reset(np.zeros(copies, np.uint64))
    state = twins.state
    per_slot = 0.5 * load * problem.capacity_rps * SLOT_S
    state.arrivals[:] = np.rint(np.arange(state.arrivals.shape[2]) * per_slot)
    state.shift[:], state.announced[:, 0], state.drift_c[:] = shift, budget_w, 0.0
    static = np.tile(np.array(problem.knobs.default_index), (copies, 1))
    seen = [twins.step(static).observation for _ in range(WARM_UP)]
    for debt in ("late_debt", "heat_debt_s", "quality_debt"):  # nothing is left of what promises allow
        state.track[debt] = 0.0
    return twins, seen[-1]


@pytest.mark.parametrize(("load", "shift"), list(itertools.product((0.1, 0.4, 0.8, 1.2), (0, 2))))
def test_best_next_interval(problem: Problem, load: float, shift: int) -> None:
    greedy = Greedy(problem, GreedyConfig(heat_margin_c=0.0))
    twins, seen = steady(problem, load, 700.0, shift, len(greedy.actions))
    predicted = greedy.predicted(seen[:1])[0]
    played = twins.step(problem.knobs.indices(greedy.actions, "multi_discrete")).reward
    chosen = int((greedy.actions == greedy.predict(seen[:1])[0]).all(1).argmax())
    assert chosen == int(predicted.argmax())
    assert played[chosen] >= played.max() - 0.12, (greedy.actions[chosen], greedy.actions[played.argmax()])
    # What keeps up with its queue in time is a matter of the profile alone.
    smooth = (twins.cost[:, 1] == 0.0) & (twins.raw["queue_interactive_s"] < 0.02)
    assert smooth.sum() > 10
    off = np.abs(predicted - played)[smooth]
    assert np.median(off) < 0.04 and np.quantile(off, 0.9) < 0.12  # 1 is the standard service's interval


def test_what_would_engage_the_brake_is_not_chosen(problem: Problem) -> None:
    brake = {"grace_s": 1.0, "duty": 0.3, "hold_s": 10.0}
    braked = Problem.of(load_scenario(problem.scenario, power_budget={"brake": brake}))
    chosen, engaged = [], []
    for of in (problem, braked):
        greedy = Greedy(of, GreedyConfig(heat_margin_c=0.0))
        _, seen = steady(problem, 0.8, 160.0, 0, len(greedy.actions))
        chosen.append(greedy.predict(seen[:1])[0])
        twins, _ = steady(braked, 0.8, 160.0, 0, 1)
        for name, value in (("brake_left_s", 0.0), ("over_budget_j", 0.0), ("duty", 1.0)):
            twins.state.track[name] = value
        twins.step(braked.knobs.indices(chosen[-1], "multi_discrete"))
        engaged.append(bool(twins.state.track["brake_left_s"][0]))
    assert engaged == [True, False]


@pytest.mark.parametrize("duty", [0.5, 0.9])
def test_the_next_interval_is_predicted_under_the_duty_that_a_brake_leaves(
    problem: Problem, duty: float
) -> None:
    brake = {"grace_s": 1.0, "duty": duty, "hold_s": 20.0}
    braked = Problem.of(
        load_scenario(problem.scenario, power_budget={"event_w": [140.0, 140.0], "brake": brake})
    )
    greedy = Greedy(braked, GreedyConfig(heat_margin_c=0.0))
    twins, seen = steady(braked, 0.3, 140.0, 0, len(greedy.actions))
    predicted = greedy.predicted(seen[:1])[0]
    played = twins.step(braked.knobs.indices(greedy.actions, "multi_discrete")).reward
    assert (twins.raw["duty"] == duty).all()
    smooth = (twins.cost[:, 1] == 0.0) & (twins.raw["queue_interactive_s"] < 0.02)
    assert smooth.sum() > 10
    assert np.median(np.abs(predicted - played)[smooth]) < 0.04
    paces = np.array([braked.knobs.levels["pace"][level] for level in greedy.actions[:, KNOBS.index("pace")]])
    full, capped = predicted[paces == 1.0], predicted[paces == 0.8]
    assert (full == capped).all() == (duty == 0.5)


def test_never_adapts_and_has_no_memory(tmp_path: Path) -> None:
    problem = make_problem(tmp_path, ["batch_size", "expert_count", "ttt_steps"])
    greedy = make_policy("greedy", problem)
    recording = play_twin(problem, greedy, [3, 4], "greedy")
    assert not recording.work["ttt_steps"].any()
    backwards = [greedy.predict(seen)[0] for seen in recording.observation[-2::-1]][::-1]
    index = [problem.knobs.indices(actions, "multi_discrete") for actions in backwards]
    np.testing.assert_array_equal(index, recording.index[1:])


def test_an_idle_service_does_not_look_best(problem: Problem) -> None:
    """Requests that wait beyond their deadline count, though nobody has answered them late yet."""
    greedy = Greedy(problem, GreedyConfig())
    _, seen = steady(problem, 1.2, 700.0, 0, 1)
    action = problem.knobs.indices(greedy.predict(seen)[0], "multi_discrete")[0]
    assert problem.knobs.knobs(action).pace == 1.0


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="load_margin must be above 0"):
        GreedyConfig(load_margin=0.0)
