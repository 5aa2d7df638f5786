"""What adaptation of the token service gains and costs: `python -m benchmarks.token_adaptation --size small`.

Gain: the documents of each domain are read once, eight side by side, by an engine that begins unadapted, and
again by one that takes no steps. Each token is scored before it teaches; per part of the text, in order, the
bits per token saved and the points of tokens right gained. Price: seconds of the device per lesson, and on a
card joules above idle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from moe.device.meter import open_meter
from moe.device.torch_device import pick_device
from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from moe.lm.adapt import HeadSettings
from moe.lm.config import Size
from moe.lm.engine.engine import Engine
from moe.lm.text import DOMAINS, bytes_per_token, documents
from moe.profiling.cost import idle_power_w
from moe.profiling.token_adaptation import TOGETHER, adapter_of, price, read
from moe.profiling.tokens import open_engine, provenance


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure on this machine."""

    size: Size = "base"
    device: Literal["cpu", "cuda"] = "cuda"
    steps: tuple[int, ...] = (1, 2)
    """Levels of `ttt_steps`."""
    documents: int = 24
    """Of each domain, a multiple of 8."""
    parts: int = 4
    """Of a domain's text, by which the gain is told."""
    window_s: float = 2.0
    """Of the price."""
    out: Path | None = None
    """JSON to write."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if self.documents % TOGETHER or not 0 < self.documents <= 24:
            raise ValueError(f"--documents must be 8, 16 or 24, got {self.documents}")
        if min(self.steps, default=0) < 1 or self.parts < 1 or not self.window_s > 0:
            raise ValueError("--steps and --parts must be at least 1, --window-s above 0")


def main(options: Options) -> None:
    """Measure, print a table, write the JSON."""
    if options.out is not None:
        refuse_unwritable(options.out)
    device = pick_device(options.device)
    meter = open_meter(device)
    engine, _ = open_engine(options.size, device, adapts=HeadSettings())
    idle_w = idle_power_w(meter) if meter else 0.0
    rows = adapter_of(engine).settings.lesson_rows
    prices = {}
    for steps in options.steps:
        seconds, joules = price(engine, steps, meter, idle_w, options.window_s)
        prices[steps] = {"rows": rows, "lesson_s": seconds, "lesson_j": joules}
    gains = []
    for name in tqdm(DOMAINS, desc="domains", mininterval=1.0):
        without = _read(engine, name, 0, options.documents)
        gains += [
            gain(name, steps, _read(engine, name, steps, options.documents), without, options.parts)
            for steps in options.steps
        ]
    parts = [f"part {part + 1}" for part in range(options.parts)]
    table = Table("domain", "steps", "KB", "bits per token", *parts, title="bits saved (points right gained)")
    for row in gains:
        cells = [
            f"{saved:+.1%} ({points:+.1f})" for saved, points in zip(row["saved"], row["points"], strict=True)
        ]
        table.add_row(row["domain"], str(row["steps"]), f"{row['kb']:.0f}", f"{row['bits']:.2f}", *cells)
    Console().print(table)
    record = provenance(device, meter) | {"size": options.size, "prices": prices, "gains": gains}
    print(json.dumps(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _read(engine: Engine, name: str, steps: int, count: int) -> np.ndarray:
    """Read documents of a domain, unadapted at first: loss in nats, right, bytes of each token.  # [3, n]."""
    text = documents()
    engine.reset()
    chosen = np.flatnonzero(text.domain == DOMAINS.index(name))[:count]
    found = read(engine, text.tokens, chosen, steps)
    return np.stack([found.loss, found.right, bytes_per_token()[found.target]])


def gain(name: str, steps: int, adapted: np.ndarray, without: np.ndarray, parts: int) -> dict[str, Any]:
    """What is saved in each part of a domain's text."""
    pairs = list(
        zip(np.array_split(adapted, parts, axis=1), np.array_split(without, parts, axis=1), strict=True)
    )
    return {
        "domain": name, "steps": steps, "kb": float(without[2].sum() / 1024),
        "bits": float(without[0].mean() / np.log(2)),
        "saved": [float(1 - now[0].sum() / then[0].sum()) for now, then in pairs],
        "points": [float(100 * (now[1].mean() - then[1].mean())) for now, then in pairs],
    }  # fmt: skip


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__))
