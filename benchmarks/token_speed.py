"""How fast tokens are decoded, and beside what: `python -m benchmarks.token_speed --device cuda --out PATH`.

In one run on one device: the bare engine, launched back to back, beside a floor of what its step has to read;
the service over the engine, under full load; and the Hugging Face class of the same shape, as it is and
compiled, decoding the same documents at the same context. The file is written after each part, so that a run
that is cut keeps what it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.token_speed_hf import Form, HfPlan, decide_routing, measure_hf
from moe.device.meter import open_meter
from moe.device.torch_device import pick_device, serving_dtype
from moe.errors import ThermoeError, one_line_errors
from moe.files import refuse_unwritable, write_file
from moe.lm.config import ENGINE, SIZES, Size
from moe.lm.engine.engine import Engine
from moe.lm.model import LanguageModel, describe, initialise
from moe.lm.text import documents
from moe.lm.weights import weights_path
from moe.profiling.token_cost import Place, copy_bytes_per_s, measure_place
from moe.profiling.tokens import open_engine, provenance
from moe.service.generate.lengths import TokenLengths
from moe.service.generate.live import GenerateWorkload
from moe.service.generate.sequences import Texts
from moe.service.traffic import TrafficConfig
from moe.workload import Knobs, WorkStats

KERNELS_PER_LAYER, KERNEL_S = 12, 2e-6
"""Of the floor: what a layer launches, and what a kernel takes however little it does."""
AIM_RUNNING = 32
AIMS = {
    "step over its floor": 2.0,
    "service over engine": 0.9,
    "eager over engine": 5.0,
    "compiled over engine": 1.0,
}
"""The first at most, the others at least."""
PROMPT, OUTPUT = 64, 900
"""Tokens of the service's requests."""
MOST_WARM_UPS = 200


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of device."""

    size: Size
    running: tuple[int, ...]
    """Sequences that run together."""
    context: int
    """Position of the engine's and the class's tokens."""
    window_s: float
    """Of the engine and of the service, per round."""
    hf_running: int
    hf: HfPlan


PLANS = {
    "cuda": Plan("base", (1, 8, 32, 128, 512), 640, 0.2, 32, HfPlan(warm_ups=5, rounds=5, steps=10)),
    "cpu": Plan("small", (1, 8), 96, 0.2, 8, HfPlan(warm_ups=1, rounds=2, steps=2)),
}
EAGER: tuple[Form, ...] = (Form("eager"), Form("grouped_mm"), Form("batched_mm"))
COMPILED: tuple[Form, ...] = (Form("grouped_mm", compiled=True), Form("batched_mm", compiled=True))
"""`generate` compiles the latter; the loop over experts that `eager` is waits for the device in each layer,
and `generate` never compiles it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure on this machine: size `base` on CUDA, a short run of `small` on a CPU."""

    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 3
    """Visits of each measurement of engine and service."""
    compiled: bool = True
    """Also compile the Hugging Face class; on a CPU that takes minutes."""
    seed: int = 0
    """Of random weights."""
    out: Path | None = None
    """JSON to write."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if self.rounds < 1:
            raise ValueError(f"--rounds must be 1 or more, got {self.rounds}")


@dataclass(frozen=True)
class Terms:
    """Terms of service under which nothing is late or given up."""

    ttft_s: tuple[float, float] = (1e6, 1e6)
    tpot_s: tuple[float, float] = (1e6, 1e6)
    deadline_s: tuple[float, float] = (1e6, 1e6)
    expire_after_s: tuple[float, float] = (1e6, 1e6)


def main(options: Options) -> None:
    """Measure part by part; write whatever is new, print what is whole."""
    if options.out is not None:
        refuse_unwritable(options.out)
    record: dict[str, Any] = {}
    console = Console()
    for part, values in groupby(measure(options, PLANS[options.device]), key=itemgetter(0)):
        for _, value in values:
            record[part] = value
            if options.out is not None:
                _write(record, options.out)
        console.print(_TABLES[part](record[part]) if part in _TABLES else {part: record[part]})
    if options.out is None:
        print(json.dumps(record))


def measure(options: Options, plan: Plan) -> Iterator[tuple[str, Any]]:
    """Yield parts of the record by name as they are done; a part that grows is yielded with each row."""
    began = time.monotonic()
    device = pick_device(options.device)
    run = provenance(device, open_meter(device)) | {"rounds": options.rounds, "seed": options.seed}
    trained = weights_path(plan.size).exists()
    if trained:
        engine, texts = open_engine(plan.size, device)
    else:
        engine, texts = random_engine(plan.size, device, options.seed)
    copy = copy_bytes_per_s(device)
    yield "run", run | {"copy_bytes_per_s": copy, "engine_ready_s": time.monotonic() - began}
    weights = "trained" if trained else "random"
    yield "model", {"size": plan.size, "weights": weights, **describe(engine.model)}
    steps = measure_engine(engine, plan, options.rounds, copy)
    yield "engine", steps
    services: list[dict[str, Any]] = []
    for running in plan.running:
        services.append(measure_service(engine, texts, running, plan.window_s, options.rounds))
        yield "service", services
    tokens = texts.tokens[np.arange(plan.hf_running) % len(texts.tokens), : plan.context + 1]
    step_ms = next(row["ms"] for row in steps if row["running"] == plan.hf_running)
    hf: list[dict[str, Any]] = []
    for row in measure_hf(
        engine.model.config, torch.from_numpy(tokens).long().to(device), serving_dtype(device), options.seed,
        EAGER + (COMPILED if options.compiled else ()), plan.hf,
    ):  # fmt: skip
        hf.append({**row, "over_engine": row["ms"] / step_ms if "ms" in row else None})
        yield "hf", hf
    if device.type == "cuda":
        yield "aims", verdicts(steps, services, hf)
    yield "seconds", time.monotonic() - began


def random_engine(size: Size, device: torch.device, seed: int) -> tuple[Engine, Texts]:
    """An engine of random weights, captured, over the shipped documents; its routers decide."""
    config = SIZES[size][0]
    generator = torch.Generator(device).manual_seed(seed)
    with device:
        model = initialise(LanguageModel(config, serving_dtype(device)), generator)
    decide_routing(model, "router", generator)
    if model.head is not None:
        torch.nn.init.normal_(model.head.weight, std=0.05, generator=generator)
    tokens = documents().tokens.astype(np.int32)
    texts = Texts(tokens, np.zeros((len(tokens), tokens.shape[1] - 1), bool))
    room = ENGINE[device.type]
    engine = Engine(model.serve(), tokens, slots=room["slots"], max_rows=room["max_rows"])
    engine.capture()
    return engine, texts


def step_bytes(model: LanguageModel, running: int, context: int, experts_read: float) -> dict[str, int]:
    """Bytes that a decode step has to read.

    Args:
        model: in serving types.
        running: sequences, each with a token at position `context`.
        context: keys and values behind that token's own.
        experts_read: experts of a layer that it reads, mean over layers.

    Returns:
        Of experts; of other weights, where an embedding that is no head counts by its tokens' rows; of keys
        and values.
    """
    c = model.config
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if name.endswith(("gate_up", "down")))
    other = sum(sizes.values()) - experts
    if not c.tied:
        other -= sizes["embed"] - running * sizes["embed"] // c.vocabulary
    position = 2 * c.n_layers * c.n_kv_heads * c.head_dim * model.embed.element_size()
    return {
        "experts": round(experts * experts_read / c.n_experts),
        "other_weights": other,
        "keys_and_values": running * (context + 1) * position,
    }


def floor_s(n_bytes: int, copy_rate: float, n_layers: int) -> float:
    """Time in which a card reads so many bytes and launches a step's kernels, in seconds."""
    return n_bytes / copy_rate + KERNEL_S * KERNELS_PER_LAYER * n_layers


def measure_engine(engine: Engine, plan: Plan, rounds: int, copy_rate: float | None) -> list[dict[str, Any]]:
    """Steps of the bare engine, launched back to back; numbers of sequences take turns within a round."""
    c = engine.model.config
    places = [Place(n, 0, plan.context, c.top_k, c.n_experts) for n in plan.running]
    cells = [
        [measure_place(engine, place, None, None, plan.window_s) for place in places] for _ in range(rounds)
    ]
    rows = []
    for place, visits in zip(places, zip(*cells, strict=True), strict=True):
        running, read = place.decode_rows, median(cell.experts_read for cell in visits)
        step = _spread([1e3 * cell.step_s for cell in visits])
        n_bytes = step_bytes(engine.model, running, plan.context, read)
        floor = None if copy_rate is None else 1e3 * floor_s(sum(n_bytes.values()), copy_rate, c.n_layers)
        rows.append({
            "running": running, "context": plan.context, "experts_read": read, **step,
            "tokens_per_s": 1e3 * running / step["ms"], "bytes": n_bytes, "floor_ms": floor,
            "over_floor": None if floor is None else step["ms"] / floor,
        })  # fmt: skip
    return rows


def measure_service(
    engine: Engine, texts: Texts, running: int, window_s: float, rounds: int
) -> dict[str, Any]:
    """The service under more load than it can take, and the engine at the service's mean context, in turns.

    A round begins when every place is taken by an answer under way, with an empty queue of prompts.
    """
    prompt, output = np.array([[PROMPT], [OUTPUT]], np.int32)
    lengths = TokenLengths(prompt=prompt, output=output, factor=1.0, truncated=0, without_output=0)
    traffic = TrafficConfig(kind="poisson", low_load=1.0, high_load=1.0)
    service = GenerateWorkload(
        engine, texts, np.zeros(len(texts.tokens), np.int64), lengths, traffic, 2000.0, 60.0, Terms()
    )
    c = engine.model.config
    knobs = Knobs(batch_size=running, expert_count=c.top_k)
    shares, served, bare, contexts, counts = [], [], [], [], []
    for round_ in range(rounds):
        service.reset(round_)
        warm = [service.run(knobs, window_s / 2)]
        while not (warm[-1].output_tokens and not warm[-1].prefill_tokens and _started(warm) >= running):
            if len(warm) == MOST_WARM_UPS:
                raise ThermoeError(
                    f"{running} sequences: prompts still wait after {MOST_WARM_UPS} intervals of "
                    f"{window_s / 2:g} s; measure fewer on this device"
                )
            warm.append(service.run(knobs, window_s / 2))
        start = time.perf_counter()
        stats = service.run(knobs, window_s)
        seconds = time.perf_counter() - start
        service.close()
        engine.reset()
        before = sum(s.output_tokens for s in warm)
        context = mean_context(before / running, (before + stats.output_tokens) / running)
        place = Place(running, 0, context, c.top_k, c.n_experts)
        bare.append(running / measure_place(engine, place, None, None, window_s).step_s)
        served.append(stats.output_tokens / seconds)
        shares.append(served[-1] / bare[-1])
        contexts.append(context)
        counts.append(_counted([*warm, stats]))
    return {
        "running": running, "context": median(contexts), "tokens_per_s": median(served),
        "engine_tokens_per_s": median(bare), "share": median(shares), "range": [min(shares), max(shares)],
        "counts": counts,
    }  # fmt: skip


def mean_context(first: float, last: float) -> int:
    """Mean position of a sequence's output tokens from number `first` to `last`, answer after answer."""
    numbers = np.arange(int(first), max(int(first) + 1, int(last)))
    return round(float((PROMPT + numbers % OUTPUT).mean()))


def verdicts(
    steps: Sequence[dict[str, Any]], services: Sequence[dict[str, Any]], hf: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What came out beside what is aimed at; None where nothing was found."""
    found = [
        ("step over its floor", f"{row['running']} sequences", row["over_floor"])
        for row in steps
        if row["running"] == AIM_RUNNING
    ]
    found += [("service over engine", f"{row['running']} sequences", row["share"]) for row in services]
    found += [
        (f"{row['form']} over engine", f"{row['running']} sequences, {row['experts']}", row["over_engine"])
        for row in hf
    ]
    return [
        {"what": what, "where": where, "found": value, "aim": AIMS[what], "met": _met(what, value)}
        for what, where, value in found
    ]


def _met(what: str, value: float | None) -> bool | None:
    if value is None:
        return None
    return value <= AIMS[what] if what == "step over its floor" else value >= AIMS[what]


def _started(stats: Sequence[WorkStats]) -> float:
    return sum(s.prefill_tokens for s in stats) / PROMPT


def _counted(stats: Sequence[WorkStats]) -> dict[str, Any]:
    """Sums of all that a service did since its reset."""
    by_expert = [s.tokens_per_expert for s in stats if s.tokens_per_expert is not None]  # [L, E] each
    return {
        "prompts": _started(stats),
        "answered": sum(sum(s.answered) for s in stats),
        "output_tokens": sum(s.output_tokens for s in stats),
        "expert_tokens": np.sum(by_expert, axis=(0, 2)).tolist(),  # [L]
    }


def _spread(ms: Sequence[float]) -> dict[str, Any]:
    return {"ms": median(ms), "range_ms": [min(ms), max(ms)]}


def _shown(value: Any) -> str:
    """A cell of a table: a dash for what there is not, a range for two numbers."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "-".join(map(_shown, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def _table(title: str, columns: dict[str, str]) -> Callable[[Sequence[dict[str, Any]]], Table]:
    """How rows are printed: their keys, and what stands above."""

    def table(rows: Sequence[dict[str, Any]]) -> Table:
        made = Table(*columns.values(), title=title)
        for row in rows:
            made.add_row(*(_shown(row.get(key)) for key in columns))
        return made

    return table


_TABLES = {
    "engine": _table("Engine, steps back to back", {
        "running": "running", "experts_read": "experts", "ms": "ms", "range_ms": "range",
        "tokens_per_s": "tokens/s", "floor_ms": "floor, ms", "over_floor": "step/floor",
    }),
    "service": _table("Service at full load", {
        "running": "running", "context": "context", "tokens_per_s": "tokens/s",
        "engine_tokens_per_s": "engine's", "share": "share", "range": "range",
    }),
    "hf": _table("Hugging Face class", {
        "form": "form", "experts": "experts by", "experts_read": "experts", "ms": "ms", "range_ms": "range",
        "over_engine": "over engine", "failed": "failed",
    }),
    "aims": _table("Aims", {"what": "what", "where": "where", "found": "found", "aim": "aim", "met": "met"}),
}  # fmt: skip


def _write(record: dict[str, Any], path: Path) -> None:
    write_file(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
