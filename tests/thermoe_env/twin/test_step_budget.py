"""The energy budget of adaptation in the twin and in the live service: one rule, and nothing lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import ttt
from moe.model.config import model_config
from moe.model.transformer import MoEModel, initialise
from moe.service.budget import EnergyBudget, StepBudget
from moe.service.score.live import LiveWorkload
from moe.service.score.runner import BatchResult, Runner
from moe.workload import Knobs
from tests.moe.service.made_up import CAPACITY_RPS, Clock, Service
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import ScenarioError
from thermoe_env.mdp.fields import ranges_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import AdaptationConfig, Scenario, StepBudgetConfig, load_scenario
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.workload import TwinWorkload

STEP_J = 5.0  # of the made-up profile
SECONDS = 8


def with_budget(problem: Problem, load: float = 0.6, **budget: float) -> Problem:
    """The problem with a steady load and a budget."""
    traffic = {"kind": "poisson", "low_load": load, "high_load": load}
    adaptation = {"budget": {"window_s": 2.0, **budget}}
    return Problem.of(load_scenario(problem.scenario, adaptation=adaptation, traffic=traffic, episode_s=12))


def knobs_of(problem: Problem, batch: int, experts: int, steps: int, pace: float = 1.0) -> Knobs:
    levels = problem.knobs.levels
    return Knobs(
        batch_size=int(levels["batch_size"][batch]),
        expert_count=int(levels["expert_count"][experts]),
        ttt_steps=steps,
        pace=pace,
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    load=st.floats(0.02, 1.5),
    fraction=st.floats(0.001, 0.8),
    bank_windows=st.integers(0, 3),
    seconds=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2)),
        min_size=SECONDS,
        max_size=SECONDS,
    ),
)
def test_every_joule_is_somewhere(problem: Problem, seed, load, fraction, bank_windows, seconds) -> None:
    """Earned is the fraction of what serving took; what is not charged or expired is in the bank."""
    budgeted = with_budget(problem, load, fraction=fraction, bank_windows=bank_windows)
    workload = TwinWorkload(budgeted, lambda: 1.0)
    workload.reset(seed)
    launched_j, steps = 0.0, 0.0
    for setting in seconds:
        knobs = knobs_of(budgeted, *setting)
        stats = workload.run(knobs, 1.0)
        assert stats.ttt_steps + stats.ttt_refused == stats.batches * knobs.ttt_steps
        assert 0.0 <= stats.budget_share <= 1.0
        assert stats.slot_energy_j is not None
        launched_j += stats.slot_energy_j.sum()
        steps += stats.ttt_steps
        purse = EnergyBudget.of(workload.state.purse[0])
        assert purse.balance_j + purse.charged_j + purse.expired_j == pytest.approx(purse.earned_j, abs=1e-6)
        assert purse.charged_j == pytest.approx(steps * STEP_J, rel=1e-9, abs=1e-9)
        assert purse.balance_j >= 0.0
    launched_j += float(workload.state.server[0]["tail_s"] * workload.state.server[0]["tail_power_w"])
    assert purse.earned_j == pytest.approx(fraction * (launched_j - purse.charged_j), rel=1e-6, abs=1e-6)


def test_a_refused_step_leaves_the_twin_s_weights_bit_for_bit(problem: Problem) -> None:
    workload = TwinWorkload(with_budget(problem, fraction=1e-6), lambda: 1.0)
    workload.reset(1)
    fresh, asked = workload.state.weights.copy(), 0.0
    for _ in range(SECONDS):
        stats = workload.run(knobs_of(problem, 3, 2, 2), 1.0)
        assert stats.ttt_steps == 0.0 and stats.ttt_busy_s == 0.0
        asked += stats.ttt_refused
    assert asked > 0.0
    assert np.array_equal(workload.state.weights, fresh)


def test_a_budget_that_pays_for_all_is_as_good_as_none(problem: Problem) -> None:
    """Batch by batch, as a budget needs it, or batches alike at once: the same service."""
    unlimited = with_budget(problem, fraction=1.0)
    unlimited = Problem.of(load_scenario(unlimited.scenario, adaptation={"budget": None}))
    rich = TwinWorkload(with_budget(problem, fraction=1e3), lambda: 1.0)
    free = TwinWorkload(unlimited, lambda: 1.0)
    for workload in (rich, free):
        workload.reset(4)
    sums = np.zeros((2, 4))
    for _ in range(SECONDS):
        for row, workload in enumerate((rich, free)):
            stats = workload.run(knobs_of(problem, 2, 2, 1), 1.0)
            answered = sum(stats.answered)
            assert stats.slot_energy_j is not None and stats.ttt_refused == 0.0
            sums[row] += stats.ttt_steps, answered, stats.slot_energy_j.sum(), stats.busy_s
    assert sums[0] == pytest.approx(sums[1], rel=0.01)


class AsProfiled:
    """A device that takes as long as the profile says."""

    samples, adapts, n_experts = SimpleNamespace(shifts=("clean",) * 4), True, 8
    adapter = SimpleNamespace(smallest_batch=2)

    def __init__(self, problem: Problem, clock: Clock) -> None:
        self.profile, self.clock = problem.profile, clock

    def reset(self, seed: int) -> None:
        pass

    def launch(self, ranges: Any, shift: int, knobs: Knobs) -> Any:
        n, began = sum(last - first for first, last in ranges), self.clock()
        self.clock.sleep(self.profile.latency_at(n, knobs.expert_count, knobs.routing_bias))
        answered = self.clock()
        if knobs.ttt_steps:
            self.clock.sleep(knobs.ttt_steps * 0.015)  # of the made-up profile
        freed = self.clock()
        result = BatchResult(
            np.ones(n, bool), 0.5 * n, 0.5 * n, np.ones((4, 8), np.int64), answered - began,
            freed - answered, knobs.ttt_steps,
        )  # fmt: skip
        return SimpleNamespace(done=lambda: True, answered_at=answered, freed_at=freed, result=lambda: result)


@pytest.mark.parametrize(("fraction", "batch"), [(0.03, 2), (0.1, 3), (0.2, 1), (0.05, 4)])
def test_twin_and_live_service_pay_for_the_same_steps(problem: Problem, fraction: float, batch: int) -> None:
    """Each on its own way through the same requests; a batch may fall on either side of an interval's end."""
    budgeted, clock = with_budget(problem, 0.5, fraction=fraction, bank_windows=1), Clock()
    twin = TwinWorkload(budgeted, lambda: 1.0)
    budget = budgeted.step_budget()
    assert budget is not None
    runner: Any = AsProfiled(budgeted, clock)
    live = LiveWorkload(
        runner, budgeted.scenario.traffic, budgeted.capacity_rps, 13, budgeted.scenario.service,
        budget=budget, clock=clock, sleep=clock.sleep,
    )  # fmt: skip
    knobs = knobs_of(budgeted, batch, 2, 2)
    counts = {"twin": np.zeros(3), "live": np.zeros(3)}
    for name, workload in (("twin", twin), ("live", live)):
        workload.reset(7)
        for _ in range(SECONDS):
            stats = workload.run(knobs, 1.0)
            counts[name] += stats.ttt_steps, stats.ttt_refused, stats.batches
    assert counts["twin"].min() > 0
    np.testing.assert_allclose(counts["live"], counts["twin"], rtol=0.01, atol=2)
    assert counts["live"][:2].sum() == 2 * counts["live"][2]
    mine, own = EnergyBudget.of(twin.state.purse[0]), budget.energy
    assert own.earned_j == pytest.approx(mine.earned_j, rel=0.02)
    assert own.charged_j == pytest.approx(STEP_J * counts["live"][0])


class Pool:
    task, shifts = "vision", ("clean",)

    def __len__(self) -> int:
        return 64

    def take(self, shift: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (index[:, None, None] % 256).expand(-1, 28, 28).byte(), index % 10


@pytest.mark.parametrize("guard", [None, ttt.GuardSettings()])
def test_a_refused_step_leaves_the_live_model_bit_for_bit(problem: Problem, guard) -> None:
    """Parameters, statistics, optimizer and averages, with a first step that was paid for behind them."""
    model = initialise(MoEModel(model_config("vision", "tiny")), torch.Generator().manual_seed(0)).eval()
    adapter, pool = ttt.Adapter(model, ttt.Eata(entropy_margin=1.0), guard=guard), Pool()
    clock = Clock()
    energy = EnergyBudget(window_s=100.0, initial_j=2.5)
    live = LiveWorkload(
        Runner(model, pool, "cpu", clock, adapter),  # pyright: ignore[reportArgumentType]
        load_scenario(problem.scenario, traffic={"shifts": [0], "kind": "poisson"}).traffic,
        CAPACITY_RPS, 12, Service(), budget=StepBudget(energy, lambda n, knobs: (0.0, 1.0)), clock=clock,
        sleep=clock.sleep,
    )  # fmt: skip
    live.reset(0)
    first = live.run(Knobs(batch_size=8, expert_count=2, ttt_steps=1), 0.1)
    assert first.ttt_steps + first.ttt_left_out == 2 and first.ttt_refused > 0
    saved = adapter.snapshot()
    second = live.run(Knobs(batch_size=8, expert_count=2, ttt_steps=2), 0.5)
    assert second.ttt_steps == second.ttt_left_out == 0
    assert second.ttt_refused == 2 * second.batches > 0
    now = adapter.snapshot()
    assert energy.balance_j == 0.5 and second.budget_share == 1.0
    for before, after in ((saved.parameters, now.parameters), (saved.statistics, now.statistics)):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert saved.averages.keys() == now.averages.keys() == {"probabilities"}
    assert torch.equal(saved.averages["probabilities"], now.averages["probabilities"])
    assert saved.optimizer is not None and now.optimizer is not None
    for i, memory in saved.optimizer["state"].items():
        assert torch.equal(memory["momentum_buffer"], now.optimizer["state"][i]["momentum_buffer"])
    live.reset(0)
    assert energy.balance_j == 2.5 and energy.refused == 0


def test_a_budget_is_the_same_alone_in_a_batch_and_twice(problem: Problem) -> None:
    """Two episodes of the same seed, bit for bit, and with what the policy sees of the budget."""
    budgeted = with_budget(problem, fraction=0.05)
    batch, env = TwinBatch(budgeted, 3), ThermalMoEEnv(budgeted.scenario, world="twin")
    rng = np.random.default_rng(0)
    actions = rng.integers(0, budgeted.knobs.nvec, (budgeted.scenario.steps, len(budgeted.knobs.nvec)))
    actions[:, 3] = 2
    runs = []
    for _ in range(2):
        rows = [env.reset(seed=6)[0]]
        infos: list[Any] = []
        for action in actions:
            observation, *_, info = env.step(action)
            rows.append(observation)
            infos.append(info["work"])
        runs.append(np.array(rows))
    assert np.array_equal(*runs)
    seen = [batch.reset([5, 6, 9])[1]]
    for action in actions:
        step = batch.step(budgeted.knobs.indices(np.tile(action, (3, 1)), "multi_discrete"))
        seen.append((step.final_observation if step.truncated[1] else step.observation)[1].copy())
    assert np.array_equal(np.array(seen), runs[0])
    shown = ranges_of(budgeted).decode(runs[0])
    assert shown["ttt_budget"][0] == 0.0
    assert shown["ttt_budget"][1:] == pytest.approx([work["budget_share"] for work in infos], abs=1e-6)
    refused = [w["ttt_refused"] / max(1.0, w["ttt_refused"] + w["ttt_steps"]) for w in infos]
    assert shown["ttt_refused_share"][1:] == pytest.approx(refused, abs=1e-6)
    assert 0.0 < max(refused) and len(set(shown["ttt_budget"])) > 3
    assert {work["ttt_left_out"] + work["ttt_rolled_back"] for work in infos} == {0.0}


def test_without_a_budget_the_share_is_whole(problem: Problem) -> None:
    env = ThermalMoEEnv(problem.scenario, world="twin")
    shown = ranges_of(problem).decode(
        np.array([env.reset(seed=0)[0], env.step(env.action_space.sample())[0]])
    )
    assert shown["ttt_budget"].tolist() == [1.0, 1.0] and shown["ttt_refused_share"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("adaptation", "message"),
    [
        ({"method": "prayer"}, "adaptation.method.*tent"),
        ({"group": "all"}, "adaptation.group.*last_block"),
        ({"method": "dynamic_evaluation"}, "not for task 'vision'.*tent"),
        ({"budget": {"fraction": 0.0}}, "budget.fraction: .*greater than 0, got 0.0"),
        ({"budget": {"fraction": float("nan")}}, "budget.fraction: .*finite number, got nan"),
        ({"budget": {"window_s": -1.0}}, "budget.window_s: .*greater than or equal to 0.1, got -1.0"),
        ({"budget": {"window_s": 0.0}}, "budget.window_s: .*greater than or equal to 0.1, got 0.0"),
        ({"budget": {"bank_windows": -1}}, "bank_windows: .*greater than or equal to 0, got -1"),
        ({"budget": {"joules": 1.0}}, r"joules.*known keys: \['bank_windows', 'fraction', 'window_s'\]"),
        ({"guards": True}, r"guards.*known keys: \['budget'"),
    ],
)
def test_a_section_that_means_nothing_is_refused(problem: Problem, adaptation, message) -> None:
    with pytest.raises(ScenarioError, match=f"(?s){message}"):
        load_scenario(problem.scenario, adaptation=adaptation)


def test_the_dataclasses_check_themselves() -> None:
    with pytest.raises(ValueError, match=r"(?s)AdaptationConfig.*method.*should be"):
        AdaptationConfig(method="prayer")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="window_s"):
        StepBudgetConfig(window_s=0.0)


def language(**adaptation: Any) -> Scenario:
    return load_scenario("language", adaptation=adaptation)


def test_what_was_not_measured_cannot_be_charged_or_played(problem: Problem) -> None:
    with pytest.raises(ScenarioError, match=r"'tent' is not for task 'language'.*dynamic_evaluation"):
        language(budget={})
    with pytest.raises(ScenarioError, match=r"measured no adaptation.*level 0"):
        Problem.of(language(method="dynamic_evaluation", budget={}))
    named = Problem.of(language(method="dynamic_evaluation"))
    assert named.knobs.levels["ttt_steps"] == (0.0,)
    with pytest.raises(ScenarioError, match=r"'eata', 'norms'.*measured with.*'tent', 'norms'.*live"):
        ThermalMoEEnv(load_scenario(problem.scenario, adaptation={"method": "eata"}), world="twin")
    with pytest.raises(ScenarioError, match="a budget charges what was measured"):
        Problem.of(load_scenario(problem.scenario, adaptation={"group": "router", "budget": {}}))
