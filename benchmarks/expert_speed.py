"""What unequal experts and counting cost: `python -m benchmarks.expert_speed --size base --device cuda`.

Unequal experts against equal ones of the same total width, hence of the same arithmetic where tokens are
spread evenly; and a forward pass with its tokens counted against one without. On CUDA each is timed twice, as
launched by the host and as a CUDA graph: small batches take the host longer to launch than the device to do.
What is compared takes turns within each round, so that a drift of the machine touches both.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from moe.device.torch_device import device_name, one_thread_on_cpu, serving_dtype
from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from moe.model.config import Size, model_config
from moe.model.experts import Experts
from moe.model.router import Routing
from moe.model.transformer import MoEModel, initialise


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure on this machine."""

    size: Size = "tiny"
    device: Literal["cpu", "cuda"] = "cpu"
    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Tokens per batch."""
    top_k: int = 4
    rounds: int = 15
    window_s: float = 0.05
    """Time per form and round."""
    out: Path | None = None
    """JSON to write."""


def main(options: Options) -> None:
    """Compare, print the tables, write the JSON."""
    if options.out is not None:
        refuse_unwritable(options.out)
    device = torch.device(options.device)
    one_thread_on_cpu(device)
    rows = [row for n in options.tokens for row in _compare_experts(options, n, device)]
    rows += [row for n in options.tokens for row in _compare_counting(options, n, device)]
    table = Table(
        "tokens", "compared", "ms", "reference", "ms", "ratio", "95% of rounds", title=device_name(device)
    )
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            str(row["tokens"]), row["form"], f"{row['ms']:.3f}", row["reference"],
            f"{row['reference_ms']:.3f}", f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}",
        )  # fmt: skip
    Console().print(table)
    record = {
        "machine": device_name(device), "torch": torch.__version__, "size": options.size,
        "top_k": options.top_k, "rounds": options.rounds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rows": rows,
    }  # fmt: skip
    print(json.dumps(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


@torch.no_grad()
def _compare_experts(options: Options, n_tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Unequal experts over equal ones; tokens are spread evenly, which makes the arithmetic the same."""
    config = model_config("vision", options.size)
    mean = sum(config.expert_widths) // config.n_experts
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_tokens, config.d_model, device=device, generator=generator, dtype=serving_dtype(device))
    routing = _even_routing(n_tokens, options.top_k, config.n_experts, generator)
    unequal = _experts(config.d_model, config.expert_widths, generator, x.dtype)
    equal = _experts(config.d_model, (mean,) * config.n_experts, generator, x.dtype)
    forms = [lambda: unequal(x, routing), lambda: equal(x, routing)]
    names = (f"widths {'+'.join(map(str, sorted(set(config.expert_widths))))}", f"width {mean}")
    return _ratios(options, n_tokens, names, forms, device)


@torch.no_grad()
def _compare_counting(options: Options, n_tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """A forward pass with its tokens counted per expert and layer over one without."""
    config = model_config("vision", options.size)
    generator = torch.Generator(device).manual_seed(0)
    with device:
        model = initialise(MoEModel(config), generator).eval().cast_weights(serving_dtype(device))
    images = torch.randint(0, 256, (n_tokens // 16, 28, 28), device=device, generator=generator).byte()
    counts = torch.zeros(config.n_layers, config.n_experts, dtype=torch.int64, device=device)

    def counted() -> None:
        counts.add_(model(images, options.top_k).tokens_per_expert)

    forms = [counted, lambda: model(images, options.top_k)]
    return _ratios(options, n_tokens, ("forward, counted", "forward"), forms, device)


def _even_routing(n_tokens: int, top_k: int, n_experts: int, generator: torch.Generator) -> Routing:
    """Random distinct experts per token, each expert with as many tokens as any other."""
    device = generator.device
    start = torch.randperm(n_tokens, device=device, generator=generator)[:, None]
    step = torch.arange(top_k, device=device) * (n_experts // top_k)
    experts = (start + step) % n_experts  # [T, K]
    weights = torch.full(experts.shape, 1 / top_k, device=device)
    return Routing(torch.zeros(n_tokens, n_experts, device=device), weights, experts)


def _experts(
    d_model: int, widths: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Experts:
    with generator.device:
        experts = Experts(d_model, widths).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=d_model**-0.5, generator=generator)
    return experts


def _ratios(
    options: Options,
    n_tokens: int,
    names: tuple[str, str],
    forms: list[Callable[[], object]],
    device: torch.device,
) -> list[dict[str, Any]]:
    rows = [_ratio(options, n_tokens, names, forms, device)]
    if device.type == "cuda":
        of_graph = (f"{names[0]}, graph", f"{names[1]}, graph")
        rows.append(_ratio(options, n_tokens, of_graph, [_captured(form) for form in forms], device))
    return rows


def _captured(form: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        form()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form()
    return graph.replay


def _ratio(
    options: Options,
    n_tokens: int,
    names: tuple[str, str],
    forms: list[Callable[[], object]],
    device: torch.device,
) -> dict[str, Any]:
    """Median time of each form, and the median and range of the ratio of the first to the second."""
    repeats = [_repeats(form, options.window_s, device) for form in forms]
    seconds = np.empty((options.rounds, 2))
    for round_ in range(options.rounds):
        for i in (0, 1) if round_ % 2 else (1, 0):
            seconds[round_, i] = _time(forms[i], repeats[i], device)
    ratio = seconds[:, 0] / seconds[:, 1]
    ms = 1e3 * np.median(seconds, axis=0)
    return {
        "tokens": n_tokens, "form": names[0], "ms": float(ms[0]), "reference": names[1],
        "reference_ms": float(ms[1]), "ratio": float(np.median(ratio)),
        "interval": np.quantile(ratio, [0.025, 0.975]).tolist(),
    }  # fmt: skip


def _repeats(form: Callable[[], object], window_s: float, device: torch.device) -> int:
    """Calls that fill a window; also the warm-up."""
    _time(form, 3, device)
    return max(1, round(window_s / _time(form, 3, device)))


def _time(form: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call, back to back."""
    start = time.perf_counter()
    for _ in range(repeats):
        form()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
