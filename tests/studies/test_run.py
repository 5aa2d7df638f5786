"""The five questions: their plays, paired changes, fronts, and each question in small."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

from agents.learning.config import load_train_config
from agents.learning.training import train
from agents.load import load_policy
from agents.play.rollout import play_twin
from agents.policies.registry import make_policy
from moe.service.traffic import TrafficConfig
from studies import rq2, rq5, run
from studies.plays import Options, Play, Trained, by_stage, indicators
from studies.routing_results import cells_table, claims
from studies.rq_report import difference, non_dominated, relative
from studies.run import Arguments, main
from studies.tasks import StudyError
from thermoe_env.mdp.fields import FIELD_NAMES
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(load_scenario("vision", episode_s=20))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_front_against_brute_force(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    for _ in range(20):
        costs = rng.integers(0, 6, (25, dimensions)).astype(float)  # with ties
        costs[rng.integers(25)] = math.inf
        expected = [
            all(math.isfinite(v) for v in own)
            and not any(
                all(b <= a for a, b in zip(own, other, strict=True))
                and any(b < a for a, b in zip(own, other, strict=True))
                for other in costs.tolist()
            )
            for own in costs.tolist()
        ]
        np.testing.assert_array_equal(non_dominated(costs), expected)


def test_changes_are_paired_by_seed() -> None:
    rng = np.random.default_rng(0)
    world, effect = rng.normal(10.0, 3.0, 8), rng.normal(1.0, 0.1, 8)
    rows = [{"policy": "base", "seed": s, "j_per_good": w} for s, w in enumerate(world)]
    rows += [{"policy": "own", "seed": s, "j_per_good": world[s] + effect[s]} for s in reversed(range(8))]
    episodes = pd.DataFrame(rows)
    change = difference(episodes, "own", "base", "j_per_good")
    low, high = stats.t.interval(0.95, 7, effect.mean(), stats.sem(effect))
    np.testing.assert_allclose(change, (effect.mean(), low, high))
    assert change.sure and not difference(episodes, "own", "own", "j_per_good").sure
    ratio = relative(episodes, "own", "base")
    assert ratio.mean == pytest.approx((world + effect).mean() / world.mean() - 1.0)
    assert ratio.low < ratio.mean < ratio.high


def test_indicators_of_experts_against_sums_by_hand(problem: Problem) -> None:
    recording = play_twin(problem, make_policy("rule_based", problem), [1, 2, 3])
    tokens = recording.tokens_per_expert  # [T, n, L, E]
    np.testing.assert_allclose(by_stage(recording).sum(axis=2), tokens.sum(axis=0))
    rows = indicators(recording, problem)
    for i in range(3):
        load = tokens[:, i].sum(axis=0)  # [L, E]
        imbalance = np.mean([np.std(layer) / np.mean(layer) for layer in load])
        assert rows.load_imbalance[i] == pytest.approx(imbalance)
        widths = np.array(problem.profile.model["config"]["expert_widths"])
        narrow = load[:, widths < widths.max()].sum() / load.sum()
        assert rows.narrow_share[i] == pytest.approx(narrow)
        assert rows.temp_sd_c[i] == pytest.approx(recording.gpu["temp_c"][:, i].std())
        assert rows.stage_bits[i] == pytest.approx(0.0, abs=1e-9)  # twenty cool seconds: a single stage
    assert rows.device_spread_c.isna().all()


def test_a_play_is_the_rollout_and_its_result_plain_json(problem: Problem) -> None:
    play = Play(name="x", policy="pid", seeds=(4, 5), overrides={"episode_s": 20})
    result = json.loads(json.dumps(play.run()))
    expected = play_twin(problem, make_policy("pid", problem), [4, 5])
    assert play.record().reward.tobytes() == expected.reward.tobytes()
    assert play.record(1).gpu["temp_c"].tobytes() == expected.episode(0).gpu["temp_c"].tobytes()
    assert result["episodes"]["return"] == expected.reward.sum(axis=0).tolist()
    assert result["settings"] == json.loads(json.dumps(play.settings()))


def test_too_few_seeds_and_chosen_ones_are_refused() -> None:
    with pytest.raises(StudyError, match="at least 3"):
        Arguments(questions=("rq1",), seeds=2)
    with pytest.raises(ValueError, match="choose models"):
        main(Arguments(questions=("rq1",), seed=900_000))


FIGURES = {
    "rq1": {"front-default", "power-default", "experts-default", "signals-energy", "signals-heat"},
    "rq3": {"budgets", "front-default", "power"},
    "rq4": {"load", "limit", "usage"},
    "rq5": {"levels-language", "front-language-static", "power"},
}


@pytest.mark.parametrize("question", sorted(FIGURES))
def test_small_form_writes_its_files(
    question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "load_settings", lambda kind, folder, name: kind(**small(kind, name)))
    arguments = Arguments(questions=(question,), out=tmp_path, seeds=3, duration=20)  # type: ignore[arg-type]
    main(arguments)
    folder = tmp_path / question
    assert FIGURES[question] <= {path.stem for path in folder.glob("*.png")}
    report, said = (folder / "report.md").read_text(), capsys.readouterr().out
    assert "simulated (twin)" in report and "3 paired seeds from 5000, 20 s each" in report
    assert all(sentence.strip() in report for sentence in said.splitlines()[1:-1])
    summary = pd.read_csv(folder / "summary.csv")
    results = sorted(path.stem for path in (folder / "tasks").iterdir())
    assert sorted(summary.policy) == results and (summary.n == 3).all()
    name = results[0]
    energy = json.loads((folder / "tasks" / f"{name}.json").read_text())["episodes"]["energy_j"]
    row = summary.set_index("policy").loc[name]
    assert row.mean_power_w == pytest.approx(np.mean(energy) / 20.0, rel=1e-5)


def small(kind: Any, name: str) -> dict[str, Any]:
    """The shipped settings with fewer of everything, as the study's dataclass takes them."""
    from pydantic import TypeAdapter

    raw = yaml.safe_load((ROOT / "configs" / "studies" / f"{name}.yaml").read_text())
    if name == "rq1":
        raw |= {"delays_s": [5.0], "signals": {"heat": ["temp_c"], "power": ["power_w", "budget_ahead_w"]}}
        raw |= {"bases": ["static"], "drawn": ["static"]}
        raw["variants"] = {"default": raw["variants"]["default"] | {"policies": ["rule_based"]}}
    elif name == "rq3":
        raw |= {"fractions": [0.1, None], "gates": ["always", "change"]}
        raw["variants"] = {"default": raw["variants"]["default"]}
    elif name == "rq4":
        raw |= {"loads": [0.5, 1.2], "limits_c": [44.0, 56.0]}
        raw["variants"] = {"two-devices": raw["variants"]["two-devices"]}
    elif name == "rq5":
        raw |= {"knobs": {"pace_only": "pace"}, "bases": ["static"]}
        raw["variants"] = {"language": raw["variants"]["language"] | {"policies": ["pace_only"]}}
    study = TypeAdapter(kind).validate_python(raw)
    return {name: getattr(study, name) for name in raw}


def test_the_twin_is_given_the_wanted_loads() -> None:
    study = run.load_settings(run.QUESTIONS["rq4"], "studies", "rq4")
    options = Options(seeds=(1, 2, 3))
    plays = {play.name: play for play in study.tasks(options)}
    traffic = plays["default-static-load-0.8"].loaded.traffic
    assert (traffic.kind, traffic.low_load, traffic.high_load) == ("poisson", 0.8, 0.8)
    assert traffic.shifts == load_scenario("vision").traffic.shifts != TrafficConfig().shifts
    limits = plays["two-devices-static-limit-52"].loaded.limits
    assert limits.temperature_c == 52.0
    assert limits.stage_margins_c == load_scenario("two-devices").limits.stage_margins_c


def test_knobs_are_swept_around_what_the_base_sets(tmp_path: Path) -> None:
    study = run.load_settings(rq5.Study, "studies", "rq5")
    plays = {play.name: play for play in study.tasks(Options(seeds=(1, 2, 3), duration_s=20))}
    static = load_scenario("vision").static
    levels = plays["default-static-pace-0.4"].levels
    assert levels == {
        "routing_bias": 0.0, "batch_size": static.batch_size, "expert_count": static.expert_count,
        "ttt_steps": 0.0, "pace": 0.4,
    }  # fmt: skip
    assert plays["default-best_constant-pace-0.4"].levels["ttt_steps"] > 0


def test_energy_loss_is_collected_from_a_finished_routing_study(tmp_path: Path) -> None:
    arguments = Arguments(questions=("rq2",), out=tmp_path, routing=ROOT / "docs" / "results" / "routing")
    main(arguments)
    report = (tmp_path / "rq2" / "report.md").read_text()
    claims = json.loads((ROOT / "docs" / "results" / "routing" / "claims.json").read_text())
    loss = [c for c in claims if c["question"].startswith(("energy-aware", "zero-energy-aware"))]
    assert len(loss) == 12
    for claim in loss:
        if claim["saving"] is not None:
            text = f"{100 * claim['saving']:.1f}% ({100 * claim['saving_low']:.1f} to"
            assert text in report
    assert "NVIDIA H200" in report and (tmp_path / "rq2" / "pareto.png").is_file()
    with pytest.raises(StudyError, match=r"no cells\.csv"):
        main(Arguments(questions=("rq2",), out=tmp_path, routing=tmp_path))


def test_a_repeat_of_the_routing_study_is_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    study = run.load_settings(rq2.Study, "studies", "rq2")
    monkeypatch.setattr(rq2, "pick_device", lambda wanted: torch.device("cpu"))
    tasks = study.tasks(Options(seeds=(1, 2, 3)))
    assert len(tasks) == len(study.repeats) * len(study.tasks_of)
    assert tasks[0].name == "vision-tiny-seed0" and tasks[0].gpus == 0
    assert tasks[0].settings()["variants"].keys() >= set(study.with_loss) | set(study.with_loss.values())
    with pytest.raises(ValueError, match="at least 3"):
        rq2.Study(config="routing", size="tiny", tasks_of=("vision",), repeats=(0, 1), with_loss={})


def test_an_agent_is_carried_to_the_worker_by_its_files(tmp_path: Path, problem: Problem) -> None:
    folder = tmp_path / "ppo"
    config = load_train_config("ppo", scenario="vision")
    own = replace(config.settings, n_minibatches=1, n_epochs=1)  # type: ignore[type-var]
    short = replace(config, settings=own, total_timesteps=600, n_envs=2, eval_freq=600, eval_episodes=2)
    train(short, folder, progress=False)
    agent = Trained.read(folder)
    observation = np.random.default_rng(0).uniform(-1, 1, (5, len(FIELD_NAMES))).astype(np.float32)
    expected, _ = load_policy(folder, problem).predict(observation)
    (folder / "best_model.zip").unlink()
    actions, _ = agent.policy(problem).predict(observation)
    np.testing.assert_array_equal(actions, expected)
    settings = Play(name="x", policy=agent, seeds=(1,)).settings()
    assert settings["policy"] == agent.digest and len(json.dumps(settings)) < 5000


ROUTING: dict[str, Any] = {
    "variants": {
        "standard": {"experts": "even", "fixed_k": 2},
        "uneven": {"experts": "uneven"},
        "frugal": {"experts": "uneven", "recipe": {"energy_lambda": 0.3}},
    },
    "zero_computation": ["zero"],
    "expert_counts": [1, 2],
    "routing_biases": [0.0],
    "usage_expert_count": 2,
    "shift": {"vision": "blur@3", "language": "code"},
    "quality_margin": 0.01,
    "sizes": {
        "tiny": {
            "steps": {"vision": 2, "language": 2},
            "batch_size": {"vision": 16, "language": 4},
            "window_s": 0.01,
            "rounds": 1,
            "test_samples": {"vision": 50, "language": 50},
        },
    },
}


def test_small_form_of_the_energy_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "routing.yaml"
    settings.write_text(yaml.safe_dump(ROUTING, sort_keys=False))
    small_form = {
        "config": str(settings), "size": "tiny", "tasks_of": ("vision",), "repeats": (0, 1, 2),
        "with_loss": {"uneven": "frugal"},
    }  # fmt: skip
    monkeypatch.setattr(rq2, "pick_device", lambda wanted: torch.device("cpu"))
    monkeypatch.setattr(run, "load_settings", lambda kind, folder, name: kind(**small_form))
    main(Arguments(questions=("rq2",), out=tmp_path))
    folder = tmp_path / "rq2"
    assert {path.stem for path in folder.glob("*.png")} == {"pareto", "savings"}
    report = (folder / "report.md").read_text()
    assert "3 repeats" in report and "frugal against uneven" in report and "no energy meter" in report
    repeats = [json.loads(path.read_text()) for path in sorted((folder / "tasks").glob("*.json"))]
    assert [repeat["seed"] for repeat in repeats] == [0, 1, 2]
    (claim,) = [
        c for c in claims(cells_table(repeats), repeats[0]["settings"], 0.01)
        if c.question == "frugal against uneven, setting by setting"
    ]  # fmt: skip
    assert f"| {100 * claim.saving:.1f}% (" in report
