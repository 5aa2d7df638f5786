"""Measure the service of tokens: ``python -m moe.profiling tokens --size small --device cpu --out PATH``.

Quality comes first and warms the device up, then adaptation, then the cost of steps in random order. What is
measured is kept beside the profile until that is whole: an interrupted run continues.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from moe.device.meter import EnergyMeter, open_meter
from moe.device.torch_device import device_name, one_thread_on_cpu, pick_device
from moe.files import refuse_unwritable, write_file
from moe.lesson_fit import LessonFit
from moe.lm.adapt import HeadSettings
from moe.lm.config import ENGINE, Size
from moe.lm.engine.engine import Engine
from moe.lm.text import DOMAINS, documents
from moe.lm.weights import identity, load_model, reference
from moe.profiles import ProfileError
from moe.profiling.cost import idle_power_w
from moe.profiling.token_adaptation import DOCUMENTS, measure_adaptation
from moe.profiling.token_cost import (
    WINDOW_S,
    Place,
    copy_bytes_per_s,
    measure_places,
    places,
)
from moe.profiling.token_quality import measure_token_quality, standard_by_position
from moe.service.generate.sequences import Texts
from moe.token_profile import (
    CostCell,
    TokenAdaptation,
    TokenCost,
    TokenProfile,
    TokenQuality,
    first_fault,
    save_token_profile,
)

PLAN: dict[str, dict[int, int]] = {"cuda": {1: 8, 8: 3, 32: 2, 128: 1}, "cpu": {1: 2, 8: 2, 24: 1}}
"""Groups of passages of each domain, by device and running sequences; see `measure_token_quality`."""
SCORED_TOKENS = {"cuda": 128, "cpu": 64}
"""Of each passage."""


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Measure what serving tokens costs here, and how good the answers are."""

    size: Size
    device: Literal["cpu", "cuda"]
    out: Path
    """Profile to write, such as configs/profiles/h200-generate.json."""
    thorough: bool = False
    """A finer grid of readable experts and contexts."""
    window_s: float = WINDOW_S
    """Time under load per visit of a cell, in seconds."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if not 0.0 < self.window_s <= 60.0:
            raise ValueError(f"--window-s must lie in (0, 60], got {self.window_s}")


def open_engine(
    size: Size,
    device: torch.device,
    cache_positions: int | None = None,
    adapts: HeadSettings | None = None,
) -> tuple[Engine, Texts]:
    """The engine of a size, captured, over the shipped documents.

    Args:
        size: of the model.
        device: where.
        cache_positions: room of the cache, see `Engine`.
        adapts: how the head learns, None: not at all.

    Raises:
        WeightsError: no such weights; names the command that makes them.
    """
    one_thread_on_cpu(device)
    texts = Texts(documents().tokens.astype(np.int32), reference(size))
    model, room = load_model(size, device), ENGINE[device.type]
    engine = Engine(
        model, texts.tokens, slots=room["slots"], max_rows=room["max_rows"], cache_positions=cache_positions,
        adapts=adapts,
    )  # fmt: skip
    engine.capture()
    return engine, texts


def measure(options: TokenOptions) -> TokenProfile:
    """Measure a profile, or what is missing of one.

    Raises:
        ProfileError: what is kept of an earlier run is damaged, or of another run.
        ValueError: CUDA is asked for and absent.
        GpuUnavailableError: CUDA is used and NVML does not read the card.
        WeightsError: no weights of this size.
    """
    device = pick_device(options.device)
    meter = open_meter(device)
    began = time.monotonic()
    kept = _Kept(options, device)
    engine, texts = open_engine(options.size, device)
    if kept.idle_w is None and meter:  # with the model in memory: that alone raises the clocks
        kept.idle_w = idle_power_w(meter)
    kept.quality = quality = kept.quality or measure_quality(options.size, engine, texts)
    kept.save()
    kept.adaptation = kept.adaptation or _measure_adaptation(options.size, device, meter, kept.idle_w)
    kept.save()
    measure_places(
        engine, places(engine, thorough=options.thorough), meter, kept.idle_w, options.seed, kept.cells,
        kept.save, window_s=options.window_s,
    )  # fmt: skip
    cost = TokenCost(
        device=device_name(device),
        config=asdict(engine.model.config),
        cells=tuple(kept.cells.values()),
        idle_power_w=kept.idle_w,
        copy_bytes_per_s=copy_bytes_per_s(device),
        provenance=provenance(device, meter)
        | {"seed": options.seed, "window_s": options.window_s, "seconds": round(time.monotonic() - began, 1)},
    )
    return TokenProfile(cost=cost, quality=quality, adaptation=kept.adaptation)


def _measure_adaptation(
    size: Size, device: torch.device, meter: EnergyMeter | None, idle_w: float | None
) -> TokenAdaptation:
    """Measure how the head learns, by an engine of its own: one that adapts answers by two heads."""
    engine, texts = open_engine(size, device, adapts=HeadSettings())
    return measure_adaptation(
        engine, texts.tokens, documents().domain, DOMAINS, DOCUMENTS[device.type], meter, idle_w,
        provenance(device, meter),
    )  # fmt: skip


def measure_quality(size: Size, engine: Engine, texts: Texts) -> TokenQuality:
    """Measure how good the answers of an engine's weights are."""
    device = engine.documents.device
    domain = documents().domain
    cells = measure_token_quality(
        engine, texts, domain, DOMAINS, PLAN[device.type], SCORED_TOKENS[device.type]
    )
    here = identity(size)
    return TokenQuality(
        size=size, weights_sha256=here["weights_sha256"], documents_sha256=here["data_sha256"],
        top_k=engine.model.config.top_k, standard=standard_by_position(texts, domain, DOMAINS), cells=cells,
        provenance=provenance(device, None),
    )  # fmt: skip


def provenance(device: torch.device, meter: EnergyMeter | None) -> dict[str, Any]:
    """Where, when and with what something is measured."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "device": device_name(device),
        "driver": meter.gpu.driver if meter else None,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _kept_path(options: TokenOptions) -> Path:
    return options.out.with_suffix(".partial.json")


class _Kept:
    """What an interrupted run measured, in a file beside the profile."""

    def __init__(self, options: TokenOptions, device: torch.device) -> None:
        self.path = _kept_path(options)
        here = identity(options.size)
        self.run = {"size": options.size, "device": device_name(device), "thorough": options.thorough,
                    "window_s": options.window_s, "seed": options.seed, "torch": torch.__version__,
                    "weights_sha256": here["weights_sha256"],
                    "documents_sha256": here["data_sha256"]}  # fmt: skip
        self.idle_w: float | None = None
        self.cells: dict[Place, CostCell] = {}
        self.quality: TokenQuality | None = None
        self.adaptation: TokenAdaptation | None = None
        if self.path.exists():
            self._read()

    def save(self) -> None:
        """Write all that is measured."""
        parts = {
            name: None if part is None else asdict(part)
            for name, part in (("quality", self.quality), ("adaptation", self.adaptation))
        }
        document = {"run": self.run, "idle_w": self.idle_w, **parts,
                    "cells": [asdict(cell) for cell in self.cells.values()]}  # fmt: skip
        write_file(self.path, json.dumps(document))

    def _read(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            run, self.idle_w = dict(document["run"]), document["idle_w"]
            for values in document["cells"]:
                cell = CostCell(**values)
                self.cells[Place(*(getattr(cell, name) for name in Place._fields))] = cell
            if document["quality"] is not None:
                self.quality = TypeAdapter(TokenQuality).validate_python(document["quality"])
            if document["adaptation"] is not None:
                self.adaptation = TypeAdapter(TokenAdaptation).validate_python(document["adaptation"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = first_fault(error) if isinstance(error, ValidationError) else repr(error)
            raise ProfileError(
                f"{self.path}: kept by an interrupted run, and damaged ({what}): delete it to measure anew"
            ) from error
        if differing := sorted(key for key, value in self.run.items() if run.get(key) != value):
            raise ProfileError(
                f"{self.path}: kept by an interrupted run with another {', '.join(differing)}: repeat that "
                "one, or delete the file to measure anew"
            )


def main(options: TokenOptions) -> None:
    """Measure, save and say what came out.

    Raises:
        OSError: the profile cannot be written; refused before the measurement.
    """
    refuse_unwritable(options.out)
    profile = measure(options)
    save_token_profile(profile, options.out)
    _kept_path(options).unlink(missing_ok=True)
    print(summary(profile))
    print(f"wrote {options.out}")


def summary(profile: TokenProfile) -> str:
    """A few lines of what a profile says, without a last line end."""
    cost, quality, tables = profile.cost, profile.quality, profile.summary()
    spread = sorted(cell.step_spread for cell in cost.cells)
    lines = [
        f"{cost.device}, {quality.size}: {len(cost.cells)} steps measured, spread of their time "
        f"{spread[len(spread) // 2]:.1%} (median), {spread[-1]:.1%} (max)",
        "accuracy by experts per token: "
        + ", ".join(f"{k}: {accuracy:.3f}" for k, accuracy in tables["quality_by_k"].items()),
    ]
    for running, by_bias in tables["quality_by_bias"].items():
        if len(by_bias) > 1:
            shown = ", ".join(f"{bias:g}: {accuracy:.3f}" for bias, accuracy in by_bias.items())
            lines.append(f"accuracy by routing bias, {running} sequences: {shown}")
    for running, by_bias in tables["energy_per_token_by_bias"].items():
        if None not in by_bias.values():
            shown = ", ".join(f"{bias:g}: {1e3 * joules:.2f}" for bias, joules in by_bias.items())
            lines.append(f"mJ per token by routing bias, {running} sequences: {shown}")
    if profile.adaptation is not None:
        lines += adaptation_lines(profile.adaptation)
    return "\n".join(lines)


def adaptation_lines(adaptation: TokenAdaptation) -> list[str]:
    """What the head learns, to read."""
    joules = "" if adaptation.lesson_j is None else f", {adaptation.lesson_j:.3g} J"
    own = ", ".join(
        f"{name}: {-rows[name].loss:+.1%} ({100 * rows[name].accuracy:+.1f} points)"
        for name, rows in adaptation.changed.items()
    )
    error = LessonFit(adaptation).error()
    return [
        f"a lesson of {adaptation.lesson_rows} rows: {1e3 * adaptation.lesson_s:.2f} ms{joules}",
        f"loss that a domain's own lessons save: {own}",
        f"error of what the twin plays on domains by turns: {error['loss_rmse']:.1%} of the loss, "
        f"{100 * error['accuracy_rmse']:.2f} points",
    ]
