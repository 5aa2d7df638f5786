"""The live proof: order, resumption, cards, time, and verdicts against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console

from agents.live import session as live_session
from agents.live.episodes import ASIDE, LiveEpisodes
from agents.play.rollout import Recording
from benchmarks import live_proof, live_proof_report
from benchmarks.live_proof import LiveProof, order, run
from benchmarks.live_proof_results import NUMBERS, Estimate, Proof
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import config_path
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.problem.problem import Problem

POLICIES = ("static", "rule_based", "random")
MACHINE = {"device": "a stand-in", "card": "first", "driver": "-", "weights_sha256": "0" * 64}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "vision", ".yaml").read_text())
    (folder / "short.yaml").write_text(yaml.safe_dump(raw | {"profile": str(folder / "profile.json")}))
    return str(folder / "short.yaml")


class Card:
    """The twin in place of a card: what was played on it, and which it is."""

    def __init__(self) -> None:
        self.played: list[tuple[str, int]] = []
        self.machine = dict(MACHINE)
        self.stop_after = math.inf


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card, play = Card(), live_session.play_live

    def play_and_note(env: Any, policy: Any, seed: int, name: str) -> Recording:
        recording = play(env, policy, seed, name)
        if len(card.played) >= card.stop_after:
            return dataclasses.replace(recording, error=KeyboardInterrupt())
        card.played.append((name, seed))
        return recording

    monkeypatch.setattr(live_session, "play_live", play_and_note)
    monkeypatch.setattr(live_proof, "ThermalMoEEnv", lambda scenario, world: ThermalMoEEnv(scenario, "twin"))
    monkeypatch.setattr(live_proof, "machine_of", lambda env: dict(card.machine))
    monkeypatch.setattr(live_proof, "live_problem", lambda scenario, world: Problem.of(scenario))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(live_proof_report, "save_figure", lambda draw, path: path)
    return card


def config(out: Path, scenario: str, **changes: Any) -> LiveProof:
    wanted: dict[str, Any] = {"policies": POLICIES, "seeds": 2, "seconds": 10, "on_cpu": True} | changes
    return LiveProof(out=out, scenario=scenario, **wanted)


def quiet() -> Console:
    return Console(quiet=True)


def test_the_order_is_drawn_per_seed_and_covers_all() -> None:
    orders = [tuple(order(POLICIES, seed, 0)) for seed in range(3000, 3100)]
    assert all(sorted(each) == sorted(POLICIES) for each in orders)
    assert len(set(orders)) == 6  # every permutation of three comes up
    first = [each[0] for each in orders]
    assert all(20 <= first.count(policy) <= 47 for policy in POLICIES)  # 33 +- 3 standard deviations
    assert orders == [tuple(order(POLICIES[::-1], seed, 0)) for seed in range(3000, 3100)]
    assert orders != [tuple(order(POLICIES, seed, 1)) for seed in range(3000, 3100)]


def test_the_same_command_plays_only_what_is_missing(scenario: str, tmp_path: Path, card: Card) -> None:
    card.stop_after = 4
    assert run(config(tmp_path, scenario), quiet()) is None
    wanted = [(label, seed) for seed in (3000, 3001) for label in order(POLICIES, seed, 0)]
    assert card.played == wanted[:4]
    assert run(config(tmp_path, scenario, report_only=True), quiet()) is not None
    assert "cut short" in (tmp_path / "live_proof.md").read_text()
    card.stop_after = math.inf
    proof = run(config(tmp_path, scenario), quiet())
    assert (
        proof is not None and card.played == wanted
    )  # what came before was kept, the interrupted one was played
    run(config(tmp_path, scenario), quiet())
    run(config(tmp_path, scenario, report_only=True), quiet())
    assert card.played == wanted
    # The stand-in is the twin itself: same requests, same device, so nothing is left to predict wrongly.
    for policy in POLICIES:
        assert proof.error_percent(policy, "j_per_good") == pytest.approx(0.0, abs=1.0)
        assert proof.error_percent(policy, "quality") == pytest.approx(0.0, abs=1e-6)
    document = json.loads((tmp_path / "live_proof.json").read_text())
    assert len(document["episodes"]) == 6 and {v["policy"] for v in document["verdicts"]} == {"random"}
    text = (tmp_path / "live_proof.md").read_text()
    assert "not the proof" in text and not (tmp_path / ASIDE).exists()


def test_a_seed_begun_on_another_card_is_played_again_whole(
    scenario: str, tmp_path: Path, card: Card
) -> None:
    card.stop_after = 4  # the first seed whole, the second begun
    run(config(tmp_path, scenario), quiet())
    begun = card.played[3]
    card.played.clear()
    card.stop_after, card.machine["card"] = math.inf, "second"
    run(config(tmp_path, scenario), quiet())
    assert card.played == [(label, 3001) for label in order(POLICIES, 3001, 0)]
    live, aside = LiveEpisodes.load(tmp_path), LiveEpisodes.load(tmp_path / ASIDE)
    assert live is not None and aside is not None
    where = {(int(e.recording.seeds[0]), e.machine["card"]) for e in live.episodes}
    assert where == {(3000, "first"), (3001, "second")} and len(live.episodes) == 6
    [old] = aside.episodes
    assert (old.recording.policy, int(old.recording.seeds[0])) == begun and old.machine["card"] == "first"
    assert "Set aside" in (tmp_path / "live_proof.md").read_text()
    card.machine["driver"] = "another"  # the same card and weights: nothing to play again
    assert live.set_aside(3001, card.machine) == []
    card.machine["weights_sha256"] = "1" * 64
    assert len(live.set_aside(3001, card.machine)) == 3


def test_no_episode_begins_that_would_end_too_late(
    scenario: str, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only episodes move: 10 s are set aside with 3 s more for each, 17 s are what they take."""
    now, play = 0.0, live_session.play_live

    def slow(*args: Any) -> Recording:
        nonlocal now
        now += 17.0
        return play(*args)

    monkeypatch.setattr(live_session, "play_live", slow)
    for module in (live_proof, live_session):
        clock = type("Clock", (), {"monotonic": lambda: now, "perf_counter": lambda: now})
        monkeypatch.setattr(module, "time", clock)
    # Before anything is known 13 s and a cool-down of up to 2 s are set aside; then no cool-down takes time.
    assert run(config(tmp_path, scenario, within_s=14.9, cool_down_s=2.0), quiet()) is None
    assert card.played == []
    with pytest.raises(ValueError, match="no whole live episode yet"):
        run(config(tmp_path, scenario, report_only=True), quiet())
    run(config(tmp_path, scenario, within_s=80.0, cool_down_s=2.0), quiet())
    assert len(card.played) == 4  # at 0, 17, 34, 51; at 68 the fifth's policy is known to take 17
    now = 0.0
    run(config(tmp_path, scenario, within_s=18.9, cool_down_s=2.0), quiet())
    assert len(card.played) == 4  # measured before: 17 s and a cool-down of 2 s do not fit
    run(config(tmp_path, scenario, within_s=19.0, cool_down_s=2.0), quiet())
    assert len(card.played) == 5


def test_the_time_that_decisions_take_is_kept(scenario: str, tmp_path: Path, card: Card) -> None:
    run(config(tmp_path, scenario, seeds=1), quiet())
    live = LiveEpisodes.load(tmp_path)
    assert live is not None
    for episode in live.episodes:
        assert len(episode.decision_s) == 10 and min(episode.decision_s) > 0.0
        assert episode.wall_s is not None and episode.wall_s > sum(episode.decision_s)


def test_what_cannot_be_played_is_refused(scenario: str, tmp_path: Path, card: Card) -> None:
    with pytest.raises(ValueError, match="--on-cpu"):
        run(config(tmp_path, scenario, on_cpu=False), quiet())
    with pytest.raises(ValueError, match="plans on the future of a twin"):
        run(config(tmp_path, scenario, policies=("static", "oracle")), quiet())
    with pytest.raises(ValueError, match="different names"):
        config(tmp_path, scenario, agent=("static",))
    assert card.played == [] and not any(tmp_path.iterdir())
    run(config(tmp_path, scenario, seeds=1, policies=("static",)), quiet())
    with pytest.raises(ValueError, match="episode_s: 20 is wanted, 10 was recorded"):
        run(config(tmp_path, scenario, seconds=20), quiet())


# ---------------------------------------------------------------- verdicts by hand

STATIC, RULES, AGENT = (
    [10.0, 20.0, 12.0, 16.0, 14.0],
    [8.0, 15.0, 9.0, 12.0, 11.0],
    [6.0, 12.0, 7.0, 10.0, 8.0],
)


def proof_of(energy: dict[str, list[float]], **columns: dict[str, list[float]]) -> Proof:
    """A proof whose twin predicts everything exactly."""
    rows = []
    for policy, values in energy.items():
        for i, value in enumerate(values):
            row = dict.fromkeys((q.name for q in NUMBERS), 1.0) | {"above_limit_s": 0.0}
            row |= {"policy": policy, "seed": 3000 + i, "time_s": 100.0, "card": "a", "j_per_good": value}
            row |= {name: column[policy][i] for name, column in columns.items() if policy in column}
            rows.append(row | {"j_drawn_per_good": row["j_per_good"]})
    table = pd.DataFrame(rows)
    return Proof(
        table, table.copy(), table.copy(), {}, ("agent",), "measured (live, NVIDIA H100 80GB HBM3)", 67.0
    )


def verdicts(proof: Proof) -> list[bool]:
    return [verdict.met for verdict in proof.verdicts("agent")]


def test_ratios_by_hand() -> None:
    """t(0.975, 4) = 2.776445."""
    ratio = Estimate.of_ratio(np.array(AGENT), np.array(STATIC))
    logs = [math.log(a / b) for a, b in zip(AGENT, STATIC, strict=True)]
    mean = sum(logs) / 5
    half = 2.776445 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 4 / 5)
    expected = [math.exp(mean), math.exp(mean - half), math.exp(mean + half)]
    np.testing.assert_allclose([ratio.mean, ratio.low, ratio.high], expected, rtol=1e-6)
    assert math.isnan(Estimate.of_ratio(np.array([1.0]), np.array([2.0])).high)


def test_verdicts_by_hand() -> None:
    energy = {"static": STATIC, "rule_based": RULES, "agent": AGENT}
    assert verdicts(proof_of(energy)) == [True] * 7
    four = {name: values[:4] for name, values in energy.items()}
    assert verdicts(proof_of(four)) == [False, *[True] * 6]
    dear = energy | {"agent": [7.6, 15.2, 9.1, 12.1, 10.6]}  # 24% less than static, as the rules
    assert verdicts(proof_of(dear)) == [True, False, True, False, True, True, True]
    # As good as the rules on average but for one seed: below them, within the interval.
    mixed = energy | {"agent": [7.0, 14.0, 8.0, 11.0, 14.0]}
    assert proof_of(mixed).ratio("agent", "rule_based").mean < 1.0
    assert verdicts(proof_of(mixed))[3] is False
    points = {"static": [0.90] * 5, "agent": [0.88, 0.90, 0.90, 0.90, 0.90]}
    assert verdicts(proof_of(energy, quality=points))[2] is True  # 0.4 points on average
    points["agent"] = [0.88] * 5
    assert verdicts(proof_of(energy, quality=points))[2] is False
    above = {"rule_based": [3.0, 0.0, 0.0, 0.0, 0.0], "agent": [3.0, 0.0, 0.0, 0.0, 0.0]}
    assert verdicts(proof_of(energy, above_limit_s=above))[4] is True
    above["agent"] = [0.0, 1.0, 0.0, 0.0, 0.0]  # less in all, but more in one seed
    assert verdicts(proof_of(energy, above_limit_s=above))[4] is False


def test_the_twins_error_by_hand() -> None:
    proof = proof_of({"static": STATIC, "rule_based": RULES, "agent": AGENT})
    agent = proof.twin.policy == "agent"
    proof.twin.loc[agent, "energy_j"] = [1.04, 1.06, 1.04, 1.06, 1.04]  # 4.8% on average
    proof.blind.loc[agent, "latency_p95_s"] = 0.94
    assert proof.error_percent("agent", "energy_j") == pytest.approx(4.8)
    assert verdicts(proof)[5:] == [True, False]
    assert "p95 latency -6.0%" in proof.verdicts("agent")[6].found
    proof.twin.loc[agent, "above_limit_s"] = 0.2  # live it was 0
    assert math.isinf(proof.error_percent("agent", "above_limit_s")) and verdicts(proof)[5] is False


def test_policies_are_paired_on_one_card_only() -> None:
    proof = proof_of({"static": STATIC, "rule_based": RULES, "agent": AGENT})
    proof.live.loc[(proof.live.policy == "agent") & (proof.live.seed == 3004), "card"] = "b"
    assert list(proof.paired("agent", "static").seed) == [3000, 3001, 3002, 3003]
    assert verdicts(proof)[0] is False
