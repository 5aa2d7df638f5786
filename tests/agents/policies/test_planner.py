"""The planner against the twin's own next intervals, what a belief knows, and forecasts against the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agents.play.rollout import Recording, play_live, play_twin
from agents.policies.belief import Belief, MpcConfig, without_luck
from agents.policies.mpc import Mpc
from agents.policies.planner import Oracle, PlanConfig, Planner
from agents.policies.policy import Policy, RandomPolicy, for_episodes
from agents.policies.registry import make_policy
from moe.profiles import save_profile
from moe.service.queueing import SLOT_S
from moe.workload import KNOB_NAMES
from tests.thermoe_env.conftest import make_profile
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.fields import FIELDS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.twin.core import TwinBatch

SEEDS = [3, 11, 2**40]
STEPS = 40
SHORT = PlanConfig(blocks=(1, 2, 4), rounds=3)
SHORT_MPC = MpcConfig(blocks=(1, 2, 4), rounds=3)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    path = tmp_path_factory.mktemp("profile") / "made-up.json"
    save_profile(make_profile(), path)
    return Problem.of(load_scenario("vision", profile=str(path), episode_s=STEPS))


@pytest.fixture(scope="module")
def played(problem: Problem) -> dict[str, Recording]:
    policies: dict[str, Policy] = {"oracle": Oracle(problem, SHORT), "mpc": Mpc(problem, SHORT_MPC)}
    return {name: play_twin(problem, policy, SEEDS, name) for name, policy in policies.items()}


def on_the_way(problem: Problem, steps: int) -> tuple[TwinBatch, Any]:
    """Twins after some intervals of chance, and what chance does next."""
    twins = TwinBatch(problem, len(SEEDS))
    twins.reset(SEEDS)
    chance = RandomPolicy(problem.knobs.nvec, seed=1)
    nothing = np.zeros((len(SEEDS), 1))
    for _ in range(steps):
        twins.step(problem.knobs.indices(chance.predict(nothing)[0], "multi_discrete"))
    return twins, lambda: chance.predict(nothing)[0]


@pytest.mark.parametrize("steps", [0, 17, STEPS - 3])
def test_perfect_knowledge_predicts_the_next_intervals(problem: Problem, steps: int) -> None:
    """Bit for bit, and no further than the episode's end."""
    twins, chance = on_the_way(problem, steps)
    planner = Planner(problem, SHORT)
    plans = np.stack([chance() for _ in SHORT.blocks], axis=1)  # [n, blocks, controlled]
    copies = planner.copies
    promised = [
        planner.returns(twins, row, np.tile(plan, (copies, 1, 1)))[0] for row, plan in enumerate(plans)
    ]
    total = np.zeros(len(SEEDS))
    for t in range(min(planner.horizon, STEPS - steps)):
        action = plans[:, np.searchsorted(np.cumsum(SHORT.blocks), t, side="right")]
        total += twins.step(problem.knobs.indices(action, "multi_discrete")).reward
    np.testing.assert_array_equal(promised, total)


def test_search_never_makes_a_plan_worse(problem: Problem) -> None:
    twins, chance = on_the_way(problem, 9)
    planner = Planner(problem, SHORT)
    for row in range(len(SEEDS)):
        plan = np.stack([chance()[row] for _ in SHORT.blocks])
        better = planner.improved(twins, row, plan)
        value, base = (
            planner.returns(twins, row, np.tile(p, (planner.copies, 1, 1)))[0] for p in (better, plan)
        )
        assert value >= base
        assert ((better >= 0) & (better < problem.knobs.nvec)).all()


def test_a_plan_moves_on_by_an_interval(problem: Problem) -> None:
    planner = Planner(problem, SHORT)
    plan = np.arange(len(SHORT.blocks))[:, None].repeat(len(problem.knobs.nvec), 1)
    # Actions 0 1 1 2 2 2 2 become 1 1 2 2 2 2 2, and blocks of 1, 2 and 4 begin at 0, 1 and 3.
    np.testing.assert_array_equal(planner.later(plan)[:, 0], [1, 1, 2])


def test_a_belief_of_a_card_without_a_memory_sensor_does_not_go_by_the_field_that_stands_for_it(
    problem: Problem,
) -> None:
    twin = problem.twin
    for missing, alike in (((), False), (("mem_temp_c",), True)):
        own = replace(problem, twin=replace(twin, provenance={**twin.provenance, "missing": missing}))
        twins = TwinBatch(own, 1)
        first = twins.reset(SEEDS[:1])[0].copy()
        seen = twins.step(np.zeros((1, len(KNOB_NAMES)), np.int64)).observation[0]
        hotter = seen.copy()
        hotter[[field.name for field in FIELDS].index("mem_temp_c")] += 0.2
        nodes = []
        for observation in (seen, hotter):
            belief = Belief(without_luck(own), MpcConfig(), first)
            belief.follow(observation)
            nodes.append(belief.state.devices["sink_c"][0])
        assert (nodes[0] == nodes[1]).all() == alike


@pytest.mark.parametrize(
    "acts",
    [{"slowdown": {"duty": 0.6, "recover_c": 3.0}}, {"alarm": {"drain_s": 5.0}}],
    ids=["slowdown", "alarm"],
)
def test_a_belief_knows_what_limits_hold_and_for_how_long(problem: Problem, acts: dict[str, Any]) -> None:
    brake = {"grace_s": 4.0, "duty": 0.3, "hold_s": 4.0}
    overrides = {
        "limits": {"temperature_c": 54.0, **acts},
        "power_budget": {"event_w": [330.0, 390.0], "gap_s": [2.0, 5.0], "brake": brake},
        "traffic": {"low_load": 0.8, "high_load": 1.5},
    }
    held = Problem.of(load_scenario(problem.scenario, **overrides))
    twins, chance = TwinBatch(held, 1), RandomPolicy(held.knobs.nvec, seed=4)
    seen = twins.reset(SEEDS[:1])
    belief, met = Belief(without_luck(held), MpcConfig(), seen[0]), set()
    for _ in range(STEPS - 1):
        seen = twins.step(held.knobs.indices(chance.predict(seen)[0], "multi_discrete")).observation
        belief.follow(seen[0])
        true, own = twins.state.track[0], belief.state.track[0]
        if true["drain_left_s"] == 0.0:  # a drain hides what else may hold
            for name in ("brake_left_s", "at_limit"):
                assert own[name] == true[name], name
            assert own["duty"] == pytest.approx(true["duty"], abs=1e-6)
        assert own["over_budget_j"] == pytest.approx(true["over_budget_j"], rel=1e-3)
        assert own["drain_left_s"] == true["drain_left_s"]
        names = ("brake_left_s", "over_budget_j", "at_limit", "drain_left_s")
        met |= {name for name in names if true[name] > 0.0}
    assert met == {"brake_left_s", "over_budget_j", "at_limit"} | (
        {"drain_left_s"} if "alarm" in acts else set()
    )


def test_a_belief_knows_the_queue_the_shift_and_the_adaptation(problem: Problem) -> None:
    chance = RandomPolicy(problem.knobs.nvec, seed=2)
    twins = TwinBatch(problem, len(SEEDS))
    first = twins.reset(SEEDS)
    beliefs = [Belief(without_luck(problem), MpcConfig(), row) for row in first]
    right, off_weights, off_waiting, off_debt = [], [], [], []
    for t in range(STEPS - 1):
        seen = twins.step(problem.knobs.indices(chance.predict(first)[0], "multi_discrete")).observation
        for i, belief in enumerate(beliefs):
            belief.follow(seen[i])
            true, own = twins.state, belief.state
            right.append(belief.shift == int(twins.work["shift_id"][i]))
            off_weights.append(np.abs(belief.twins.servers.weights[0] - twins.servers.weights[i]).max())
            slot = round((t + 1) * problem.scenario.interval_s / SLOT_S)
            for c, waits in enumerate(twins.work["waiting"][i]):
                waiting = own.arrivals[0, c, slot] - belief.twins.servers.server["next"][0, c]
                if waits < (1.0, 30.0)[c] * problem.capacity_rps:  # where the observation ends
                    off_waiting.append(abs(waiting - waits))
            off_debt.append(abs(own.track["quality_debt"][0] - true.track["quality_debt"][i]))
            notice = round(problem.scenario.power_budget.notice_s)
            change = until_change(true.announced[i, 0], t + 1, notice)
            np.testing.assert_allclose(
                own.announced[0, 0, t + 1 : t + 1 + change],
                true.announced[i, 0, t + 1 : t + 1 + change],
                atol=0.1,
            )
    assert np.mean(right) > 0.75  # some answers look alike under two shifts
    assert np.median(off_weights) < 0.1
    assert max(off_waiting) <= 1.0  # the observation is rounded
    answered = problem.capacity_rps * STEPS
    assert np.median(off_debt) < 0.05 * answered


def until_change(budget_w: np.ndarray, step: int, notice: int) -> int:
    """Intervals until the budget changes; the notice if it does not within it."""
    ahead = budget_w[step : step + notice + 1]
    different = np.flatnonzero(ahead != ahead[0])
    return int(different[0]) if len(different) else notice


def test_same_seed_same_actions(problem: Problem, played: dict[str, Recording]) -> None:
    for name, policy in (("oracle", Oracle(problem, SHORT)), ("mpc", Mpc(problem, SHORT_MPC))):
        again = play_twin(problem, policy, SEEDS[:1], name)
        np.testing.assert_array_equal(again.index[:, 0], played[name].index[:, 0])


def test_mpc_plans_with_modelled_energies_where_none_were_measured(problem: Problem) -> None:
    """As live on a CPU: the same plans as on a profile that holds those energies."""
    bare = replace(problem.profile, energy_j=None, idle_power_w=None, ttt_energy_j=None)
    unmetered = replace(problem, profile=bare)
    metered = replace(problem, profile=unmetered.metered_profile)
    plain, given = (play_twin(metered, Mpc(own, SHORT_MPC), SEEDS[:1], "mpc") for own in (unmetered, metered))
    np.testing.assert_array_equal(plain.index, given.index)
    assert len(np.unique(plain.index[:, 0], axis=0)) > 1  # it plans, and does not stay as it began


def test_mpc_goes_by_observations_alone(problem: Problem, played: dict[str, Recording]) -> None:
    """Told the observations of an episode, it decides again what it decided."""
    recording, policy = played["mpc"], Mpc(problem, SHORT_MPC)
    twins = TwinBatch(problem, len(SEEDS))
    seen, state, start = twins.reset(SEEDS), None, np.ones(len(SEEDS), bool)
    for t in range(12):
        action, state = policy.predict(seen, state, start)
        np.testing.assert_array_equal(problem.knobs.indices(action, "multi_discrete"), recording.index[t])
        seen, start = recording.observation[t], np.zeros(len(SEEDS), bool)


def test_the_future_is_worth_something(problem: Problem, played: dict[str, Recording]) -> None:
    returns = {name: recording.reward.sum(0).mean() for name, recording in played.items()}
    static = play_twin(problem, make_policy("static", problem), SEEDS).reward.sum(0).mean()
    assert returns["oracle"] >= returns["mpc"] > static


def test_oracle_plays_a_single_twin_and_refuses_the_rest(
    problem: Problem, played: dict[str, Recording]
) -> None:
    oracle = Oracle(problem, SHORT)
    env = ThermalMoEEnv(problem.scenario, "twin")
    np.testing.assert_array_equal(
        play_live(env, oracle, SEEDS[1], "oracle").index[:, 0], played["oracle"].index[:, 1]
    )
    with pytest.raises(ValueError, match=r"which world 'live' does not have.*`mpc`"):
        for_episodes(oracle, SEEDS, "live")
    with pytest.raises(ValueError, match="must know its episodes"):
        oracle.predict(np.zeros((1, 1), np.float32))
    other, stranger = TwinBatch(problem, 1), oracle.for_seeds([6])
    action, state = stranger.predict(other.reset([5]), None, np.ones(1, bool))  # all begin alike
    seen = other.step(problem.knobs.indices(action, "multi_discrete")).observation
    with pytest.raises(ValueError, match="not those that are played"):
        stranger.predict(seen, state, np.zeros(1, bool))
    static = make_policy("static", problem)
    assert for_episodes(static, SEEDS, "live") is static


def test_what_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks need at least one length"):
        PlanConfig(blocks=())
    with pytest.raises(ValueError, match="must be above 0"):
        MpcConfig(load_memory_s=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        MpcConfig(rounds=0)
