"""Accuracy against joules per image, by method of adaptation: `python -m studies.ttt_frontier`.

Every seed is one repeat (`studies.repeats`): it trains the models, weighs each phase of serving and adapting
by itself, and serves every stream without adaptation and by every method, guarded. Every batch is scored
before it is learned from. `--small` is a form of minutes for continuous integration.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from moe import ttt
from moe.data import datasets as data
from moe.device.meter import open_meter
from moe.device.torch_device import one_thread_on_cpu, pick_device
from moe.errors import one_line_errors
from moe.model.config import Size, model_config
from moe.model.transformer import MoEModel
from moe.model.variants import with_stem
from moe.training.evaluate import evaluate_vision
from moe.training.fit import fit
from studies.repeats import StudyError, ensure_repeat, load_repeats, provenance, short_recipe
from studies.ttt_energy import Scale, measure_costs
from studies.ttt_frontier_config import NEVER, Frontier, Trained, load_frontier
from studies.ttt_frontier_report import write_report
from studies.ttt_measure import JOULES, SECONDS
from studies.ttt_play import Batch
from studies.ttt_streams import load_pool, make_stream


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare methods of adaptation by what they bring back and what they cost."""

    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Repeats to run."""
    out: Path = Path("runs/ttt_frontier")
    """Folder of the tables and the figure, and of a folder of repeats per model."""
    config: str = "ttt_frontier"
    """Settings: name in configs/studies, or path of a YAML file."""
    small: bool = False
    """The form of minutes that the settings describe."""
    report_only: bool = False
    """Only make the tables and the figure of the repeats that are there."""


def run_repeat(study: Frontier, name: str, size: Size, device: torch.device, seed: int) -> dict[str, Any]:
    """Train, weigh and play everything of one model and seed; returns plain JSON types.

    Raises:
        StreamError: A stream needs more images than there are.
        TrainingDiverged: A loss is not finite.
        GpuUnavailableError: A CUDA device that NVML does not read.
    """
    meter, own = open_meter(device), study.sizes[size]
    pool = load_pool("vision", size, device)
    streams = {n: make_stream(study.stream_config(n, size), pool, seed) for n in study.streams}
    marks = [time.perf_counter()]
    model = _train(study, study.models[name], size, device, seed)
    marks.append(time.perf_counter())
    bench = Bench(study, model, own.batch_size)
    scale = Scale(meter, device, own.window_s)
    costs = measure_costs(model, next(iter(streams.values())), study.methods, bench.unguarded, scale)
    marks.append(time.perf_counter())
    plays = list(itertools.product(streams, (NEVER, *study.methods)))
    runs = [
        {"stream": stream} | bench.play(method, streams[stream])
        for stream, method in tqdm(plays, desc=f"{name}, seed {seed}", unit="run", mininterval=1.0)
    ]
    marks.append(time.perf_counter())
    parts = ("training", "costs", "streams")
    return {
        "settings": study.settings(name, size, device.type),
        **provenance("vision", size, device, seed),
        "spent_s": {
            part: end - start for part, (start, end) in zip(parts, itertools.pairwise(marks), strict=True)
        },
        "cost_unit": SECONDS if meter is None else JOULES,
        "batch_size": own.batch_size,
        "shifts": {stream: [batch.shift for batch in batches] for stream, batches in streams.items()},
        "model": name,
        "config": model.config.to_dict(),
        "n_params": model.n_params,
        "clean": evaluate_vision(model, pool.inputs[0], pool.targets[0], model.config.top_k),
        "costs": dataclasses.asdict(costs),
        "runs": runs,
    }


def _train(study: Frontier, trained: Trained, size: Size, device: torch.device, seed: int) -> MoEModel:
    own, config = study.sizes[size], model_config("vision", size)
    recipe = short_recipe("vision", size, own.steps, batch_size=own.train_batch_size, augment=trained.augment)
    return fit(with_stem(config) if trained.stem else config, recipe, device, seed)[0]


class Bench:
    """A trained model, and the methods that adapt it one at a time."""

    def __init__(self, study: Frontier, model: MoEModel, batch_size: int) -> None:
        """Take clean training batches for the methods that measure gradients beforehand."""
        self._study, self._model = study, model
        images = data.load_vision("train")[0][: study.source_batches * batch_size]
        self._source: tuple[Tensor, ...] = images.to(model.position.device).split(batch_size)

    def unguarded(self, method: str) -> ttt.Adapter:
        """An adapter by a method without guards."""
        return self._adapter(method, None)

    def _adapter(self, method: str, guard: ttt.GuardSettings | None) -> ttt.Adapter:
        adapter = ttt.Adapter(self._model, self._study.methods[method].make_settings(), guard=guard)
        if type(adapter.settings) is ttt.Eata:
            ttt.fisher_anchor(self._model, adapter.state, self._source)
        return adapter

    def play(self, method: str, batches: list[Batch]) -> dict[str, Any]:
        """Serve a stream once under guards; the model is afterwards as it was. Returns plain JSON types."""
        adapter = None if method == NEVER else self._adapter(method, ttt.GuardSettings())
        correct, steps = [], []
        for batch in batches:
            with torch.no_grad():
                logits = self._model(batch.inputs).logits
            correct.append((logits.argmax(dim=-1) == batch.targets).float().mean())
            steps.append(0 if adapter is None else adapter.adapt(batch.inputs, logits, 1))
        guard = None if adapter is None else dataclasses.asdict(adapter.counters)
        if adapter is not None:
            adapter.reset()
        return {"method": method, "quality": torch.stack(correct).tolist(), "steps": steps, "guard": guard}


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there."""
    study, size = load_frontier(arguments.config), arguments.size
    if size not in study.sizes:
        raise StudyError(f"{arguments.config} has no size {size!r}, only {tuple(study.sizes)}")
    study = study.made_small() if arguments.small else study
    if not arguments.report_only:
        device = pick_device(arguments.device)
        one_thread_on_cpu(device)  # as in the measured service: the same arithmetic in every repeat
        for seed, name in itertools.product(arguments.seeds, study.models):
            settings = study.settings(name, size, device.type)
            run = partial(run_repeat, study, name, size, device, seed)
            ensure_repeat(arguments.out / name, "vision", size, seed, settings, run)
    repeats = [r for name in study.models for r in load_repeats(arguments.out / name, "vision", size)]
    if not repeats:
        raise StudyError(f"{arguments.out} holds no repeat of size {size!r}: run it first")
    write_report(repeats, arguments.out, Console())


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
