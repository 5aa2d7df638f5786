"""What the frontier measures: models that are trained, what they cost, and the streams that they play."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moe import ttt
from moe.data import datasets as data
from moe.device.meter import open_meter
from moe.device.torch_device import serving_dtype
from moe.model.config import Size
from moe.model.transformer import MoEModel
from moe.profiling.cost import idle_power_w
from moe.training.checkpoint import TrainingRecord, load_checkpoint, save_checkpoint
from moe.training.evaluate import evaluate_vision
from moe.training.fit import fit
from studies.repeats import provenance, short_recipe
from studies.ttt_energy import WEIGHINGS, Scale, measure_costs
from studies.ttt_frontier_config import NEVER, Frontier
from studies.ttt_measure import JOULES, SECONDS
from studies.ttt_play import Batch
from studies.ttt_streams import load_pool, make_stream


def weigh(
    study: Frontier, folder: Path, name: str, size: Size, device: torch.device, seed: int
) -> dict[str, Any]:
    """Weigh each phase of serving and adapting a model, which needs the card for itself; plain JSON types.

    What it costs hangs neither on the seed of the model nor on that of the stream, so one model is enough. It
    is kept in `folder`, where the repeat of its seed finds it.

    Raises:
        StreamError: The stream needs more images than there are.
        TrainingDiverged: A loss is not finite.
        GpuUnavailableError: A CUDA device that NVML does not read.
    """
    meter, own = open_meter(device), study.sizes[size]
    clock = Clock()
    model, _ = trained(study, folder, name, size, device, seed)
    clock.mark("training")
    stream = make_stream(study.weighed_stream(size), load_pool("vision", size, device), seed)
    bench, idle_w = Bench(study, model, own.batch_size), idle_power_w(meter) if meter else 0.0
    scale = Scale(meter, device, own.window_s, idle_w)
    weighings = [
        dataclasses.asdict(measure_costs(model, stream, study.methods_of(name), bench.unguarded, scale))
        for _ in tqdm(range(WEIGHINGS), desc=f"{name}, weighed", unit="time", mininterval=1.0)
    ]
    clock.mark("costs")
    return {
        "settings": study.weighing(name, size, device.type),
        **provenance("vision", size, device, seed),
        "spent_s": clock.spent_s,
        "cost_unit": SECONDS if meter is None else JOULES,
        "weighings": weighings,
    }


def run_part(
    study: Frontier, folder: Path, name: str, size: Size, device: torch.device, seed: int, method: str
) -> dict[str, Any]:
    """Play every stream of one model and seed by one method, or `NEVER`; returns plain JSON types.

    Raises:
        StreamError: A stream needs more images than there are.
        TrainingDiverged: A loss is not finite.
    """
    clock = Clock()
    model, clean = trained(study, folder, name, size, device, seed)
    clock.mark("training")
    pool, batch_size = load_pool("vision", size, device), study.sizes[size].batch_size
    streams = {n: make_stream(study.stream_config(n, size), pool, seed) for n in study.streams}
    clock.mark("streams")
    bench = Bench(study, model, batch_size)
    runs = [{"stream": stream} | bench.play(method, batches) for stream, batches in streams.items()]
    clock.mark("playing")
    return {
        "settings": study.settings(name, size, device.type),
        **provenance("vision", size, device, seed),
        "spent_s": clock.spent_s,
        "batch_size": batch_size,
        "shifts": {stream: [batch.shift for batch in batches] for stream, batches in streams.items()},
        "model": name,
        "method": method,
        "config": model.config.to_dict(),
        "n_params": model.n_params,
        "clean": clean,
        "runs": runs,
    }


class Clock:
    """Seconds of the parts of some work, each up to its mark."""

    def __init__(self) -> None:
        """Start."""
        self.spent_s: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def mark(self, part: str) -> None:
        """End a part."""
        now_s = time.perf_counter()
        self.spent_s[part], self._last_s = now_s - self._last_s, now_s


def ensure_trained(
    study: Frontier, folder: Path, name: str, size: Size, device: torch.device, seed: int
) -> Path:
    """Train a model unless its weights are kept; returns their file.

    Args:
        study: Settings.
        folder: Of the model's results; weights are kept below it, named after all that they follow from.
        name: Of the model.
        size: Of the model.
        device: Where it is trained.
        seed: Of its training.

    Raises:
        TrainingDiverged: A loss is not finite.
    """
    own, how, config = study.sizes[size], study.models[name], study.models[name].config(size)
    settings = json.dumps(study.training(name, size, device.type), sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    path = folder / "weights" / f"{size}-seed{seed}-{key}.safetensors"
    if path.with_suffix(".json").exists():
        return path
    recipe = short_recipe("vision", size, own.steps, batch_size=own.train_batch_size, augment=how.augment)
    model, _ = fit(config, recipe, device, seed)
    images, labels = (tensor.to(device) for tensor in data.load_vision("test"))
    clean = evaluate_vision(model, images, labels, config.top_k)
    origin = provenance("vision", size, device, seed)
    record = TrainingRecord(
        config=config.to_dict(),
        steps=own.steps,
        quality={str(config.top_k): {"accuracy": clean}},
        **{field: origin[field] for field in ("seed", "date", "machine", "torch", "data_sha256")},
    )
    save_checkpoint(model, record, path)
    return path


def trained(
    study: Frontier, folder: Path, name: str, size: Size, device: torch.device, seed: int
) -> tuple[MoEModel, float]:
    """Return a model as it serves, and its accuracy on clean images, 0 to 1; see `ensure_trained`."""
    config = study.models[name].config(size)
    model, record = load_checkpoint(ensure_trained(study, folder, name, size, device, seed), config)
    model = model.requires_grad_(False).eval().cast_weights(serving_dtype(device)).to(device)
    return model, record.quality[str(config.top_k)]["accuracy"]


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

    def play(self, method: str, batches: Iterable[Batch]) -> dict[str, Any]:
        """Serve a stream once under guards; the model is afterwards as it was. Returns plain JSON types.

        A batch in which a bank found another shift is answered once more, by the state that it put in force.
        """
        adapter = None if method == NEVER else self._adapter(method, ttt.GuardSettings())
        correct, steps, again = [], [], []
        for batch in batches:
            logits = self._answer(batch)
            steps.append(0 if adapter is None else adapter.adapt(batch.inputs, logits, 1))
            again.append(0 if adapter is None else int(adapter.changed))
            logits = self._answer(batch) if again[-1] else logits
            correct.append((logits.argmax(dim=-1) == batch.targets).float().mean())
        guard = None if adapter is None else dataclasses.asdict(adapter.counters)
        if adapter is not None:
            adapter.reset()
        counted = {"steps": steps, "again": again, "guard": guard}
        return {"method": method, "quality": torch.stack(correct).tolist(), **counted}

    @torch.no_grad()
    def _answer(self, batch: Batch) -> Tensor:
        return self._model(batch.inputs).logits  # [B, C]
