"""Both worlds side by side: a twin that stands for the card must agree with itself, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from agents.live import report as fidelity_report
from agents.live import segments
from agents.live import session as live_session
from agents.live.compare import QUANTITIES, compare, play_twins, with_residual_heat
from agents.live.episodes import LiveEpisodes, policy_of, recipe_of
from agents.play.archive import load_recordings, save_recordings
from agents.play.metrics import episode_metrics
from agents.play.rollout import Recording, play_twin
from agents.policies.registry import make_policy
from benchmarks import sim_to_live
from benchmarks.sim_to_live import SimToLive, run
from moe.profiles import load_profile, save_profile
from tests.thermoe_env.calibration.test_recorder import PYNVML, ROOT
from tests.thermoe_env.conftest import make_profile
from thermoe_env.calibration.driver_info import load_driver_info
from thermoe_env.calibration.traces import load_segments, load_trace
from thermoe_env.configs import config_path
from thermoe_env.device.physics import relax
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.errors import GpuLostError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

POLICIES = ("static", "rule_based", "small_batches")
WARMER_C = 5


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a short scenario; its twin has no drift and idles at a whole degree."""
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    twin = yaml.safe_load(config_path("twin", "h100", ".yaml").read_text())
    die_c = twin["inlet_c"] + _rise_c(twin)
    twin |= {"inlet_drift_c": 0.0, "inlet_c": twin["inlet_c"] + round(die_c) - die_c}
    (folder / "twin.yaml").write_text(yaml.safe_dump(twin))
    raw = yaml.safe_load(config_path("scenarios", "vision", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "twin": str(folder / "twin.yaml")}
    (folder / "short.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "short.yaml")


def _rise_c(twin: dict[str, Any]) -> float:
    """How far the settled idle die lies above the inlet."""
    return twin["idle_power_w"] * sum(
        twin[name] for name in ("r_die_c_per_w", "r_spreader_c_per_w", "r_sink_c_per_w", "r_fan_c_per_w")
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Let the twin, with an inlet `WARMER_C` higher, stand for the card; lists what is played on it."""
    played: list[tuple[str, int]] = []

    def build(scenario: Any, world: str) -> ThermalMoEEnv:
        twin = yaml.safe_load(config_path("twin", scenario.twin, ".yaml").read_text())
        path = tmp_path / "warmer.yaml"
        path.write_text(yaml.safe_dump(twin | {"inlet_c": twin["inlet_c"] + WARMER_C}))
        return ThermalMoEEnv(dataclasses.replace(scenario, twin=str(path)), "twin")

    play = live_session.play_live

    def play_and_note(env: Any, policy: Any, seed: int, name: str) -> Recording:
        played.append((name, seed))
        return play(env, policy, seed, name)

    monkeypatch.setattr(sim_to_live, "ThermalMoEEnv", build)
    monkeypatch.setattr(live_session, "play_live", play_and_note)
    machine = {"device": "a stand-in", "driver": "-", "torch": "-", "cuda": "-", "python": "-"}
    monkeypatch.setattr(sim_to_live, "machine_of", lambda env: machine | {"weights_sha256": "0" * 64})
    monkeypatch.setattr(sim_to_live, "_gpu_answers", lambda: False)
    monkeypatch.setattr(sim_to_live, "live_problem", lambda scenario, world: Problem.of(scenario))
    return played


def config(out: Path, scenario: str | None, **changes: Any) -> SimToLive:
    wanted: dict[str, Any] = {"policies": POLICIES, "seeds": 2, "seconds": 20, "on_cpu": True} | changes
    return SimToLive(out=out, scenario=scenario, **wanted)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity_report, "save_figure", lambda draw, path: path)


def quiet() -> Console:
    return Console(quiet=True)


def test_a_card_that_is_the_twin_shows_no_gap(scenario: str, tmp_path: Path, card: list) -> None:
    """Only the inlet of that day differs, and it is read off the start temperature."""
    result = run(config(tmp_path / "x", scenario), quiet())
    assert result is not None and result["all_met"] and result["ranking"]["same"]
    assert len(result["episodes"]) == 6 and result["lost"] == []
    for policy in POLICIES:
        for quantity in QUANTITIES:
            cell = result["policies"][policy][quantity.name]
            assert cell["gap_low"] == pytest.approx(0.0, abs=1e-6), (policy, quantity.name)
            assert cell["gap_high"] == pytest.approx(0.0, abs=1e-6)
    rise_c = _rise_c(yaml.safe_load(config_path("twin", "h100", ".yaml").read_text()))
    for row in result["episodes"]:
        assert row["start_c"] - row["inlet_c"] == pytest.approx(rise_c)
    assert sorted(card) == sorted((policy, seed) for policy in POLICIES for seed in (2000, 2001))
    assert card != sorted(card)  # the order is drawn
    text = (tmp_path / "x" / "fidelity.md").read_text()
    assert "All aims are met." in text and "{" not in text and "not met" not in text
    for name in ("traces.png", "scatter.png", "comparison.json"):
        assert (tmp_path / "x" / "fidelity" / name).stat().st_size > 1000


def test_recordings_come_back_as_they_were(scenario: str, tmp_path: Path) -> None:
    problem = Problem.of(load_scenario(scenario, episode_s=20))
    played = [play_twin(problem, make_policy(name, problem), [7, 8], name) for name in ("static", "random")]
    save_recordings(tmp_path / "a.npz", played, {"note": [1.5, None]})
    found, about = load_recordings(tmp_path / "a.npz")
    assert about == {"note": [1.5, None]} and [r.policy for r in found] == ["static", "random"]
    for recording, expected in zip(found, played, strict=True):
        for item in dataclasses.fields(Recording):
            one, other = getattr(recording, item.name), getattr(expected, item.name)
            np.testing.assert_array_equal(one, other, item.name)
            assert not isinstance(other, np.ndarray) or one.dtype == other.dtype
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ValueError, match="static, seed 8 was cut short by"):
        save_recordings(tmp_path / "a.npz", [dataclasses.replace(played[0], error=KeyboardInterrupt())], {})
    assert (tmp_path / "a.npz").read_bytes() == before


def test_recordings_of_before_the_budget_read_as_unlimited(scenario: str, tmp_path: Path) -> None:
    """The fields of the work that came later are at their defaults; any other that is missing is refused."""
    problem = Problem.of(load_scenario(scenario, episode_s=20))
    played = play_twin(problem, make_policy("random", problem), [7], "random")
    later = {"ttt_refused", "ttt_left_out", "ttt_rolled_back", "budget_share"}
    names = [name for name in played.work.dtype.names or () if name not in later]
    save_recordings(tmp_path / "old.npz", [dataclasses.replace(played, work=played.work[names])], {})
    (found,), _ = load_recordings(tmp_path / "old.npz")
    assert found.work.dtype == played.work.dtype
    np.testing.assert_array_equal(found.work, played.work)
    assert found.work["budget_share"].min() == 1.0 and found.work["ttt_refused"].max() == 0.0
    save_recordings(tmp_path / "cut.npz", [dataclasses.replace(played, work=played.work[names[1:]])], {})
    with pytest.raises(ValueError, match=r"cut\.npz holds no recordings.*arrived"):
        load_recordings(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match="play the episode again"):
        dataclasses.replace(played, observation=played.observation[..., 2:]).field("load")


def test_a_recording_reads_in_the_ranges_that_it_was_made_in(scenario: str, tmp_path: Path) -> None:
    """One of before they were kept has its numbers still, but nothing decodes what was observed."""
    problem = Problem.of(load_scenario(scenario, episode_s=20, power_budget={"normal_w": 2000.0}))
    played = play_twin(problem, make_policy("random", problem), [7, 8], "random")
    save_recordings(tmp_path / "wide.npz", [played], {})
    (found,), _ = load_recordings(tmp_path / "wide.npz")
    assert found.ranges.max() == pytest.approx(2200.0)
    np.testing.assert_allclose(found.field("power_w"), played.gpu["power_w"], atol=1e-3)
    with np.load(tmp_path / "wide.npz") as archive:
        np.savez(tmp_path / "old.npz", **{name: archive[name] for name in archive if name != "0/ranges"})
    (found,), _ = load_recordings(tmp_path / "old.npz")
    np.testing.assert_array_equal(found.reward, played.reward)
    with pytest.raises(ValueError, match=r"without their ranges.*play the episode again"):
        found.field("load")


def test_recordings_of_what_cannot_be_are_refused(scenario: str, tmp_path: Path) -> None:
    problem = Problem.of(load_scenario(scenario, episode_s=20))
    played = play_twin(problem, make_policy("random", problem), [7, 8], "random")

    def cell(name: str, value: float, part: str | None = None) -> dict[str, Any]:
        array = getattr(played, name).copy()
        (array if part is None else array[part])[3, 1] = value
        return {name: array}

    for change, message in (
        (cell("reward", np.nan), "'random': reward holds a value that is not a number"),
        (cell("gpu", np.inf, "energy_j"), "energy_j holds a value that is not a number"),
        (cell("gpu", -1.0, "energy_j"), "energy_j holds a negative value"),
        (cell("work", np.nan, "good"), "good holds a value that is not a number"),
        (cell("index", -1), "index holds a negative value"),
        ({"cost": played.cost[..., :2]}, r"cost is float64 \(20, 2, 2\), it should be float64 \(20, 2, 3\)"),
        ({"histogram": played.histogram[:-1]}, "histogram is int32"),
        ({"reward": played.reward.astype(np.float32)}, "reward is float32"),
        ({"reward": played.reward[:, 0]}, "not enough values"),
        ({"length": played.length + 1}, "length 21 is more than the 20 intervals"),
        ({"seeds": played.seeds[:1]}, "seeds is int64"),
        ({"ranges": played.ranges[:, 2:]}, "ranges is float64"),
        ({"interval_s": float("nan")}, "interval_s must be a time"),
        ({"device": None}, "device must be text"),
    ):
        save_recordings(tmp_path / "odd.npz", [dataclasses.replace(played, **change)], {})
        with pytest.raises(
            ValueError, match=r"odd\.npz holds no recordings that this version reads.*" + message
        ):
            load_recordings(tmp_path / "odd.npz")


@pytest.mark.usefixtures("no_figures")
def test_a_folder_is_taken_up_where_it_ended(
    scenario: str, tmp_path: Path, card: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing episode is dropped with its reason, the others are kept, and only it is played again."""
    step, steps = ThermalMoEEnv.step, 0

    def failing(self: ThermalMoEEnv, action: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 25:  # in the second episode
            raise GpuLostError("gone for a moment")
        return step(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(ThermalMoEEnv, "step", failing)
        first = run(config(tmp_path / "x", scenario, seeds=1), quiet())
    assert first is not None
    [reason] = first["lost"]
    lost = card[1]
    assert f"{lost[0]}, seed 2000" in reason and "after 4 s" in reason and "gone for a moment" in reason
    assert len(first["episodes"]) == 2 and lost[0] not in first["policies"]
    assert "gone for a moment" in (tmp_path / "x" / "fidelity.md").read_text()
    card.clear()
    whole = run(config(tmp_path / "x", None, seeds=1, seconds=None), quiet())
    assert card == [lost] and whole is not None and set(whole["policies"]) == set(POLICIES)
    card.clear()
    run(config(tmp_path / "x", None, seeds=1, seconds=None), quiet())
    assert card == []


def test_a_stop_by_the_user_keeps_what_was_played(
    scenario: str, tmp_path: Path, card: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: ThermalMoEEnv, action: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ThermalMoEEnv, "step", stopped)
    with pytest.raises(ValueError, match="no whole live episode") as refusal:
        run(config(tmp_path / "x", scenario), quiet())
    assert "KeyboardInterrupt" in str(refusal.value) and len(card) == 1
    live = LiveEpisodes.load(tmp_path / "x")
    assert live is not None and live.episodes == [] and len(live.lost) == 1


@pytest.mark.usefixtures("no_figures")
def test_another_profile_meets_the_recorded_requests(scenario: str, tmp_path: Path, card: list) -> None:
    out = tmp_path / "x"
    run(config(out, scenario, seeds=1, only="live"), quiet())
    slower = load_profile(Path(scenario).with_name("profile.json"))
    slower = dataclasses.replace(slower, latency_s=slower.latency_s * 1.1, energy_j=slower.energy_j * 1.3)  # type: ignore[operator]
    save_profile(slower, tmp_path / "slower.json")
    new = str(tmp_path / "slower.json")
    result = run(config(out, None, seconds=None, profile=new, only="compare"), quiet())
    assert result is not None and not result["all_met"]
    for row in result["episodes"]:
        assert row["arrived_twin"] == row["arrived_live"]
        assert 5.0 < row["energy_j_gap"] < 30.0
    with pytest.raises(ValueError, match="name that profile"):  # more episodes would meet other requests
        run(config(out, None, seconds=None, profile=new), quiet())


@pytest.mark.usefixtures("no_figures")
def test_what_cannot_be_compared_is_refused(scenario: str, tmp_path: Path, card: list) -> None:
    with pytest.raises(ValueError, match="machine with a CUDA GPU"):
        run(config(tmp_path / "none", scenario, on_cpu=False), quiet())
    with pytest.raises(ValueError, match="--on-cpu"):
        run(config(tmp_path / "none", scenario, on_cpu=False, only="live"), quiet())
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"leaves -?[0-9]+ s for each of 6 episodes"):
        run(config(tmp_path / "none", scenario, within_s=60.0), quiet())
    with pytest.raises(ValueError, match="unknown policy 'beste'"):
        run(config(tmp_path / "none", scenario, policies=("beste",)), quiet())
    assert not (tmp_path / "none").exists() and card == []
    run(config(tmp_path / "x", scenario, policies=("static",), seeds=1), quiet())
    other = yaml.safe_load(Path(scenario).read_text())
    other["limits"]["temperature_c"] = 50.0
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"limits: .*50\.0.* is wanted, .*70\.0.* was recorded"):
        run(config(tmp_path / "x", str(tmp_path / "other.yaml")), quiet())
    with pytest.raises(ValueError, match="episode_s: 30 is wanted, 20 was recorded"):
        run(config(tmp_path / "x", scenario, seconds=30), quiet())
    (tmp_path / "x" / "episodes.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"episodes\.npz holds no recordings"):
        run(config(tmp_path / "x", None, seconds=None), quiet())


@pytest.mark.usefixtures("no_figures")
def test_time_shortens_all_episodes_alike(scenario: str, tmp_path: Path, card: list) -> None:
    begun = config(tmp_path / "x", scenario, seeds=1, within_s=80.0, seconds=100, cool_down_s=1.0)
    result = run(begun, quiet())
    live = LiveEpisodes.load(tmp_path / "x")
    assert result is not None and live is not None and len(live.episodes) == 3
    # (80 - 25 for the start - 1 to settle) / 3 less 1 to cool and 3 in between, and what loading took
    assert 11 <= live.scenario.episode_s <= 14
    assert {row["time_s"] for row in result["episodes"]} == {live.scenario.episode_s}


def test_gaps_aims_and_ranking_by_hand(scenario: str, tmp_path: Path, card: list) -> None:
    run(config(tmp_path / "x", scenario, seeds=2, only="live"), quiet())
    live = LiveEpisodes.load(tmp_path / "x")
    assert live is not None
    pairs = play_twins(live, live.scenario)
    for pair in pairs:
        more = 1.04 if pair.twin.seeds[0] == 2000 else 1.06
        pair.twin.gpu["energy_j"][:] *= more * (5.0 if pair.twin.policy == "rule_based" else 1.0)
        pair.twin.gpu["temp_c"][:] += 3.0 if pair.twin.policy == "static" else -2.0
    comparison = compare(pairs)
    energy, peak = (next(q for q in QUANTITIES if q.name == name) for name in ("energy_j", "peak_c"))
    np.testing.assert_allclose(comparison.gaps("static", energy), [4.0, 6.0])
    assert comparison.met("static", energy) is False  # 5% on average, but not in every episode
    np.testing.assert_allclose(comparison.gaps("static", peak), [3.0, 3.0])
    assert comparison.met("static", peak) is False and comparison.met("small_batches", peak) is True
    metrics = [episode_metrics(pair.live.recording).iloc[0] for pair in pairs]
    mean = {p: np.mean([m.j_per_good for m in metrics if m.policy == p]) for p in POLICIES}
    assert comparison.ranking.live == sorted(POLICIES, key=lambda p: mean[p])
    mean["rule_based"] *= 5.0
    assert comparison.ranking.twin == sorted(POLICIES, key=lambda p: mean[p])


def test_residual_heat_is_what_a_warmer_sink_adds(scenario: str) -> None:
    problem = Problem.of(load_scenario(scenario, episode_s=40))
    recording = play_twin(problem, make_policy("static", problem), [7], "static")
    warm = with_residual_heat(recording, 6.0, 33.0)
    cold_c, warm_c = 9.0, 15.0  # two sinks under one power
    for t in range(40):
        cold_c, warm_c = relax(cold_c, 12.0, 1.0, 33.0), relax(warm_c, 12.0, 1.0, 33.0)
        for name in ("temp_c", "mem_temp_c"):
            added = warm.gpu[name][t, 0] - recording.gpu[name][t, 0]
            assert added == np.floor(warm_c - cold_c + 0.5)
    np.testing.assert_array_equal(warm.gpu["energy_j"], recording.gpu["energy_j"])


def test_a_start_before_the_card_has_cooled_is_known(
    scenario: str, tmp_path: Path, card: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([37.0 + WARMER_C, 41.0, 39.0, 36.0])  # settled, then the starts
    monkeypatch.setattr(live_session, "cool_down", lambda *_: next(readings))
    monkeypatch.setattr(fidelity_report, "save_figure", lambda draw, path: path)
    result = run(config(tmp_path / "x", scenario, seeds=1), quiet())
    assert result is not None
    found = {row["policy"]: (row["idle_c"], row["start_c"]) for row in result["episodes"]}
    assert [found[policy] for policy, _ in card] == [(36.0, 41.0), (36.0, 39.0), (36.0, 36.0)]


def test_recipes_do_not_follow_the_configuration(scenario: str) -> None:
    problem = Problem.of(load_scenario(scenario))
    recipe = json.loads(json.dumps(recipe_of("small_batches", problem, problem)))
    levels = problem.knobs.levels
    assert recipe["constant"]["batch_size"] == levels["batch_size"][1]
    action, _ = policy_of(recipe, problem).predict(np.zeros((1, 1), np.float32))
    knobs = problem.knobs.knobs(problem.knobs.indices(action, "multi_discrete")[0])
    assert dataclasses.asdict(knobs) == recipe["constant"]
    recipe["constant"]["batch_size"] = 3
    with pytest.raises(ValueError, match="batch_size=3"):
        policy_of(recipe, problem)
    with pytest.raises(ValueError, match="runs/gone is not what was played"):
        policy_of({"model": "runs/gone", "sha256": "0" * 64}, problem)
    rules = recipe_of("gate-change", problem, problem)
    assert policy_of(rules, problem) is not None and rules["sha256"] is not None
    with pytest.raises(ValueError, match="gate-change is not what was played"):
        policy_of(rules | {"sha256": "0" * 64}, problem)


@pytest.fixture
def fake_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "pynvml.py").write_text(PYNVML)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "library"), str(ROOT)]))
    monkeypatch.setattr(segments, "RECORDED_WORLDS", ("live-cpu",))
    monkeypatch.setattr("moe.device.torch_device.uuid_of", lambda device: "recorded")
    yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays on the CPU, which a GPU would replace")
@pytest.mark.usefixtures("fake_nvml")
def test_measured_work_on_this_cpu(tmp_path: Path) -> None:
    """The whole command as on a card: real work in real time, and a telemetry trace beside it."""
    out = tmp_path / "x"
    result = run(config(out, None, policies=("small_batches",), seeds=1, seconds=10), quiet())
    assert result is not None and result["policies"]["small_batches"]["episodes"] == 1
    [row] = result["episodes"]
    assert row["arrived_twin"] == pytest.approx(row["arrived_live"], rel=0.05)
    assert row["quality_twin"] == pytest.approx(row["quality_live"], abs=0.1)
    trace = load_trace(out / "live1_telemetry.csv")
    assert load_driver_info(out / "live1_nvml_info.json").name == "Fake H100"
    [segment] = load_segments(out / "live1_segments.csv")
    assert segment.t1 - segment.t0 == pytest.approx(10.0, abs=1.5) and segment.k == 1.0
    assert trace.t[0] < segment.t0 and segment.t1 < trace.t[-1] + 2.0  # a busy machine delays samples
    assert 0.0 < segment.duty <= 1.0 and segment.steps > 0 and segment.load == "service"
    text = (out / "fidelity.md").read_text()
    assert "simulated device (live-cpu" in text and "measured with the very weights" in text
