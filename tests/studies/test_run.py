"""The five questions: tasks and their resumption, wrappers of policies, fronts, each question in small."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

from agents.policies import make_policy
from agents.rollout import play_twin
from agents.runs import load_policy
from agents.training import load_train_config, train
from moe.traffic import TrafficConfig
from studies import rq2, rq5, run
from studies.plays import Options, Play, Trained, by_stage, indicators
from studies.routing_results import cells_table, claims
from studies.rq_report import difference, non_dominated, relative
from studies.run import Arguments, main
from studies.tasks import StudyError, load_results, run_tasks
from studies.wrappers import Delayed, Held
from thermoe_env.fields import FIELD_NAMES
from thermoe_env.problem import Problem
from thermoe_env.scenario import load_scenario

ROOT = Path(__file__).parents[2]
FIELDS = ("power_w", "temp_c", "busy")
COLUMNS = [FIELD_NAMES.index(name) for name in FIELDS]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(load_scenario("default", episode_s=20))


class Eye:
    """A policy that remembers what it was shown, and in its state how often it was asked."""

    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []
        self.states: list[Any] = []

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        self.shown.append(observation.copy())
        self.states.append(state)
        return np.zeros((len(observation), 4), np.int64), (0 if state is None else state) + 1


def watch(delay_s: float | None, restart: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What comes and what is shown in 12 intervals of 3 environments; one may start anew. [T, n, fields]"""
    rng, eye, state = np.random.default_rng(0), Eye(), None
    seen = rng.uniform(-1, 1, (12, 3, len(FIELD_NAMES))).astype(np.float32)
    policy = Delayed(eye, FIELDS, delay_s, 1.0)
    for t, observation in enumerate(seen):
        start = np.array([t == 0, t in (0, restart), t == 0])
        before = observation.copy()
        _, state = policy.predict(observation, state, start)
        np.testing.assert_array_equal(observation, before)  # what is given is left alone
    assert eye.states == [None, *range(1, 12)]
    return seen, np.stack(eye.shown)


@pytest.mark.parametrize("delay_s", [None, 1.0, 3.0, 15.0])
def test_late_fields_leave_the_others_untouched(delay_s: float | None) -> None:
    seen, shown = watch(delay_s)
    others = [i for i in range(len(FIELD_NAMES)) if i not in COLUMNS]
    assert shown[..., others].tobytes() == seen[..., others].tobytes()


@pytest.mark.parametrize("delay", [1, 3, 15])
def test_a_delay_is_a_shift_by_hand(delay: int) -> None:
    seen, shown = watch(float(delay), restart=5)
    for t in range(12):
        for n, began in enumerate([0, 5 if t >= 5 else 0, 0]):
            by_hand = seen[max(began, t - delay), n, COLUMNS]
            np.testing.assert_array_equal(shown[t, n, COLUMNS], by_hand)


def test_without_a_delay_the_start_of_the_episode_stays() -> None:
    seen, shown = watch(None, restart=5)
    first = np.repeat(seen[:1], 12, axis=0)
    first[5:, 1] = seen[5, 1]
    np.testing.assert_array_equal(shown[..., COLUMNS], first[..., COLUMNS])


@pytest.mark.parametrize(("fields", "delay_s"), [(["watts"], None), (["power_w"], 0.0), (["power_w"], 1.5)])
def test_wrong_fields_and_delays_are_refused(fields: list[str], delay_s: float | None) -> None:
    with pytest.raises(ValueError, match=r"watts|multiple"):
        Delayed(Eye(), fields, delay_s, 1.0)


def test_held_knobs_are_held_and_the_others_are_the_policys(problem: Problem) -> None:
    rules = make_policy("rule_based", problem)
    free = play_twin(problem, rules, [1, 2])
    held = Held(rules, {"expert_count": 8.0}, problem)
    state, start = None, np.ones(2, bool)
    own_state = None
    for observation in free.observation:
        action, state = held.predict(observation, state, start)
        expected, own_state = rules.predict(observation, own_state, start)
        expected[:, problem.knobs.controlled.index("expert_count")] = 3
        np.testing.assert_array_equal(action, expected)
        start = np.zeros(2, bool)
    with pytest.raises(ValueError, match="expert_count cannot be held at 3"):
        Held(rules, {"expert_count": 3.0}, problem)
    with pytest.raises(ValueError, match="pace cannot be held"):
        Held(rules, {"pace": 1.0}, problem)


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


@dataclass(frozen=True)
class Count:
    """A task that counts how often it was run."""

    number: int
    ran: list[int] = field(default_factory=list)
    factor: int = 1
    fails: bool = False
    gpus: int = 0

    @property
    def name(self) -> str:
        return f"count-{self.number}"

    def settings(self) -> dict[str, Any]:
        return {"number": self.number, "factor": self.factor}

    def run(self) -> dict[str, Any]:
        if self.fails:
            raise ValueError("it fails")
        self.ran.append(self.number)
        return {"settings": self.settings(), "value": self.number * self.factor}


def test_only_missing_tasks_are_run(tmp_path: Path) -> None:
    ran: list[int] = []
    tasks = [Count(n, ran) for n in range(4)]
    run_tasks(tasks, tmp_path)
    assert ran == [0, 1, 2, 3] and [p.name for p in tmp_path.glob("*.part")] == []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "count-2.json").unlink()
    with pytest.raises(StudyError, match="lacks 1 results, count-2 first"):
        load_results(tasks, tmp_path)
    run_tasks(tasks, tmp_path)
    assert ran == [0, 1, 2, 3, 2]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [path.name for path in before if before[path] != after[path]] == ["count-2.json"]
    assert [result["value"] for result in load_results(tasks, tmp_path).values()] == [0, 1, 2, 3]


def test_a_failing_task_leaves_what_was_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it fails"):
        run_tasks([Count(0), Count(1, fails=True), Count(2)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["count-0.json"]


def test_results_of_other_settings_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    run_tasks([Count(1)], tmp_path)
    with pytest.raises(StudyError, match="other settings"):
        run_tasks([Count(1, factor=2)], tmp_path)
    (tmp_path / "count-1.json").write_text("{")
    with pytest.raises(StudyError, match="is no JSON"):
        run_tasks([Count(1)], tmp_path)
    with pytest.raises(StudyError, match="different names"):
        run_tasks([Count(1), Count(1)], tmp_path)


LOST_WORKER = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path

import ray
from studies.tasks import load_results, run_tasks

@dataclass(frozen=True)
class Fragile:
    number: int
    folder: str
    gpus: int = 0

    @property
    def name(self):
        return f"fragile-{self.number}"

    def settings(self):
        return {"number": self.number}

    def run(self):
        with open(Path(self.folder) / f"tries-{self.number}", "a") as file:
            file.write("x")
        tries = (Path(self.folder) / f"tries-{self.number}").stat().st_size
        if self.number == 1 and tries == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.number == 2:
            raise ValueError("two is refused")
        return {"settings": self.settings(), "value": self.number, "pid": os.getpid()}

folder = Path(sys.argv[1])
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
tasks = [Fragile(number, str(folder)) for number in range(2)]
run_tasks(tasks, folder / "tasks", "local")
results = load_results(tasks, folder / "tasks")
assert [result["value"] for result in results.values()] == [0, 1], results
assert os.getpid() not in {result["pid"] for result in results.values()}
try:
    run_tasks([*tasks, Fragile(2, str(folder))], folder / "tasks", "local")
except ValueError as error:
    print("refused:", error)
print([(folder / f"tries-{number}").stat().st_size for number in range(3)])
ray.shutdown()
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install '.[ray]'")
def test_a_lost_workers_task_is_done_again_and_a_refused_one_is_not(tmp_path: Path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(LOST_WORKER)
    command, path = [sys.executable, str(script), str(tmp_path)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"refused: two is refused", "[1, 2, 1]"} <= set(done.stdout.splitlines())  # Ray speaks too


def test_without_an_address_ray_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom studies.plays import Play\n"
        "from studies.tasks import run_tasks\nimport studies.run\n"
        "play = Play(name='x', policy='static', seeds=(1,), overrides={'episode_s': 10})\n"
        "run_tasks([play], Path(sys.argv[1]))\nprint('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


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
    monkeypatch.setattr(run, "load_settings", lambda kind, name, folder: kind(**small(kind, name)))
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
    study = run.load_settings(run.QUESTIONS["rq4"], "rq4", "studies")
    options = Options(seeds=(1, 2, 3))
    plays = {play.name: play for play in study.tasks(options)}
    traffic = plays["default-static-load-0.8"].loaded.traffic
    assert (traffic.kind, traffic.low_load, traffic.high_load) == ("poisson", 0.8, 0.8)
    assert traffic.shifts == load_scenario("default").traffic.shifts != TrafficConfig().shifts
    limits = plays["two-devices-static-limit-52"].loaded.limits
    assert limits.temperature_c == 52.0
    assert limits.stage_margins_c == load_scenario("two-devices").limits.stage_margins_c


def test_knobs_are_swept_around_what_the_base_sets(tmp_path: Path) -> None:
    study = run.load_settings(rq5.Study, "rq5", "studies")
    plays = {play.name: play for play in study.tasks(Options(seeds=(1, 2, 3), duration_s=20))}
    static = load_scenario("default").static
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
    study = run.load_settings(rq2.Study, "rq2", "studies")
    monkeypatch.setattr(rq2, "pick_device", lambda wanted: torch.device("cpu"))
    tasks = study.tasks(Options(seeds=(1, 2, 3)))
    assert len(tasks) == len(study.repeats) * len(study.tasks_of)
    assert tasks[0].name == "vision-tiny-seed0" and tasks[0].gpus == 0
    assert tasks[0].settings()["variants"].keys() >= set(study.with_loss) | set(study.with_loss.values())
    with pytest.raises(ValueError, match="at least 3"):
        rq2.Study(config="routing", size="tiny", tasks_of=("vision",), repeats=(0, 1), with_loss={})


def test_an_agent_is_carried_to_the_worker_by_its_files(tmp_path: Path, problem: Problem) -> None:
    folder = tmp_path / "ppo"
    config = load_train_config("ppo")
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
    monkeypatch.setattr(run, "load_settings", lambda kind, name, folder: kind(**small_form))
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
