"""The twin of tokens against a card: `python -m benchmarks.live_against_twin --out runs/live_against_twin`.

Runs that nobody fitted: three loads at two settings of the knobs, and one whose knobs change every
second. One of them is played twice, which shows how far the card is from itself. The twin plays the
same requests under the same knobs. What was recorded is kept: where there is no card, or the twin has
changed, only it plays again.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from moe.device.torch_device import device_name, pick_device, uuid_of
from moe.errors import one_line_errors
from moe.files import write_file
from moe.lm.text import documents
from moe.profiling.tokens import provenance
from moe.service.generate.live import GenerateWorkload
from moe.service.queueing import latency_quantile
from moe.token_profile import load_token_profile, save_token_profile
from moe.workload import Knobs, WorkStats
from thermoe_env.device.nvml import NvmlTelemetry
from thermoe_env.live_tokens import Promises, token_service
from thermoe_env.problem.problem import Problem, profile_of
from thermoe_env.problem.scenario import Scenario, load_scenario
from thermoe_env.twin.workload import TwinWorkload

LOADS = (0.15, 0.45, 0.75)
SETTINGS = {
    "standard": {"expert_count": 8, "routing_bias": 0.0},
    "frugal": {"expert_count": 4, "routing_bias": 1.0},
}
COLUMNS = {
    "tokens_per_s": 0.03, "tpot_s": 0.07, "tpot_p99_s": 0.09, "ttft_s": 0.15, "energy_j": 0.04,
    "accuracy": 0.005,
}  # fmt: skip
"""What is compared, and how far the twin may be off, relative; of the accuracy in points."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Play tokens live and in the twin, and compare."""

    out: Path = Path("runs/live_against_twin")
    """Folder of the recordings, `recorded.json` and `profile.json`; what it holds is not played again."""
    seconds: int = 60
    """Of each run."""
    limit_s: float = float("inf")
    """No run begins after so much time; the same command goes on."""
    json: bool = False
    """Print the table as JSON."""

    def __post_init__(self) -> None:
        """Refuse runs in which nothing settles."""
        if self.seconds < 10:
            raise ValueError(f"--seconds must be at least 10, got {self.seconds}")


@dataclass(frozen=True)
class Run:
    """What is asked of both worlds."""

    name: str
    load: float
    setting: str
    """A name of `SETTINGS`, or `changing`."""
    seed: int = 4000

    def knobs(self, second: int, batch_size: int, top_ks: tuple[int, ...]) -> Knobs:
        """Those of a second."""
        if self.setting != "changing":
            wanted: dict[str, Any] = dict(SETTINGS[self.setting])
        else:
            rng = np.random.default_rng((self.seed, second))
            wanted = {
                "expert_count": int(rng.choice(top_ks)), "routing_bias": float(rng.choice((0.0, 0.5, 1.0))),
                "admission": float(rng.choice((0.5, 1.0))), "pace": float(rng.choice((0.8, 1.0))),
            }  # fmt: skip
        wanted["expert_count"] = min(int(wanted["expert_count"]), max(top_ks))
        return Knobs(batch_size=batch_size, **wanted)


RUNS = (
    *(Run(f"{setting}, load {load:g}", load, setting) for load in LOADS for setting in SETTINGS),
    Run("changing every second, load 0.45", 0.45, "changing"),
)
AGAIN = Run(f"standard, load {LOADS[1]:g}, again", LOADS[1], "standard")
"""The run that is played twice."""


def traffic_of(scenario: Scenario, load: float) -> Scenario:
    """The scenario at a load, half as much and half as much again in turns."""
    traffic = replace(scenario.traffic, kind="bursts", low_load=0.6 * load, high_load=1.4 * load, dwell_s=6.0)
    return replace(scenario, traffic=traffic)


def record(scenario: Scenario, arguments: Arguments, clock: Any) -> None:
    """Play what the folder lacks on this machine's card, or CPU, and keep it.

    Raises:
        WeightsError: no weights of the profile's size here.
        ValueError: the folder has runs of another length.
    """
    device = pick_device("auto")
    problem, first = token_service(scenario, device)
    assert problem.tokens is not None and scenario.generate is not None
    path = arguments.out / "recorded.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    if kept.setdefault("seconds", arguments.seconds) != arguments.seconds:
        raise ValueError(
            f"{path} has runs of {kept['seconds']} s: give --seconds {kept['seconds']}, or another --out"
        )
    save_token_profile(problem.tokens, arguments.out / "profile.json")
    telemetry = NvmlTelemetry(uuid_of(device)) if device.type == "cuda" else None
    kept |= {
        "capacity_rps": problem.capacity_rps,
        "device": device_name(device),
        "provenance": provenance(device, None),
    }
    terms, promised = scenario.service, scenario.generate
    began = clock()
    for run in (*RUNS, AGAIN):
        if run.name in kept["runs"] or clock() - began > arguments.limit_s:
            continue
        workload = GenerateWorkload(
            first.engine, first.texts, documents().domain, first.lengths,
            traffic_of(scenario, run.load).traffic, problem.capacity_rps, arguments.seconds + 1,
            Promises(promised.ttft_s, promised.tpot_s, terms.deadline_s, terms.expire_after_s),
        )  # fmt: skip
        workload.warm_up()
        workload.reset(run.seed)
        readings = []
        if telemetry is not None:
            readings.append(asdict(telemetry.reset(run.seed)))
        played = []
        for second in range(arguments.seconds):
            knobs = run.knobs(second, problem.scenario.static.batch_size, _top_ks(problem))
            work = workload.run(knobs, 1.0)
            if telemetry is not None:
                readings.append(asdict(telemetry.read(work, 1.0)))
            played.append(summary_of(work))
        kept["runs"][run.name] = {"intervals": played, "readings": readings}
        write_file(path, json.dumps(kept))
    if telemetry is not None:
        telemetry.close()


def _top_ks(problem: Problem) -> tuple[int, ...]:
    return tuple(int(k) for k in problem.knobs.levels["expert_count"])


def summary_of(work: WorkStats) -> dict[str, Any]:
    """The numbers of an interval, and its times per output token."""
    assert work.tpot_histogram is not None
    energy = None if work.slot_energy_j is None else float(work.slot_energy_j.sum())
    return {
        "answered": sum(work.answered),
        "output_tokens": work.output_tokens, "right_tokens": work.right_tokens,
        "ttft_s": work.ttft_s, "tpot_s": work.tpot_s, "busy_s": work.busy_s, "steps": work.batches,
        "late": sum(work.late), "tpot_histogram": work.tpot_histogram.tolist(), "energy_j": energy,
    }  # fmt: skip


def predict(
    scenario: Scenario, run: Run, capacity_rps: float, profile: Path, seconds: int
) -> list[dict[str, Any]]:
    """The run in the twin."""
    tokens = load_token_profile(profile)
    asked = traffic_of(replace(scenario, episode_s=seconds), run.load)
    own = Problem.of(asked, profile_of(asked, str(profile)), tokens)
    # Load 1.0 is what it was live: the same requests.
    ratio = capacity_rps / own.capacity_rps
    traffic = replace(
        asked.traffic, low_load=asked.traffic.low_load * ratio, high_load=asked.traffic.high_load * ratio
    )
    problem = replace(own, scenario=replace(own.scenario, traffic=traffic))
    workload = TwinWorkload(problem, lambda: 1.0)
    workload.reset(run.seed)
    top_ks, batch_size = _top_ks(problem), problem.scenario.static.batch_size
    return [summary_of(workload.run(run.knobs(second, batch_size, top_ks), 1.0)) for second in range(seconds)]


def measures(
    intervals: list[dict[str, Any]], readings: list[dict[str, Any]], idle_w: float | None
) -> dict[str, float]:
    """`COLUMNS` of a run; energy above idle."""
    answered = np.array([i["answered"] for i in intervals])
    output = sum(i["output_tokens"] for i in intervals)
    mean = {
        name: float((answered * [i[name] for i in intervals]).sum() / max(1.0, answered.sum()))
        for name in ("ttft_s", "tpot_s")
    }
    histogram = np.sum([i["tpot_histogram"] for i in intervals], axis=0)
    energy = [i["energy_j"] for i in intervals]
    if readings and idle_w is not None:
        energy = [r["energy_j"] - idle_w for r in readings[1:]]
    return mean | {
        "tokens_per_s": output / len(intervals),
        "tpot_p99_s": latency_quantile(histogram, 0.99) / 10,  # edges are a tenth of those of whole answers
        "energy_j": float(sum(energy)) if None not in energy else float("nan"),
        "accuracy": sum(i["right_tokens"] for i in intervals) / max(1.0, output),
    }


def main(arguments: Arguments) -> None:
    """Run the benchmark.

    Raises:
        FileNotFoundError: no recording and no card.
    """
    scenario = load_scenario("tokens")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, profile = arguments.out / "recorded.json", arguments.out / "profile.json"
    if torch.cuda.is_available() or not path.exists():
        record(scenario, arguments, time.monotonic)
    kept = json.loads(path.read_text())
    idle_w = load_token_profile(profile).cost.idle_power_w
    rows: dict[str, Any] = {}
    for run in (*RUNS, AGAIN):
        if run.name not in kept["runs"]:
            continue
        live = measures(**kept["runs"][run.name], idle_w=idle_w)
        twin = measures(predict(scenario, run, kept["capacity_rps"], profile, kept["seconds"]), [], None)
        rows[run.name] = {
            "live": live,
            "twin": twin,
            "off": {name: _off(name, twin, live) for name in COLUMNS},
        }
    spread = {}
    twice = f"standard, load {LOADS[1]:g}"
    if AGAIN.name in rows:
        spread = {name: _off(name, rows[AGAIN.name]["live"], rows[twice]["live"]) for name in COLUMNS}
    document = {"device": kept["device"], "seconds": kept["seconds"], "runs": rows, "own_spread": spread,
                "allowed": COLUMNS}  # fmt: skip
    write_file(arguments.out / "compared.json", json.dumps(document, indent=1))
    print(json.dumps(document) if arguments.json else table(document))


def _off(name: str, twin: dict[str, float], live: dict[str, float]) -> float:
    return twin[name] - live[name] if name == "accuracy" else twin[name] / live[name] - 1.0


def table(document: dict[str, Any]) -> str:
    """To read, in Markdown; without a last line end."""
    lines = [
        f"{document['device']}, {document['seconds']} s each; twin over live",
        f"| run | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(_row(name, run["off"]) for name, run in document["runs"].items()),
    ]
    if document["own_spread"]:
        lines.append(_row("the card against itself", document["own_spread"]))
    return "\n".join([*lines, _row("allowed", document["allowed"])])


def _row(name: str, off: dict[str, float]) -> str:
    return f"| {name} | {' | '.join(f'{off[column]:+.1%}' for column in COLUMNS)} |"


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; recorded runs are kept, run the command again to go on"):
        main(tyro.cli(Arguments, description=__doc__))
