"""Indicators against values worked out by hand and against sums over the steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agents.play.metrics import KPIS, episode_metrics, expert_entropy, steps_table, summarize
from agents.play.rollout import Recording, play_twin
from agents.policies.policy import RandomPolicy
from moe.profiles import save_profile
from moe.workload import LATENCY_EDGES_S, WORK_DTYPE
from tests.thermoe_env.conftest import make_profile
from thermoe_env.mdp.fields import FIELDS
from thermoe_env.mdp.reward import REWARD_TERMS
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import Feasibility, load_scenario
from thermoe_env.twin.heat import GPU_DTYPE
from thermoe_env.twin.service import HISTOGRAM_BINS

Frame = Any  # pandas' own types are too wide to check against


def make_recording() -> Recording:
    """Two episodes: one of two intervals with known counts, one of one interval without any answer."""
    work, gpu = np.zeros((2, 2), WORK_DTYPE), np.zeros((2, 2), GPU_DTYPE)
    known = {
        "arrived": ((60, 30), (40, 70)), "answered": ((50, 20), (30, 40)), "late": ((5, 0), (1, 2)),
        "expired": ((4, 0), (6, 10)), "correct": (49, 63), "good": (40, 60),
        "busy_s": (0.8, 0.7), "ttt_busy_s": (0.3, 0.0),
    }  # fmt: skip
    for name, values in known.items():
        work[name][:, 0] = values
    gpu["energy_j"] = [[300.0, 100.0], [200.0, 0.0]]
    gpu["temp_c"] = [[50.0, 40.0], [63.0, 0.0]]
    gpu["power_capped_s"][:, 0], gpu["thermal_throttle_s"][:, 0] = (0.2, 0.4), (0.0, 0.25)
    histogram = np.zeros((2, 2, HISTOGRAM_BINS), np.int32)
    histogram[0, 0, 101], histogram[1, 0, 101], histogram[1, 0, 181] = 70, 60, 10
    cost = np.zeros((2, 2, 3))
    cost[:, 0] = [[0.0, 9.0, 50.0], [1.0, 19.0, 0.0]]
    tokens = np.zeros((2, 2, 1, 4))
    tokens[:, 0, 0] = [[70, 0, 70, 0], [70, 0, 70, 0]]
    return Recording(
        policy="p", world="twin", device="made up", seeds=np.array([1, 2]), interval_s=1.0,
        length=np.array([2, 1]), shut_down=np.array([False, True]),
        observation=np.zeros((2, 2, len(FIELDS)), np.float32), ranges=np.zeros((2, 0)),
        index=np.zeros((2, 2, 6), np.int64), budget_w=np.zeros((2, 2)), work=work, gpu=gpu,
        reward=np.array([[1.0, -3.0], [2.5, 0.0]]), terms=np.zeros((2, 2, len(REWARD_TERMS))), cost=cost,
        histogram=histogram, tokens_per_expert=tokens,
    )  # fmt: skip


def test_episode_metrics_by_hand() -> None:
    table: Frame = episode_metrics(make_recording())
    expected = {
        "j_per_good": 500 / 100,
        "energy_j": 500,
        "mean_power_w": 250,
        "quality": 112 / 140,
        "goodput_rps": 50,
        "late_fraction": 28 / 160,
        "late_interactive": 16 / 90,
        "late_deferrable": 12 / 70,
        "waiting_fraction": 40 / 200,
        "peak_c": 63,
        "mean_c": 56.5,
        "above_limit_s": 1,
        "throttled_s": 0.25,
        "power_capped_s": 0.6,
        "over_budget_j": 50,
        "expert_entropy": 0.5,
        "ttt_time_share": 0.2,
        "return": 3.5,
        "time_s": 2,
    }
    first: Frame = table.iloc[0]
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert LATENCY_EDGES_S[100] < first.latency_p50_s < LATENCY_EDGES_S[101]
    assert LATENCY_EDGES_S[180] < first.latency_p95_s < first.latency_p99_s < LATENCY_EDGES_S[181]
    assert set(KPIS) == set(expected) - {"time_s"} | {"latency_p50_s", "latency_p95_s", "latency_p99_s"}


def test_no_answer_has_no_quality_and_infinite_cost() -> None:
    second: Frame = episode_metrics(make_recording()).iloc[1]
    assert math.isinf(second.j_per_good) and second.mean_power_w == 100.0 and second.shut_down
    for name in ("quality", "latency_p50_s", "late_fraction", "expert_entropy", "ttt_time_share"):
        assert math.isnan(second[name])


def test_metrics_equal_sums_over_the_steps_table(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("profile") / "made-up.json"
    save_profile(make_profile(), path)
    problem = Problem.of(load_scenario("vision", profile=str(path), episode_s=20))
    recording = play_twin(problem, RandomPolicy(problem.knobs.nvec), [4, 5, 6], "random")
    steps: Frame = steps_table(recording, problem)
    assert len(steps) == 60 and steps.seed.tolist() == [4] * 20 + [5] * 20 + [6] * 20
    total: Frame = steps.groupby("seed").sum(numeric_only=True)
    answered, late, expired = (
        total[f"{name}_interactive"] + total[f"{name}_deferrable"] for name in ("answered", "late", "expired")
    )
    expected = pd.DataFrame(
        {
            "j_per_good": total.energy_j / total.good,
            "mean_power_w": steps.groupby("seed").power_w.mean(),
            "quality": total.correct / answered,
            "late_fraction": (late + expired) / (answered + expired),
            "over_budget_j": np.maximum(steps.power_w - steps.budget_w, 0.0).groupby(steps.seed).sum(),
            "above_limit_s": (steps.temp_c > problem.limit_c).groupby(steps.seed).sum(),
            "peak_c": steps.groupby("seed").temp_c.max(),
            "mean_c": steps.groupby("seed").temp_c.mean(),
            "return": total.reward,
        }
    )
    table: Frame = episode_metrics(recording).set_index("seed")
    np.testing.assert_allclose(table[expected.columns].to_numpy(float), expected.to_numpy(float))
    np.testing.assert_array_equal(steps.time_s[:20], np.arange(1, 21))
    assert set(steps.batch_size) <= set(problem.knobs.levels["batch_size"])


@given(hnp.arrays(np.float64, (3, 2, 5), elements=st.floats(0.0, 1e6)))
def test_expert_entropy_lies_between_one_expert_and_even(tokens: np.ndarray) -> None:
    tokens[..., 0] += 1.0
    entropy = expert_entropy(tokens)
    assert entropy.shape == (3,) and np.all((entropy >= 0.0) & (entropy <= 1.0 + 1e-12))
    assert expert_entropy(np.ones((2, 5))) == pytest.approx(1.0)
    assert expert_entropy(np.eye(5)[:2]) == 0.0


def make_episodes(**policies: dict[str, object]) -> Frame:
    """Six seeds per policy: feasible, unless a column is replaced."""
    frames = []
    for policy, changed in policies.items():
        frame = pd.DataFrame({name: np.full(6, 0.5) for name in KPIS})
        frame = frame.assign(
            policy=policy,
            run="",
            seed=range(6),
            whole=True,
            shut_down=False,
            late_interactive=0.0,
            late_deferrable=0.0,
            above_limit_s=0.0,
            time_s=300.0,
        )
        frames.append(frame.assign(**changed))
    return pd.concat(frames, ignore_index=True)


def test_summary_ranks_the_feasible_and_says_why_others_are_not() -> None:
    limits = Feasibility(quality_share=0.99, late_share=0.02, hot_share=0.01)
    energy = np.array([1.0, 2.0, 4.0, 1.0, 3.0, 5.0])
    summary: Frame = summarize(
        make_episodes(
            static={"j_per_good": energy},
            poor={"j_per_good": 0.1 * energy, "quality": 0.4949},
            fair={"j_per_good": 0.5 * energy, "quality": 0.4951},
            late={"j_per_good": 0.2 * energy, "late_deferrable": [0.0, 0.0, 0.0, 0.0, 0.0, 0.13]},
            hot={"j_per_good": 0.2 * energy, "above_limit_s": 3.5},
            dead={"j_per_good": 0.2 * energy, "shut_down": [True, *[False] * 5]},
        ),
        limits,
    ).set_index("policy")
    assert summary["rank"].dropna().to_dict() == {"fair": 1, "static": 2}
    assert summary.index[:2].tolist() == ["fair", "static"]
    for policy, reason in {
        "poor": "quality",
        "late": "late",
        "hot": "above limit",
        "dead": "shut down",
    }.items():
        assert reason in summary.infeasible[policy]
    # Paired: where every seed costs half, the ratio is a half whatever is drawn; the mean still varies.
    row = summary.loc["fair"]
    assert row.j_per_good_vs_static_low == row.j_per_good_vs_static_high == row.j_per_good_vs_static == 0.5
    assert row.j_per_good == pytest.approx(energy.mean() / 2)
    assert row.j_per_good_low < row.j_per_good < row.j_per_good_high


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    frame: Frame = make_episodes(static={}).iloc[np.zeros(400, int)].assign(seed=range(400), energy_j=values)
    row: Frame = summarize(frame, Feasibility()).iloc[0]
    half = 1.96 * values.std() / 20
    assert row.energy_j_low == pytest.approx(values.mean() - half, abs=0.02)
    assert row.energy_j_high == pytest.approx(values.mean() + half, abs=0.02)


def test_cut_episodes_are_left_out() -> None:
    cut = {"j_per_good": [1.0, 1.0, 1.0, 1.0, 1.0, 99.0], "whole": [True] * 5 + [False]}
    summary: Frame = summarize(make_episodes(static={}, cut=cut), Feasibility()).set_index("policy")
    assert summary.episodes.to_dict() == {"static": 6, "cut": 5} and summary.j_per_good["cut"] == 1.0
    nothing: Frame = summarize(make_episodes(static={}, cut={"whole": False}), Feasibility()).set_index(
        "policy"
    )
    assert (
        math.isnan(nothing.j_per_good["cut"])
        and nothing.infeasible["cut"] == "no whole episode to compare with static"
    )


def test_one_seed_has_no_interval() -> None:
    row: Frame = summarize(make_episodes(static={}).iloc[:1], Feasibility()).iloc[0]
    assert row.j_per_good == 0.5 and math.isnan(row.j_per_good_low) and row["rank"] == 1
