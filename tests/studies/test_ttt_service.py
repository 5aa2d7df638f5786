"""The study of adaptation in the service: its split of energy against a replay, its pairs, both worlds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console
from scipy import stats

from agents.play.rollout import Recording, play_twin
from agents.policies.gates import GATES, GateConfig, Gated
from agents.policies.registry import make_policy
from moe.workload import WORK_DTYPE
from studies import ttt_service, ttt_service_report
from studies.repeats import StudyError
from studies.ttt_service import Arguments, policies_of
from studies.ttt_service_figures import AFTER_S, BEFORE_S, find_changes
from studies.ttt_service_results import (
    BASELINE,
    EXTRA,
    INDICATORS,
    adapting_j,
    by_seed,
    changes_of_shift,
    compare,
    episode_rows,
    price_steps,
    ratio_interval,
)
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.seeding import episode_seed
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.workload import TwinWorkload

SEEDS = [3, 11, 2**40]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(load_scenario("vision", episode_s=60, power_budget={"brake": None}))


def play(problem: Problem, rule: str, base: str = "rule_based") -> Recording:
    config = GateConfig(base=base, every=4)  # type: ignore[arg-type]
    return play_twin(problem, Gated(problem, make_policy(base, problem), rule, config), SEEDS, rule)


def replayed_j(recording: Recording, problem: Problem) -> np.ndarray:
    """Energy of adaptation per interval, [T, n]: what is missing where its steps cost time but no energy.

    Exact where the power cap holds nothing back. The replay must give what was recorded.
    """
    assert problem.profile.ttt_energy_j is not None
    free_steps = replace(problem.profile, ttt_energy_j=np.zeros_like(problem.profile.ttt_energy_j))
    batch = TwinBatch(problem, len(recording.seeds))
    batch.reset(recording.seeds)
    result = np.zeros(recording.reward.shape)
    for i, seed in enumerate(recording.seeds):
        clock = [1.0]
        halves = [
            TwinWorkload(half, lambda clock=clock: clock[0])
            for half in (problem, replace(problem, profile=free_steps))
        ]
        for half in halves:
            half.reset(episode_seed(int(seed), 0))
        for t in range(len(recording.reward)):
            clock[0] = float(recording.work["sm_clock"][t, i])
            knobs = problem.knobs.knobs(recording.index[t, i])
            whole, without = (half.run(knobs, recording.interval_s, 2) for half in halves)
            for name in WORK_DTYPE.names or ():
                np.testing.assert_array_equal(getattr(whole, name), recording.work[name][t, i])
            assert whole.slot_energy_j is not None and without.slot_energy_j is not None
            result[t, i] = (whole.slot_energy_j - without.slot_energy_j).sum()
    return result * batch.devices["energy_factor"][:, 0]


@pytest.mark.parametrize(
    ("rule", "base", "within"),
    [("always", "rule_based", 0.01), ("always", "static", 0.01), ("periodic", "rule_based", 0.03)],
)
def test_the_energy_of_adapting_is_that_of_a_replay_without_it(
    problem: Problem, rule: str, base: str, within: float
) -> None:
    recording = play(problem, rule, base)
    assert not recording.gpu["power_capped_s"].any()
    exact, own = replayed_j(recording, problem).sum(0), adapting_j(recording, problem).sum(0)
    assert (exact > 0.01 * recording.gpu["energy_j"].sum(0)).all()
    np.testing.assert_allclose(own, exact, rtol=within)


@pytest.mark.parametrize("rule", GATES)
def test_the_two_parts_of_the_energy_sum_up_to_it(problem: Problem, rule: str) -> None:
    recording = play(problem, rule)
    adapting = adapting_j(recording, problem)
    assert (adapting >= 0.0).all() and (adapting < recording.gpu["energy_j"]).all()
    assert not adapting[recording.work["ttt_steps"] == 0].any()
    assert adapting.any() == recording.work["ttt_steps"].any()
    rows = episode_rows(recording, problem)
    work = recording.work
    answered = (work["answered"].sum(axis=-1)).sum(0)
    parts = (rows.serving_j_per_request + rows.adapting_j_per_request) * answered
    np.testing.assert_allclose(parts, recording.gpu["energy_j"].sum(0))
    np.testing.assert_allclose(rows.error, 1.0 - work["correct"].sum(0) / answered)


def test_without_a_meter_the_split_is_that_of_time(problem: Problem) -> None:
    """As the modelled device has it then: its power does not know what it is busy with."""
    recording = play(problem, "always")
    bare = replace(problem, profile=replace(problem.profile, energy_j=None))
    share = recording.work["ttt_busy_s"] / recording.work["busy_s"]
    own = adapting_j(recording, bare)
    assert (own <= share * recording.gpu["energy_j"]).all()
    assert (own >= share * (recording.gpu["energy_j"] - 1.2 * problem.twin.idle_power_w)).all()


def test_all_policies_play_the_same_requests(problem: Problem) -> None:
    recordings = [play(problem, rule) for rule in GATES]
    names = ("arrived", "shift_id")
    for recording in recordings[1:]:
        np.testing.assert_array_equal(recording.seeds, recordings[0].seeds)
        np.testing.assert_array_equal(recording.budget_w, recordings[0].budget_w)
        for name in names:
            np.testing.assert_array_equal(recording.work[name], recordings[0].work[name])
    different = {recordings[0].work["arrived"][:, i].tobytes() for i in range(len(SEEDS))}
    assert len(different) == len(SEEDS)


def table_of(values: dict[str, dict[int, tuple[float, float, float]]]) -> pd.DataFrame:
    """Rows with given energy, good answers and error by policy and seed; all else 0."""
    rows = [
        {
            "policy": policy,
            "seed": seed,
            **dict.fromkeys(INDICATORS, 0.0),
            "energy_j": e,
            "good": g,
            "error": x,
        }
        for policy, own in values.items()
        for seed, (e, g, x) in own.items()
    ]
    return pd.DataFrame(rows)


def test_differences_are_those_of_equal_seeds() -> None:
    rng = np.random.default_rng(0)
    never = {seed: tuple(rng.normal((100.0, 50.0, 0.5), (9.0, 5.0, 0.1))) for seed in range(6)}
    own = {seed: tuple(np.add(never[seed], rng.normal((7.0, 20.0, -0.2), 0.5))) for seed in (4, 2, 1, 5)}
    own[17] = (1e6, 1e6, 1e6)  # a seed that the baseline did not play
    table = compare(table_of({BASELINE: never, "own": own})).set_index("policy")  # type: ignore[arg-type]
    assert table.pairs.to_dict() == {BASELINE: 6, "own": 4} and table.episodes["own"] == 5
    pairs = np.array([[own[seed], never[seed]] for seed in (1, 2, 4, 5)])  # [4, 2, 3]
    for column, name in enumerate(("energy_j", "good", "error")):
        test = stats.ttest_rel(pairs[:, 0, column], pairs[:, 1, column])
        expected = (pairs[:, 0, column] - pairs[:, 1, column]).mean(), *test.confidence_interval()
        found = [table.loc["own", f"{name}_diff{end}"] for end in ("", "_low", "_high")]
        np.testing.assert_allclose(found, expected)
    ratio = (pairs[:, 0, 0] - pairs[:, 1, 0]).mean() / (pairs[:, 0, 1] - pairs[:, 1, 1]).mean()
    assert table.loc["own", EXTRA] == pytest.approx(ratio)
    assert math.isnan(table.loc[BASELINE, EXTRA]) and table.loc[BASELINE, "error_diff"] == 0.0


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        below = rng.normal(10.0, 1.5, 12)
        above = 3.0 * below + rng.normal(0.0, 2.0, 12)
        _, low, high = ratio_interval(above, below)
        covered += low <= 3.0 <= high
    assert 0.92 < covered / 1000 < 0.97
    assert ratio_interval(2.0 * np.arange(1.0, 5.0), np.arange(1.0, 5.0)) == pytest.approx((2.0, 2.0, 2.0))
    assert np.isnan(ratio_interval(np.ones(4), np.array([-1.0, 1.0, 2.0, -2.0]))).all()  # nothing is gained
    assert np.isnan(ratio_interval(np.ones(1), np.ones(1))).all()


def test_the_steps_of_the_price_are_the_lower_hull() -> None:
    """Of five policies two are worth their energy, the second only at a higher price."""
    points = {
        "never": (100.0, 50.0), "a": (110.0, 60.0), "dear": (130.0, 62.0), "b": (130.0, 70.0),
        "worse": (140.0, 40.0), "extended": (106.0, 52.0),
    }  # fmt: skip
    rng = np.random.default_rng(2)
    noise = rng.normal(0.0, 0.01, (len(points), 5, 2))
    values = {
        name: {seed: (*(np.array(point) + noise[i, seed]), 0.0) for seed in range(5)}
        for i, (name, point) in enumerate(points.items())
    }
    steps = price_steps(table_of(values), list(points))
    assert steps.before.tolist() == ["never", "a"] and steps.policy.tolist() == ["a", "b"]
    np.testing.assert_allclose(steps[EXTRA], [1.0, 2.0], atol=0.01)
    assert price_steps(table_of(values), ["never", "worse"]).empty


def test_changes_of_shift_have_room_around_them(problem: Problem) -> None:
    heavy = Problem.of(load_scenario(problem.scenario, traffic={"shift_dwell_s": 8.0}))
    episodes = by_seed([play(heavy, "never")])["never"]
    assert list(episodes) == SEEDS
    found = 0
    for episode in episodes.values():
        shift = episode.work["shift_id"][:, 0].tolist()
        spans = {t: (shift[t - 4 : t], shift[t : t + 6]) for t in range(4, len(shift) - 5)}
        expected = [
            t
            for t, (old, new) in spans.items()
            if old[-1] != new[0] and len(set(old)) == 1 and len(set(new)) == 1
        ]
        assert changes_of_shift(episode, 4, 6) == expected
        found += len(expected)
    assert found > 2


SETTINGS: dict[str, Any] = {
    "variants": {
        "plain": {"title": "plain"},
        "over-static": {"title": "", "base": "static", "overrides": {"limits": {"temperature_c": 60.0}}},
    }
}  # fmt: skip


@pytest.fixture
def settings_file(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return str(path)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_the_study_in_the_twin(settings_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = Arguments(config=settings_file, seeds=2, duration=120, out=out)
    console = Console(record=True, width=120)
    results = ttt_service.main(arguments, console)
    record = json.loads((out / "results.json").read_text(), parse_constant=refuse_constant)
    rows = pd.read_csv(out / "episodes.csv")
    assert "simulated (twin)" in record["origin"] and list(record["variants"]) == ["plain", "over-static"]
    policies = [BASELINE, *(rule for rule in GATES if rule != BASELINE), "rule_based"]
    for name, variant in record["variants"].items():
        assert list(variant["policies"]) == policies
        for policy, values in variant["policies"].items():
            own = rows[(rows.variant == name) & (rows.policy == policy)]
            assert own.seed.tolist() == [3000, 3001] and values["episodes"] == values["pairs"] == 2
            assert values["error"] == pytest.approx(own.error.mean())
    assert record["variants"]["plain"]["policies"][BASELINE][EXTRA] is None
    base = results[1].problem
    played = play_twin(base, make_policy("static", base), [3000, 3001])
    np.testing.assert_array_equal(played.index, results[1].recordings[0].index)  # never, over static
    report, shown = (out / "report.md").read_text(), console.export_text()
    for text in (report, shown):
        assert "train_agent.py" in text and "simulated (twin)" in text and "periodic" in text
    changes = find_changes(by_seed(results[1].recordings))
    assert changes and (out / "shift-over-static.png").exists()
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")
    for seed, t in changes:
        assert seed in (3000, 3001) and BEFORE_S <= t <= 120 - AFTER_S
    again = tmp_path / "again"
    monkeypatch.setattr(ttt_service_report, "_figures", lambda results, folder: [])  # they take longest
    ttt_service.main(replace(arguments, out=again), Console(quiet=True))
    assert [variant["limit_c"] for variant in record["variants"].values()] == [70.0, 60.0]
    for name in ("results.json", "episodes.csv"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_live_episodes_are_kept_and_continued(
    settings_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin stands in for the live world, so that what is continued can be compared with what is not."""
    stop_after: list[int] = []
    steps: list[int] = []

    def make(scenario: Any, world: str) -> ThermalMoEEnv:
        assert world == "live"
        env = ThermalMoEEnv(scenario, "twin")
        env.world = "live-cpu"
        step = env.step

        def counted(action: Any) -> Any:
            if stop_after and len(steps) >= stop_after[0]:
                raise KeyboardInterrupt
            steps.append(1)
            return step(action)

        env.step = counted
        return env

    monkeypatch.setattr(ttt_service, "ThermalMoEEnv", make)
    arguments = Arguments(
        world="live-cpu",
        config=settings_file,
        variants=("plain",),
        seeds=2,
        duration=12,
        out=tmp_path / "out",
    )
    stop_after.append(5 * 12 + 7)
    with pytest.raises(KeyboardInterrupt):
        ttt_service.main(arguments, Console(quiet=True))
    stop_after.clear()
    (result,) = ttt_service.main(arguments, Console(quiet=True))
    assert len(steps) == 2 * (len(GATES) + 1) * 12 + 7 and set(result.rows.policy) == {*GATES, "rule_based"}
    steps.clear()
    (same,) = ttt_service.main(arguments, Console(quiet=True))
    assert not steps
    pd.testing.assert_frame_equal(same.rows, result.rows)
    assert "measured work, simulated device" in (tmp_path / "out" / "report.md").read_text()
    twin = Problem.of(load_scenario("vision", episode_s=12))
    for label, policy in policies_of(twin, "rule_based", None).items():
        expected = episode_rows(play_twin(twin, policy, [3000, 3001], label), twin)
        own = result.rows.loc[result.rows.policy == label, :]
        pd.testing.assert_frame_equal(own.reset_index(drop=True), expected.reset_index(drop=True))
    with pytest.raises(StudyError, match="another scenario"):
        ttt_service.main(replace(arguments, duration=13), Console(quiet=True))
    with pytest.raises(StudyError, match="plays 'live-cpu', not 'live'"):
        ttt_service.main(replace(arguments, world="live"), Console(quiet=True))


def test_what_cannot_be_played_is_refused(settings_file: str, tmp_path: Path) -> None:
    arguments = Arguments(config=settings_file, out=tmp_path / "out")
    with pytest.raises(StudyError, match=r"unknown variants \['hot'\].*plain"):
        ttt_service.main(replace(arguments, variants=("hot",)), Console(quiet=True))
    with pytest.raises(ValueError, match="would flatter"):
        ttt_service.main(replace(arguments, seed=910_000), Console(quiet=True))
    with pytest.raises(ValueError, match="or the path of a trained run"):
        ttt_service.main(replace(arguments, run=tmp_path / "no-run"), Console(quiet=True))
