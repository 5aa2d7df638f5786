"""The twin against a card: `python -m benchmarks.live_against_twin --out runs/live_against_twin`.

Runs that nobody fitted: three loads at two settings of the knobs, and one whose knobs change every
second. One of them is played twice, which shows how far the card is from itself. The twin plays the
same requests under the same knobs. What was recorded is kept: where there is no card, or the twin has
changed, only it plays again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.live_against_twin_runs import (
    AGAIN,
    RUNS,
    SCENARIOS,
    TWICE,
    Service,
    is_recorded,
    predict,
    record,
    twin_of,
)
from moe.errors import one_line_errors
from moe.files import write_file
from moe.service.queueing import latency_quantile
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.problem.token_tables import POSTERIOR

COLUMNS: dict[Service, dict[str, float]] = {
    "tokens": {
        "tokens_per_s": 0.03, "tpot_s": 0.07, "tpot_p99_s": 0.09, "ttft_s": 0.15, "energy_j": 0.04,
        "accuracy": 0.005,
    },
    "vision": {
        "answers_per_s": 0.03, "latency_p50_s": 0.15, "latency_p95_s": 0.15, "energy_j": 0.04,
        "accuracy": 0.005,
    },
}  # fmt: skip
"""What is compared, and how far the twin may be off, relative; of the accuracy in points."""
STEP_COLUMNS = ("tpot_s", "ttft_s", "energy_j")
"""What follows from the cost of steps: between the draws of its posterior live runs should lie."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Play a service live and in the twin, and compare."""

    service: Service = "tokens"
    """What serves: answers decoded token by token, or single answers about images."""
    profile: str | None = None
    """Profile of this machine, name or path; default: the scenario's, or on a CPU that CPU's."""
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


def measures(
    intervals: list[dict[str, Any]], readings: list[dict[str, Any]], idle_w: float | None
) -> dict[str, float]:
    """What is compared of a run; energy above idle."""
    answered = np.array([i["answered"] for i in intervals])
    energy = [i["energy_j"] for i in intervals]
    if readings and idle_w is not None:
        energy = [r["energy_j"] - idle_w for r in readings[1:]]
    found = {"energy_j": float(sum(energy)) if None not in energy else float("nan")}

    def quantile(name: str, q: float) -> float:
        return latency_quantile(np.sum([i[name] for i in intervals], axis=0), q)

    if "output_tokens" not in intervals[0]:
        return found | {
            "answers_per_s": float(answered.mean()),
            "latency_p50_s": quantile("latency_histogram", 0.5),
            "latency_p95_s": quantile("latency_histogram", 0.95),
            "accuracy": sum(i["correct"] for i in intervals) / max(1.0, answered.sum()),
        }
    output = sum(i["output_tokens"] for i in intervals)
    mean = {
        name: float((answered * [i[name] for i in intervals]).sum() / max(1.0, answered.sum()))
        for name in ("ttft_s", "tpot_s")
    }
    return (
        found
        | mean
        | {
            "tokens_per_s": output / len(intervals),
            "tpot_p99_s": quantile("tpot_histogram", 0.99) / 10,  # edges are a tenth of those of answers
            "accuracy": sum(i["right_tokens"] for i in intervals) / max(1.0, output),
        }
    )


def main(arguments: Arguments) -> None:
    """Run the benchmark.

    Raises:
        FileNotFoundError: no recording and no card.
    """
    service, profile = arguments.service, arguments.out / "profile.json"
    scenario = load_scenario(SCENARIOS[service])
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not is_recorded(arguments.out):
        record(service, scenario, arguments.out, arguments.seconds, arguments.limit_s, arguments.profile)
    kept = json.loads((arguments.out / "recorded.json").read_text())
    if kept["service"] != service:
        raise ValueError(f"{arguments.out} has runs of {kept['service']}: give --service {kept['service']}")
    fit, spread_out = (twin_of(service, scenario, profile, kept["seconds"], spread) for spread in (0.0, 1.0))
    draws = range(POSTERIOR if service == "tokens" else 0)
    rows: dict[str, Any] = {}
    for run in (*RUNS, AGAIN):
        if run.name not in kept["runs"]:
            continue
        live = measures(**kept["runs"][run.name], idle_w=fit.profile.idle_power_w)
        twin = measures(predict(service, fit, run, kept["capacity_rps"]), [], None)
        rows[run.name] = {"live": live, "twin": twin, "off": _off(service, twin, live)}
        others = [
            measures(predict(service, spread_out, run, kept["capacity_rps"], draw), [], None)
            for draw in draws
        ]
        if others:
            rows[run.name]["within"] = {
                name: bool(min(o[name] for o in others) <= live[name] <= max(o[name] for o in others))
                for name in STEP_COLUMNS
            }
    spread = {}
    if AGAIN.name in rows:
        spread = _off(service, rows[AGAIN.name]["live"], rows[TWICE.name]["live"])
    document = {
        "service": service, "device": kept["device"], "seconds": kept["seconds"], "runs": rows,
        "own_spread": spread, "allowed": COLUMNS[service], "draws": len(draws),
    }  # fmt: skip
    write_file(arguments.out / "compared.json", json.dumps(document, indent=1))
    print(json.dumps(document) if arguments.json else table(document))


def _off(service: Service, twin: dict[str, float], live: dict[str, float]) -> dict[str, float]:
    """Relative differences; of the accuracy in points."""
    return {
        name: twin[name] - live[name] if name == "accuracy" else twin[name] / live[name] - 1.0
        for name in COLUMNS[service]
    }


def table(document: dict[str, Any]) -> str:
    """To read, in Markdown; without a last line end."""
    columns = document["allowed"]
    lines = [
        f"{document['device']}, {document['seconds']} s each; twin over live",
        f"| run | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(_row(name, run["off"]) for name, run in document["runs"].items()),
    ]
    if document["own_spread"]:
        lines.append(_row("the card against itself", document["own_spread"]))
    lines.append(_row("allowed", columns))
    within = [run["within"].values() for run in document["runs"].values() if "within" in run]
    if within:
        inside, n = sum(sum(flags) for flags in within), document["draws"]
        lines.append(
            f"{inside} of {len(within) * len(STEP_COLUMNS)} values of {', '.join(STEP_COLUMNS)} lie between "
            f"the lowest and the highest of {n} draws of the posterior; {(n - 1) / (n + 1):.0%} should"
        )
    return "\n".join(lines)


def _row(name: str, off: dict[str, float]) -> str:
    return f"| {name} | {' | '.join(f'{value:+.1%}' for value in off.values())} |"


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; recorded runs are kept, run the command again to go on"):
        main(tyro.cli(Arguments, description=__doc__))
