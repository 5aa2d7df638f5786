"""Models that learn to read few experts in decode: `python -m studies.frugal_tokens`.

Each variant is trained with each seed, then decoded by the engine that serves: accuracy on the held-out
documents, experts read, and on a card joules. A pair of variant and seed is a task: one file, written when it
is whole. The same command makes what is missing.
"""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro

from moe.device.meter import open_meter
from moe.device.torch_device import device_name, one_thread_on_cpu, pick_device
from moe.errors import one_line_errors
from moe.lm.config import LmConfig, Recipe
from moe.lm.corpus import build_corpus, default_roots
from moe.lm.fit import train
from moe.lm.routing_loss import RoutingLoss
from moe.lm.text import documents
from moe.training.checkpoint import cache_folder
from studies.frugal_tokens.measure import measure
from studies.frugal_tokens.report import Target, findings
from studies.rq_report import write_findings
from studies.tasks import StudyError, is_done, load_results, result_path, run_tasks
from thermoe_env.configs import load_settings

STANDARD = "standard"
"""The variant that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A training."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    recipe: dict[str, float] | None = None
    """Keys of `moe.lm.config.Recipe` to replace."""
    read_share: float | None = None
    """Budget as a share of the experts."""
    top_k_share: float = 1.0
    """Experts per token, of the size's."""


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """A model, and what is measured of it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    model: LmConfig
    recipe: Recipe
    seeds: tuple[int, ...]
    documents: dict[int, int]
    """Documents that are scored, by running sequences."""
    contexts: tuple[int, ...]
    """Positions at which the cost of a step is measured, which is their mean."""
    window_s: float
    """Time under load per visit of a cost."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the study; see configs/studies/frugal_tokens.yaml."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    variants: dict[str, Variant]
    serve: tuple[tuple[float, float], ...]
    """(share of the trained experts per token, routing bias) that each model is served with."""
    target: Target
    sizes: dict[Literal["smoke", "study", "base"], SizeSettings]

    def __post_init__(self) -> None:
        if STANDARD not in self.variants or (1.0, 0.0) not in self.serve:
            raise ValueError(
                f"variants must hold {STANDARD!r} and serve [1.0, 0.0]: others are compared with it"
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """A variant trained with one seed and measured, as a task."""

    variant: str
    config: LmConfig
    recipe: Recipe
    seed: int
    size: SizeSettings
    serve: tuple[tuple[float, float], ...]
    device: str
    roots: tuple[Path, ...]

    def __post_init__(self) -> None:
        RoutingLoss(self.config, self.recipe, torch.device("cpu"))  # refuses before minutes are spent

    @property
    def name(self) -> str:
        """See `Task.name`."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def gpus(self) -> int:
        """See `Task.gpus`."""
        return int(self.device == "cuda")

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        measured = {k: v for k, v in asdict(self.size).items() if k not in ("model", "recipe", "seeds")}
        measured["documents"] = list(self.size.documents.items())
        return {
            "variant": self.variant, "seed": self.seed, "device": self.device, "config": asdict(self.config),
            "recipe": asdict(self.recipe), "serve": self.serve, **measured,
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """See `Task.run`."""
        device = torch.device(self.device)
        one_thread_on_cpu(device)
        corpus = build_corpus(cache_folder(), self.roots)
        model, training = train(self.config, self.recipe, corpus.tokens, device, self.seed, name=self.name)
        cells = measure(
            model, documents(), self.serve, self.size.documents, self.size.contexts, self.size.window_s,
            open_meter(device),
        )  # fmt: skip
        return {
            "settings": self.settings(), "training": training, "text": corpus.record, "cells": cells,
            "machine": device_name(device), "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train variants of a language model and compare what they read, cost and know in decode."""

    size: Literal["smoke", "study", "base"] = "study"
    """smoke for a CPU; study and base, the service's own model, for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    only: tuple[str, ...] = ()
    """Variants to run, such as one GPU's part of them; none given: all."""
    limit_s: float = float("inf")
    """No training begins after so much time; the same command goes on."""
    text: tuple[Path, ...] = ()
    """Folders whose text is learned from; none given: /opt, /usr, this Python's library and packages."""
    config: str = "frugal_tokens"
    """Settings: name in configs/studies, or path of a YAML file."""
    out: Path = Path("runs/frugal_tokens")
    """Folder of the results, the report and the figures."""
    report_only: bool = False
    """Only make the report of results that are there; `--device cuda` names their device."""

    def __post_init__(self) -> None:
        """Refuse a limit that runs nothing."""
        if not self.limit_s > 0:
            raise ValueError(f"--limit-s must be above 0, got {self.limit_s}")


def trainings(study: Study, arguments: Arguments) -> list[Training]:
    """All tasks, a seed's variants side by side.

    Raises:
        StudyError: `--only` names an unknown variant.
        ValueError: a variant's recipe or budget cannot be.
    """
    if unknown := sorted(set(arguments.only) - set(study.variants)):
        raise StudyError(f"--only {' '.join(unknown)}: unknown variants; known: {' '.join(study.variants)}")
    size = study.sizes[arguments.size]
    # Results can be reported where there is no such device.
    named = arguments.report_only and arguments.device != "auto"
    device, tasks = arguments.device if named else pick_device(arguments.device).type, []
    for seed in size.seeds:
        for name, variant in study.variants.items():
            config = replace(size.model, top_k=round(variant.top_k_share * size.model.top_k))
            budget = None if variant.read_share is None else variant.read_share * config.n_experts
            recipe: dict[str, Any] = {"read_budget": budget, **(variant.recipe or {})}
            tasks.append(
                Training(
                    variant=name, config=config, recipe=replace(size.recipe, **recipe), seed=seed, size=size,
                    serve=study.serve, device=device, roots=arguments.text or default_roots(),
                )
            )  # fmt: skip
    return tasks


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there.

    Raises:
        StudyError: settings or results that cannot be used, or no result to report.
        ValueError, ThermoeError: as a training or a measurement raises them; results until then are kept.
    """
    study = load_settings(Study, "studies", arguments.config)
    tasks, folder = trainings(study, arguments), arguments.out / arguments.size / "tasks"
    begun_s = time.monotonic()
    for task in [] if arguments.report_only else tasks:
        if (
            task.variant in (arguments.only or study.variants)
            and time.monotonic() - begun_s < arguments.limit_s
        ):
            run_tasks([task], folder)
    there = [task for task in tasks if is_done(result_path(folder, task), task.settings())]
    print(f"{len(there)} of {len(tasks)} trainings are there", flush=True)
    found = findings(load_results(there, folder), STANDARD, study.target)
    write_findings(found, folder.parent, shlex.join(["python", "-m", "studies.frugal_tokens", *sys.argv[1:]]))
    for sentence in found.answer:
        print(sentence)
    print(f"report: {folder.parent / 'report.md'}")


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; results are kept, run the command again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
