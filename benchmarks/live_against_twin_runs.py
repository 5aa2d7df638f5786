"""Runs of a service that nobody fitted, live and in the twin: what is asked, recorded and predicted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from agents.live.compare import with_requests_of
from moe.device.torch_device import device_name, pick_device, uuid_of
from moe.files import write_file
from moe.lm.text import documents
from moe.profiles import save_profile
from moe.profiling.tokens import provenance
from moe.service.generate.live import GenerateWorkload
from moe.service.score.live import LiveWorkload
from moe.token_profile import save_token_profile
from moe.workload import Knobs, Workload, WorkStats
from thermoe_env.device.nvml import NvmlTelemetry
from thermoe_env.live_tokens import Promises, token_service
from thermoe_env.problem.problem import Problem, profile_of
from thermoe_env.problem.scenario import Scenario
from thermoe_env.twin.workload import TwinWorkload
from thermoe_env.worlds import runner_of

Service = Literal["tokens", "vision"]
SCENARIOS: dict[Service, str] = {"tokens": "default", "vision": "vision"}
LOADS = (0.15, 0.45, 0.75)
SETTINGS: dict[Service, dict[str, dict[str, Any]]] = {
    "tokens": {"standard": {}, "frugal": {"expert_count": 4, "routing_bias": 1.0}},
    "vision": {"standard": {}, "frugal": {"expert_count": 1, "routing_bias": 1.0, "batch_size": 512}},
}
"""Knobs that differ from the standard service's."""
CHANGING = {
    "tokens": {"routing_bias": (0.0, 0.5, 1.0), "admission": (0.5, 1.0), "pace": (0.8, 1.0)},
    "vision": {"routing_bias": (0.0, 0.5, 1.0), "batch_size": (512, 1024, 2048), "pace": (0.8, 1.0)},
}
"""Knobs that are drawn anew every second, besides the experts per token."""


@dataclass(frozen=True)
class Run:
    """What is asked of both worlds."""

    name: str
    load: float
    setting: str
    """A name of `SETTINGS`, or `changing`."""
    seed: int = 4000

    def knobs(self, service: Service, second: int, problem: Problem) -> Knobs:
        """Those of a second; no more experts or requests together than the service has."""
        levels, standard = problem.knobs.levels, problem.scenario.static
        if self.setting != "changing":
            wanted: dict[str, Any] = SETTINGS[service][self.setting]
        else:
            rng = np.random.default_rng((self.seed, second))
            wanted = {"expert_count": int(rng.choice(levels["expert_count"]))}
            for name, choices in CHANGING[service].items():
                wanted[name] = type(choices[0])(rng.choice(choices))
        knobs = replace(standard, **wanted)
        return replace(
            knobs,
            expert_count=min(knobs.expert_count, int(max(levels["expert_count"]))),
            batch_size=min(knobs.batch_size, int(max(levels["batch_size"]))),
        )


RUNS = (
    *(Run(f"{setting}, load {load:g}", load, setting) for load in LOADS for setting in SETTINGS["tokens"]),
    Run("changing every second, load 0.45", 0.45, "changing"),
)
TWICE = Run(f"standard, load {LOADS[1]:g}", LOADS[1], "standard")
AGAIN = replace(TWICE, name=f"{TWICE.name}, again")
"""The run that is played twice."""


def traffic_of(scenario: Scenario, load: float) -> Scenario:
    """The scenario at a load, half as much and half as much again in turns."""
    traffic = replace(scenario.traffic, kind="bursts", low_load=0.6 * load, high_load=1.4 * load, dwell_s=6.0)
    return replace(scenario, traffic=traffic)


def _tokens_here(
    scenario: Scenario, profile: Path, seconds: int, measured: str | None
) -> tuple[Problem, Callable[[Scenario], Workload]]:
    """The problem of the weights here, and what serves a scenario's traffic with them."""
    if measured is not None:
        scenario = replace(scenario, profile=measured)
    problem, first = token_service(scenario, pick_device("auto"))
    assert problem.tokens is not None and scenario.generate is not None
    save_token_profile(problem.tokens, profile)
    terms, promised = scenario.service, scenario.generate

    def serve(asked: Scenario) -> Workload:
        workload = GenerateWorkload(
            first.engine, first.texts, documents().domain, first.lengths, asked.traffic, problem.capacity_rps,
            seconds + 1,
            Promises(promised.ttft_s, promised.tpot_s, terms.deadline_s, terms.expire_after_s),
        )  # fmt: skip
        workload.warm_up()
        return workload

    return problem, serve


def _answers_here(
    scenario: Scenario, profile: Path, seconds: int, measured: str | None
) -> tuple[Problem, Callable[[Scenario], Workload]]:
    """The same of single answers."""
    device = pick_device("auto")
    measured = measured or (scenario.profile if device.type == "cuda" else f"cpu-{scenario.task}")
    problem = Problem.of(scenario, profile_of(scenario, measured))
    save_profile(problem.profile, profile)
    runner, levels = runner_of(problem, device.type, None), problem.knobs.levels

    def serve(asked: Scenario) -> Workload:
        workload = LiveWorkload(runner, asked.traffic, problem.capacity_rps, seconds + 1, asked.service)
        sizes, top_ks = ([int(v) for v in levels[name]] for name in ("batch_size", "expert_count"))
        workload.warm_up(sizes, top_ks, 0)
        return workload

    return problem, serve


def record(
    service: Service, scenario: Scenario, folder: Path, seconds: int, limit_s: float, measured: str | None,
    clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Play what the folder lacks on this machine's card, or CPU, and keep it.

    Args:
        service: what serves.
        scenario: its own.
        folder: of the recordings.
        seconds: of each run.
        limit_s: no run begins after so much time.
        measured: profile of this machine, name or path; None is the scenario's, or on a CPU that CPU's.
        clock: of the limit.

    Raises:
        WeightsError: no weights of the profile's size here.
        ValueError: the folder has runs of another length.
    """
    device, path = pick_device("auto"), folder / "recorded.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    if kept.setdefault("seconds", seconds) != seconds:
        raise ValueError(
            f"{path} has runs of {kept['seconds']} s: give --seconds {kept['seconds']}, or another --out"
        )
    here = _tokens_here if service == "tokens" else _answers_here
    problem, serve = here(scenario, folder / "profile.json", seconds, measured)
    kept |= {
        "service": service,
        "capacity_rps": problem.capacity_rps,
        "device": device_name(device),
        "provenance": provenance(device, None),
    }
    telemetry = NvmlTelemetry(uuid_of(device)) if device.type == "cuda" else None
    began = clock()
    for run in (*RUNS, AGAIN):
        if run.name in kept["runs"] or clock() - began > limit_s:
            continue
        workload, readings = serve(traffic_of(scenario, run.load)), []
        workload.reset(run.seed)
        if telemetry is not None:
            readings.append(asdict(telemetry.reset(run.seed)))
        played = []
        for second in range(seconds):
            work = workload.run(run.knobs(service, second, problem), 1.0)
            if telemetry is not None:
                readings.append(asdict(telemetry.read(work, 1.0)))
            played.append(summary_of(work))
        kept["runs"][run.name] = {"intervals": played, "readings": readings}
        write_file(path, json.dumps(kept))
    if telemetry is not None:
        telemetry.close()


def summary_of(work: WorkStats) -> dict[str, Any]:
    """The numbers of an interval, and its latencies."""
    energy = None if work.slot_energy_j is None else float(work.slot_energy_j.sum())
    numbers = {
        "answered": sum(work.answered), "correct": work.correct, "late": sum(work.late),
        "busy_s": work.busy_s, "batches": work.batches, "energy_j": energy,
        "latency_histogram": work.latency_histogram.tolist(),
    }  # fmt: skip
    if work.tpot_histogram is not None:
        numbers |= {
            "output_tokens": work.output_tokens, "right_tokens": work.right_tokens, "ttft_s": work.ttft_s,
            "tpot_s": work.tpot_s, "tpot_histogram": work.tpot_histogram.tolist(),
        }  # fmt: skip
    return numbers


def twin_of(service: Service, scenario: Scenario, profile: Path, seconds: int, spread: float) -> Problem:
    """The problem that the twin plays; `spread` as in `Randomize.steps`."""
    randomize = replace(scenario.randomize, steps=spread)
    asked = replace(scenario, episode_s=seconds, randomize=randomize)
    own = Problem.of(asked, profile_of(asked, str(profile)))
    return own if service == "tokens" else replace(own, profile=own.metered_profile)


def predict(
    service: Service, twin: Problem, run: Run, capacity_rps: float, draw: int = 0
) -> list[dict[str, Any]]:
    """The run in the twin, told nothing but the requests and the knobs; `draw` is of what steps cost."""
    asked = replace(twin, scenario=traffic_of(twin.scenario, run.load))
    problem = with_requests_of(capacity_rps, asked)  # load 1.0 is what it was live
    workload = TwinWorkload(problem, lambda: 1.0)
    workload.reset(run.seed)
    if service == "tokens":
        workload.state.server["draw"] = draw
    return [
        summary_of(workload.run(run.knobs(service, second, problem), 1.0))
        for second in range(twin.scenario.episode_s)
    ]


def is_recorded(folder: Path) -> bool:
    """Whether there is something to compare, or nothing that could play it."""
    return (folder / "recorded.json").exists() and not torch.cuda.is_available()
