"""What the standard model costs: decode over (running sequences, top_k, budget), prefill, sustained load."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import torch
from studies.token_decode.config import Size
from studies.token_decode.decode import DecodeEngine, captured
from studies.token_decode.lm import LanguageModel
from studies.token_decode.routing import RoutingKnobs
from torch import Tensor
from tqdm import tqdm

from moe.device.meter import EnergyMeter, open_meter
from moe.device.torch_device import device_name
from studies.token_decode.metering import TIMED_S, Load, idle, measure, sustained
from studies.token_decode.quality import HeldOut

COPY_BYTES = 4 * 2**30
PROFILED = (32, 512)
"""Running sequences whose step is taken apart by kernel."""
_STEPS, _KERNELS = 20, 20
"""Steps that are profiled, kernels that are named."""


def measure_cost(model: LanguageModel, text: HeldOut, size: Size) -> dict[str, Any]:
    """Measure all costs of a model; on a CPU times alone, and no copy, kernels or heat.

    Args:
        model: in serving types, with experts.
        text: at least as many windows as sequences run together.
        size: what is measured.

    Raises:
        GpuUnavailableError: CUDA without NVML.
        ReadingError: the card's energy counter gives what cannot be.
    """
    device = text.tokens.device
    half = (text.tokens.shape[1] - 1) // 2
    meter = open_meter(device)
    about: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip
    if meter is not None:
        about |= {"driver": meter.gpu.driver, "power_limit_w": meter.gpu.power_limit_w, **idle(meter)}
    cost: dict[str, Any] = {"machine": about, "decode": [], "shares": []}
    for running in tqdm(size.running, desc="decode", unit="batch", delay=2.0):
        cells, share = decode_cells(model, text, half, running, meter)
        cost["decode"] += cells
        cost["shares"].append(share)
    cost["prefill"] = [
        prefill_cell(model, text, length, prompts, top_k, meter)
        for length, prompts in size.prefill
        for top_k in halvings(model.config.top_k)
    ]
    if meter is not None:
        cost["copy_bytes_per_s"] = copy_rate(device)
        cost["kernels"] = {
            str(n): kernel_times(model, text, half, n) for n in PROFILED if n <= len(text.tokens)
        }
        if size.heat_s:
            cost["heat"] = heat(model, text, half, size, meter)
    return cost


def halvings(top_k: int) -> list[int]:
    """The training's top_k, a half, a quarter, and 1."""
    return list(dict.fromkeys((top_k, max(1, top_k // 2), max(1, top_k // 4), 1)))


def knob_cells(running: int, n_experts: int, top_k: int) -> list[tuple[int, int]]:
    """(top_k, budget) pairs to measure; a budget says nothing of one sequence, which reads its own top k."""
    shares = (1.0,) if running == 1 else (1.0, 0.5, 0.25)
    cells = list(itertools.product(halvings(top_k), shares))
    if 1 < running < 512:
        cells += itertools.product((top_k, max(1, top_k // 2)), (0.75, 0.375))
    return [(k, max(k, round(share * n_experts))) for k, share in cells]


def spread_windows(text: HeldOut, n: int) -> Tensor:
    """Windows, evenly chosen.  # [n, S + 1]."""
    return text.tokens[torch.linspace(0, len(text.tokens) - 1, n).long().to(text.tokens.device)]


def decode_cells(
    model: LanguageModel, text: HeldOut, first: int, running: int, meter: EnergyMeter | None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure one number of running sequences.

    Returns:
        A row per (top_k, budget), with the accuracy counted in the same steps, and the share of a step that
        the expert products take, by a step without them.
    """
    c = model.config
    tokens = spread_windows(text, running)
    engine = DecodeEngine(model, tokens, first).capture()
    load = Load(engine.replay, tokens.device)
    cycle = engine.last - first
    rows: list[dict[str, Any]] = []
    for top_k, budget in knob_cells(running, c.n_experts, c.top_k):
        engine.set(top_k, budget)
        # A whole cycle first: every sequence decodes each of its positions once, under these knobs.
        engine.clear()
        for _ in range(cycle):
            engine.replay()
        decoded = cycle * running
        rows.append(
            {
                "running": running, "top_k": top_k, "budget": budget,
                "accuracy": round(engine.right.sum().item() / decoded, 5),
                "nats_per_token": round(engine.nll.sum().item() / decoded, 4),
                "experts_read": round(engine.used.item() / cycle / c.n_layers, 2),
                **measure(load, meter, running),
            }
        )  # fmt: skip
    full_ms = rows[0]["step_ms"]
    share = {"running": running, "step_ms": full_ms}
    for name in ("experts", "moe"):
        bare = DecodeEngine(model, tokens, first, skip=name).capture()
        share[f"without_{name}_ms"] = round(1e3 * _least_seconds(bare), 4)
    share["share_of_experts"] = round(1 - share["without_experts_ms"] / full_ms, 3)
    return rows, share


def _least_seconds(engine: DecodeEngine) -> float:
    load = Load(engine.replay, engine.tokens.device)
    return min(load.seconds_each(TIMED_S) for _ in range(3))


def prefill_load(model: LanguageModel, tokens: Tensor, top_k: int) -> Load:
    """The load of one prefill of prompts, int64, [B, S]: keys and values written, a graph on CUDA."""
    c = model.config
    shape = (len(tokens), c.n_kv_heads, tokens.shape[1], c.head_dim)
    keys, values = (
        [torch.empty(shape, dtype=model.dtype, device=tokens.device) for _ in range(c.n_layers)] for _ in "kv"
    )

    @torch.no_grad()
    def run() -> None:
        x, _ = model(tokens, RoutingKnobs(top_k), list(zip(keys, values, strict=True)))
        model.logits(x[:, -1])

    if not tokens.is_cuda:
        return Load(run, tokens.device)
    graph = captured(run, 2)

    def replay() -> None:
        graph.replay()
        _ = run  # holds what the graph reads and writes

    return Load(replay, tokens.device)


def prefill_cell(
    model: LanguageModel, text: HeldOut, length: int, prompts: int, top_k: int, meter: EnergyMeter | None
) -> dict[str, Any]:
    """Measure the prefill of some prompts of one length."""
    tokens = text.tokens.flatten()[: length * prompts].view(prompts, length).long()
    row = measure(prefill_load(model, tokens, top_k), meter, length * prompts)
    rate = round(length * prompts / row["step_ms"] * 1e3)
    return {"prompt_tokens": length, "prompts": prompts, "top_k": top_k, "tokens_per_s": rate, **row}


def heat(model: LanguageModel, text: HeldOut, first: int, size: Size, meter: EnergyMeter) -> dict[str, Any]:
    """Run decode of the most sequences, then prefill of the most tokens, for long."""
    running = max(size.running)
    engine = DecodeEngine(model, spread_windows(text, running), first).capture()
    decode = sustained(Load(engine.replay, text.tokens.device), meter, size.heat_s, running)
    length, prompts = max(size.prefill, key=lambda cell: cell[0] * cell[1])
    tokens = text.tokens.flatten()[: length * prompts].view(prompts, length).long()
    load = prefill_load(model, tokens, model.config.top_k)
    return {"decode": decode, "prefill": sustained(load, meter, size.heat_s, length * prompts)}


def kernel_times(model: LanguageModel, text: HeldOut, first: int, running: int) -> list[dict[str, Any]]:
    """Device time per kernel of one decode step, longest first (the profiler's own overhead is in none)."""
    from torch.profiler import ProfilerActivity, profile

    engine = DecodeEngine(model, text.tokens[:running], first).capture()
    for _ in range(_STEPS):
        engine.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_STEPS):
            engine.replay()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": e.key[:80], "us": round(e.self_device_time_total / _STEPS, 1), "calls": e.count / _STEPS}
        for e in events[:_KERNELS]
    ]


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_(generator=generator)
    y = torch.empty_like(x)
    return round(2 * COPY_BYTES / Load(lambda: y.copy_(x), device).seconds_each(0.1))
