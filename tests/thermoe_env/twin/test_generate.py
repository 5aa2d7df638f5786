"""The twin of the token service against the live service's own code over a modelled engine, step by step.

Both take the same requests at the same fitted costs, so what differs is the twin's means. Requests of the
reference have lengths of their own; runs are long enough that their mean is that of the trace within a
percent or two.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from moe.lm.text import DOMAINS, documents
from moe.service.generate.live import GenerateWorkload
from moe.service.generate.sequences import Texts
from moe.service.queueing import latency_quantile
from moe.step_cost import StepWork
from moe.workload import Knobs, WorkStats
from tests.thermoe_env.twin.token_engine import ModelledEngine
from thermoe_env.live_tokens import Promises
from thermoe_env.problem.problem import Problem, profile_of
from thermoe_env.problem.scenario import Scenario, load_scenario
from thermoe_env.problem.token_tables import TokenWork, mean_context, token_work
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.generate import generate_service
from thermoe_env.twin.workload import TwinWorkload

STANDARD = Knobs(batch_size=128, expert_count=8)


def scenario(load: float, seconds: int, **generate: Any) -> Scenario:
    return load_scenario(
        "default", episode_s=seconds, generate=generate, randomize={"steps": 0.0},
        traffic={"kind": "poisson", "low_load": load, "high_load": load, "shifts": [0]},
    )  # fmt: skip


@dataclass
class Reference:
    workload: GenerateWorkload
    engine: ModelledEngine

    def run(self, knobs: Knobs) -> tuple[WorkStats, float]:
        """An interval, and its joules."""
        before = self.engine.energy_j
        stats = self.workload.run(knobs, 1.0)
        return stats, self.engine.energy_j - before


def reference(problem: Problem, accuracy: float = 0.5) -> Reference:
    work, text = token_work(problem), documents()
    terms, promised = problem.scenario.service, problem.scenario.generate
    assert promised is not None
    engine = ModelledEngine(
        work.cost, work.profile.cost.config, text.tokens, lambda *_: accuracy, slots=work.slots,
        max_rows=work.max_rows, cache_positions=promised.cache_positions,
    )  # fmt: skip
    texts = Texts(text.tokens.astype(np.int32), np.ones((len(text.tokens), text.tokens.shape[1] - 1), bool))
    workload = GenerateWorkload(
        engine,  # type: ignore[arg-type]
        texts, text.domain, work.lengths, problem.scenario.traffic, problem.capacity_rps,
        problem.scenario.episode_s + 1,
        Promises(promised.ttft_s, promised.tpot_s, terms.deadline_s, terms.expire_after_s),
        clock=engine.clock, sleep=engine.sleep,
    )  # fmt: skip
    workload.reset(0)
    return Reference(workload, engine)


def twin(problem: Problem) -> TwinWorkload:
    workload = TwinWorkload(problem, lambda: 1.0)
    workload.reset(0)
    return workload


def joules_of(work: WorkStats) -> float:
    assert work.slot_energy_j is not None
    return float(work.slot_energy_j.sum())


def summed(played: list[tuple[WorkStats, float]]) -> dict[str, float]:
    stats = [work for work, _ in played]
    answered = np.array([sum(work.answered) for work in stats])
    of_all = max(1.0, answered.sum())
    return {
        "answered": float(answered.sum()),
        "output_tokens": sum(work.output_tokens for work in stats),
        "prefill_tokens": sum(work.prefill_tokens for work in stats),
        "steps": sum(work.batches for work in stats),
        "busy_s": sum(work.busy_s for work in stats),
        "energy_j": sum(joules for _, joules in played),
        "ttft_s": float((answered * [work.ttft_s for work in stats]).sum() / of_all),
        "tpot_s": float((answered * [work.tpot_s for work in stats]).sum() / of_all),
        "late": sum(sum(work.late) for work in stats) / of_all,
    }


CASES = {
    "light": (0.15, STANDARD, {}),
    "half": (0.5, STANDARD, {}),
    "full": (0.8, STANDARD, {}),
    "few experts": (0.4, Knobs(batch_size=128, expert_count=2, routing_bias=1.0), {}),
    "few places": (1.0, Knobs(batch_size=16, expert_count=8), {}),
    "bound by prompts": (1.4, Knobs(batch_size=512, expert_count=8), {}),
    "a small cache": (0.6, STANDARD, {"cache_positions": 8192}),
}
SLOW = ("light", "half", "few experts", "a small cache")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_the_twin_serves_as_the_service_does_step_by_step(name: str) -> None:
    load, knobs, generate = CASES[name]
    seconds = 8
    problem = Problem.of(scenario(load, 10, **generate))
    real, model = reference(problem), twin(problem)
    stepped = [real.run(knobs) for _ in range(seconds)][2:]
    stats = [model.run(knobs, 1.0) for _ in range(seconds)][2:]
    came = [sum(work.arrived) for work in stats]  # a step that ends behind an interval makes it longer
    assert came == pytest.approx([sum(work.arrived) for work, _ in stepped], rel=0.01, abs=1)
    expected = summed(stepped)
    found = summed([(work, joules_of(work)) for work in stats])
    # Lengths of so many requests are those of the trace within two standard errors.
    chance = 2 * 0.8 / expected["answered"] ** 0.5
    for key in ("answered", "output_tokens", "steps", "busy_s", "energy_j", "tpot_s"):
        assert found[key] == pytest.approx(expected[key], rel=0.02 + chance), key
    assert found["prefill_tokens"] == pytest.approx(expected["prefill_tokens"], rel=0.03 + chance)
    assert found["ttft_s"] == pytest.approx(expected["ttft_s"], rel=0.08 + 8 * chance)
    assert found["late"] == pytest.approx(expected["late"], abs=0.02 + chance)
    for name, q in (("tpot_histogram", 0.5), ("tpot_histogram", 0.99), ("latency_histogram", 0.95)):
        one, other = (
            latency_quantile(np.sum([getattr(work, name) for work in of], axis=0), q)
            for of in (stats, [work for work, _ in stepped])
        )
        assert one == pytest.approx(other, rel=0.09 + chance), (name, q)


def test_answers_are_late_by_the_promise_in_force_when_they_end() -> None:
    """By turns of a second a promise that nobody breaks and one that half of the answers do."""
    problem = Problem.of(scenario(0.6, 12))
    real, model, knobs = reference(problem), twin(problem), STANDARD
    settled = [real.run(knobs)[0] for _ in range(3)][-1]
    assert settled.tpot_histogram is not None
    half_s = latency_quantile(settled.tpot_histogram, 0.5) / 10  # its edges are a tenth
    late = {"real": np.zeros(2), "model": np.zeros(2)}
    for _ in range(3):
        model.run(knobs, 1.0)
    for second in range(6):
        promised_s = half_s if second % 2 else 1.0
        for name, run in (("real", real.workload.run), ("model", model.run)):
            stats = run(knobs, 1.0, 2, promised_s)
            late[name][second % 2] += stats.late[0] / stats.answered[0] / 3
            assert stats.late[1] == 0.0
    for never, half in late.values():
        assert never == pytest.approx(0.0, abs=0.01) and half == pytest.approx(0.5, abs=0.2)
    assert late["model"][1] == pytest.approx(late["real"][1], abs=0.15)


def random_knobs(problem: Problem, rng: np.random.Generator) -> Knobs:
    levels = problem.knobs.levels
    index = np.array([rng.integers(len(values)) for values in levels.values()])
    index[list(levels).index("sm_clock")] = len(levels["sm_clock"]) - 1
    return problem.knobs.knobs(index)


@pytest.mark.parametrize("load", [0.05, 0.6, 3.0])
def test_no_request_is_lost_under_any_knobs(load: float) -> None:
    problem, rng = Problem.of(scenario(load, 60)), np.random.default_rng(0)
    model, waiting, gone = twin(problem), np.zeros(2), np.zeros(2)
    for _ in range(60):
        work = model.run(random_knobs(problem, rng), 1.0, bool(rng.random() < 0.8))
        change = np.array(work.waiting) - waiting
        waiting = np.array(work.waiting)
        assert np.array_equal(work.arrived, np.add(work.answered, work.expired) + change)
        assert all(number >= 0 and number == int(number) for number in (*work.answered, *work.waiting))
        assert all(late <= answered for late, answered in zip(work.late, work.answered, strict=True))
        assert 0 <= work.busy_s <= 1 + 1e-9 and 0 <= work.cache_share <= 1 and 0 <= work.batch_fill <= 1
        assert 0 <= work.good <= work.correct <= sum(work.answered)
        gone += work.expired
    if load == 3.0:
        assert gone.sum() > 0


def test_tokens_are_those_of_the_answers() -> None:
    """What was given is what was answered and what is under way, prompts likewise."""
    problem = Problem.of(scenario(0.7, 40))
    model = twin(problem)
    stats = [model.run(STANDARD, 1.0) for _ in range(40)]
    lengths = token_work(problem).lengths
    answered = sum(sum(work.answered) for work in stats)
    for key, each in (("output_tokens", lengths.output.mean()), ("prefill_tokens", lengths.prompt.mean())):
        total = sum(getattr(work, key) for work in stats)
        under_way = sum(stats[-1].waiting)
        assert answered * each * 0.999 <= total <= (answered + under_way + 2) * each


def test_one_server_is_one_of_a_batch() -> None:
    problem = Problem.of(load_scenario("default", episode_s=20))
    batch, alone = (
        TwinBatch(problem, 5, latencies=True),
        [TwinBatch(problem, 1, latencies=True) for _ in range(5)],
    )
    batch.reset(range(5))
    for seed, one in enumerate(alone):
        one.reset([seed])
    rng = np.random.default_rng(1)
    for _ in range(20):
        knobs = [random_knobs(problem, rng) for _ in range(5)]
        index = np.array([problem.knobs.index(k) for k in knobs])
        together = batch.step(index)
        for i, one in enumerate(alone):
            assert np.array_equal(one.step(index[i : i + 1]).observation[0], together.observation[i])
            assert np.array_equal(one.histogram[0], batch.histogram[i])


def test_what_costs_less_by_physics_costs_less() -> None:
    problem = Problem.of(scenario(0.3, 10))

    def joules(**knobs: Any) -> float:
        model = twin(problem)
        wanted = dataclasses.replace(STANDARD, **knobs)
        return sum(joules_of(model.run(wanted, 1.0)) for _ in range(10))

    by_k = [joules(expert_count=k) for k in (1, 2, 4, 8)]
    assert by_k == sorted(by_k)
    by_bias = [joules(routing_bias=bias) for bias in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert by_bias == sorted(by_bias)


def test_pace_caps_the_busy_share_and_admission_the_deferrable_ones() -> None:
    problem = Problem.of(scenario(1.0, 10))
    model = twin(problem)
    busy = [model.run(dataclasses.replace(STANDARD, pace=0.4), 1.0).busy_s for _ in range(10)]
    assert max(busy) <= 0.4 + 1e-9 and busy[-1] == pytest.approx(0.4, rel=1e-6)
    closed = twin(problem)
    stats = [closed.run(dataclasses.replace(STANDARD, admission=0.0), 1.0) for _ in range(10)]
    assert sum(work.answered[1] for work in stats) == 0 and sum(work.answered[0] for work in stats) > 0
    half = twin(problem)
    few = dataclasses.replace(STANDARD, batch_size=16, admission=0.5)
    for _ in range(10):
        half.run(few, 1.0)
        server = half.state.server[0]
        assert server["decoding"][1] + server["prompts"][1] <= 8 + 1e-9


def test_the_tables_are_the_fitted_form() -> None:
    """At nodes: a step of answers alone, and one that is filled up by prompts."""
    problem = Problem.of(load_scenario("default", randomize={"steps": 0.0}))
    work: TokenWork = token_work(problem)
    context, cost = mean_context(work.lengths), work.cost
    rows = 64.0
    node = int(np.flatnonzero(np.isclose(2.0 ** (np.arange(20) // 2) * (1 + np.arange(20) % 2 / 2), rows))[0])
    for (k, level), (s, name) in itertools.product(((8, 3), (1, 0)), enumerate(DOMAINS)):
        read = float(cost.reads(rows, 0, k, 64, name))
        amounts = cost.amounts(StepWork(rows, 0.0, rows * context, 0.0, k, read))
        time_s = work.tables.pure[0, s, level, 0, node, 0, :2].sum()
        assert time_s == pytest.approx(float(amounts @ cost.time.rate))
        read = float(cost.reads(rows, 960.0, k, 64, name))
        full = cost.amounts(StepWork(rows, 960.0, rows * context + 960, 960 * 259.0, k, read))
        time_s = work.tables.mixed[0, s, level, node, -1, 0, :2].sum()
        assert time_s == pytest.approx(float(full @ cost.time.rate), rel=0.01)


def test_rows_that_read_all_experts_alike_leave_costs_finite() -> None:
    """Seen on a card: 256 and 512 rows of answers read every expert of every layer."""
    scenario = load_scenario("default", randomize={"steps": 0.0})
    profile: Any = profile_of(scenario, scenario.profile)
    cells = tuple(
        dataclasses.replace(c, experts_read=64.0)
        if c.decode_rows >= 256 and c.top_k == 8 and c.readable == 64
        else c
        for c in profile.cost.cells
    )
    saturated = dataclasses.replace(profile, cost=dataclasses.replace(profile.cost, cells=cells))
    own, other = (token_work(Problem.of(scenario, of)).tables for of in (profile, saturated))
    assert all(np.isfinite(table).all() for table in other)
    for before, now in ((own.pure, other.pure), (own.mixed, other.mixed)):
        np.testing.assert_allclose(now[..., :2].sum(axis=-1), before[..., :2].sum(axis=-1), rtol=0.15)


def test_an_episode_has_one_draw_of_what_steps_cost() -> None:
    """Draws lie about the fit as widely as the measured steps do; each seed has its own."""
    spread, fit = (
        token_work(Problem.of(load_scenario("default", randomize=r))) for r in ({}, {"steps": 0.0})
    )
    assert len(spread.tables.pure) == 8 and len(fit.tables.pure) == 1
    drawn_s, fitted_s = (work.tables.pure[..., :2].sum(axis=-1) for work in (spread, fit))
    off, rms = drawn_s / fitted_s - 1.0, np.sqrt((fit.cost.time.residuals.fitted**2).mean())
    assert 0.5 * rms < off.std() < 2.0 * rms and abs(off.mean()) < rms
    problem = Problem.of(load_scenario("default", episode_s=10))
    model = TwinWorkload(problem, lambda: 1.0)
    seen = set()
    for seed in range(40):
        model.reset(seed)
        first = model.state.server["draw"][0]
        model.run(STANDARD, 1.0)
        assert model.state.server["draw"][0] == first
        seen.add(int(first))
    assert seen == set(range(8))


def test_rates_are_spread_until_they_miss_the_measured_steps_as_the_form_does() -> None:
    fit = token_work(Problem.of(load_scenario("default"))).cost.time
    drawn = fit.draws(4000, 1.0, np.random.default_rng(0))
    assert drawn.min() >= 0.0 and np.allclose(fit.draws(3, 0.0, np.random.default_rng(0)), fit.rate)
    assert drawn.mean(axis=0) == pytest.approx(fit.rate, rel=0.2)


def test_a_service_without_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="levels"):
        Problem.of(load_scenario("vision", static={"admission": 0.5}))
    assert generate_service(Problem.of(load_scenario("default"))).histograms == 3
