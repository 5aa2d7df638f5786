"""One repeat of the study of test-time training: train the models, then serve every stream in every way."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from moe import ttt
from moe.data import datasets as data
from moe.data.pools import SamplePool
from moe.device.meter import EnergyMeter, open_meter
from moe.model.config import Norm, Size, Task, model_config
from moe.model.transformer import MoEModel
from moe.model.variants import with_norm, with_rotation_head
from moe.service.budget import EnergyBudget
from moe.training.evaluate import evaluate_language, evaluate_vision
from moe.training.fit import fit
from moe.training.weights import load_model
from studies.repeats import provenance, short_recipe
from studies.ttt_config import METHODS, Adaptation, Run, Study
from studies.ttt_meter import (
    ADAPTING,
    FORWARD,
    GUARD,
    HOST,
    SERVE,
    PhaseClock,
    PhasePower,
    energy_around,
    measure_power,
)
from studies.ttt_play import Batch, Learner, Played, Price, play
from studies.ttt_streams import load_pool, make_stream

JOULES, SECONDS = "J", "s"
"""Units of cost: energy where the device has a meter, else device time."""
PRICED_STEPS = 10
"""Steps that the price of one is the mean of, where energy is the price."""


def run_repeat(study: Study, task: Task, size: Size, device: torch.device, seed: int) -> dict[str, Any]:
    """Train and play everything of one seed; returns plain JSON types.

    Raises:
        StreamError: A stream needs more samples than there are.
        TrainingDiverged: A loss is not finite.
        AdaptationDiverged: An unguarded adaptation ruined its model.
        GpuUnavailableError: A CUDA device that NVML does not read.
    """
    meter, own = open_meter(device), study.sizes[size]
    pool = load_pool(task, size, device)
    runs = study.runs(task)
    names = dict.fromkeys(run.stream for run in runs)
    streams = {name: make_stream(study.stream_config(name, size), pool, seed) for name in names}
    spent_s = {"training": 0.0, "costs": 0.0, "streams": 0.0}
    models: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = []
    norms: dict[Norm, None] = dict.fromkeys(run.norm for run in runs)
    for norm in norms:
        marks = [time.perf_counter()]
        chosen = [run for run in runs if run.norm == norm]
        model, models[norm] = _trained(study, task, size, norm, device, seed)
        marks.append(time.perf_counter())
        bench = Bench(study, size, model, streams, meter, study.load(chosen))
        models[norm]["power"] = None if bench.power is None else dataclasses.asdict(bench.power)
        marks.append(time.perf_counter())
        for run in tqdm(chosen, desc=f"{task}, seed {seed}, {norm}", unit="stream", mininterval=1.0):
            records.append(dataclasses.asdict(run) | bench.measure(run))
        models[norm]["clean"] = clean_quality(model, pool)
        marks.append(time.perf_counter())
        for part, (start, end) in zip(spent_s, itertools.pairwise(marks), strict=True):
            spent_s[part] += end - start
    return {
        "settings": study.settings(task, size, device.type),
        **provenance(task, size, device, seed),
        "spent_s": spent_s,
        "cost_unit": SECONDS if meter is None else JOULES,
        "batch_size": own.batch_size[task],
        "shifts": {name: [batch.shift for batch in batches] for name, batches in streams.items()},
        "models": models,
        "runs": records,
    }


def _trained(
    study: Study, task: Task, size: Size, norm: Norm, device: torch.device, seed: int
) -> tuple[MoEModel, dict[str, Any]]:
    """Train a model, all norms from the same seed on the same batches, or take the shipped one."""
    own, config = study.sizes[size], with_norm(model_config(task, size), norm)
    steps = own.steps[task]
    if steps is None:
        model = load_model(task, size, device)
        return model, {"config": config.to_dict(), "recipe": None, "n_params": model.n_params}
    if study.rotation_head and task == "vision":
        config = with_rotation_head(config)
    recipe = short_recipe(task, size, steps, batch_size=own.train_batch_size[task])
    print(f"{task}, seed {seed}: training norm {norm}", flush=True)
    model, _ = fit(config, recipe, device, seed)
    model.zero_grad(set_to_none=True)  # the last step's gradients are as large as the model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    record = {"config": config.to_dict(), "recipe": dataclasses.asdict(recipe), "n_params": model.n_params}
    return model, record


def clean_quality(model: MoEModel, pool: SamplePool) -> float:
    """Accuracy on the clean test images; bits per byte of the test prose."""
    top_k = model.config.top_k
    if model.config.task == "vision":
        return evaluate_vision(model, pool.inputs[0], pool.targets[0], top_k)
    text = pool.inputs[0].flatten()
    return evaluate_language(model, text, top_k)[1]


class Bench:
    """A trained model with the streams it serves; what it costs is measured on the same device."""

    def __init__(
        self,
        study: Study,
        size: Size,
        model: MoEModel,
        streams: dict[str, list[Batch]],
        meter: EnergyMeter | None,
        load: str,
    ) -> None:
        """Measure the power of each phase, where there is a meter.

        Args:
            study: Its settings.
            size: Of the model.
            model: As it was trained.
            streams: By name.
            meter: Of the device, or None.
            load: Adaptation whose steps power is measured with.
        """
        self._study, self._model, self._streams, self._meter = study, model, streams, meter
        self._adaptations = study.adaptations_at(size)
        self._clock = PhaseClock(model.position.device)
        self._source: list[Tensor] | None = None
        self._prices: dict[str, Price] = {}
        self.power: PhasePower | None = None
        if meter is not None:
            self.power = self._measure_power(meter, load, study.sizes[size].window_s)

    def measure(self, run: Run) -> dict[str, Any]:
        """Serve a stream once; the model is afterwards as it was trained. Returns plain JSON types."""
        batches = self._streams[run.stream]
        limited = run.budget is not None and run != run.reference
        price = self._price(run.adaptation, batches[0]) if limited else None
        adaptation = None if run == run.reference else self._adaptations[run.adaptation]
        learner = self._learner(adaptation, run.guarded)
        gate = None if adaptation is None else self._study.gates[self._model.config.task][run.gate].make()
        budget = None
        if limited:
            budget = EnergyBudget(
                window_s=float(self._study.window_batches),  # a batch's time is the unit
                bank_windows=self._study.bank_windows,
                fraction=run.budget or 0.0,
            )
        learner.answer(*batches[0][:2])  # the first run of a shape compiles and allocates
        self._clock.stop()
        outcome: list[tuple[Played, dict[str, float]]] = []

        def serve() -> None:
            played = play(learner, batches, gate, budget, price)
            outcome.append((played, self._clock.stop()))

        counter_j = None
        if self._meter is None or self.power is None:
            serve()
        else:
            counter_j = energy_around(self._meter, serve, self.power.power_w[HOST])
        played, phase_s = outcome[0]
        if adaptation is not None:
            learner.state.reset(self._model)
        return {
            "quality_of_batch": played.quality,
            "adapted": played.adapted,
            "selected": played.selected,
            "refused": played.refused,
            "guard": None if played.guard is None else dataclasses.asdict(played.guard),
            "price": None if price is None else dataclasses.asdict(price),
            "phase_s": phase_s,
            "phase_cost": self._cost(phase_s),
            "counter_j": counter_j,
        }

    def _cost(self, phase_s: dict[str, float]) -> dict[str, float]:
        """Cost of each phase: joules where there is a meter, else its seconds."""
        if self.power is None:
            return dict(phase_s)
        return {phase: seconds * self.power.power_w[phase] for phase, seconds in phase_s.items()}

    def _learner(self, adaptation: Adaptation | None, guarded: bool) -> Learner:
        learner = Learner(self._model, adaptation, self._clock, guarded)
        kind = None if adaptation is None else METHODS[adaptation.method].settings
        if kind is ttt.Eata:
            ttt.fisher_anchor(self._model, learner.state, self._source_batches())
        if kind is ttt.RmsDynamicEvaluation:
            ttt.gradient_rms(self._model, learner.state, self._source_batches())
        return learner

    def _source_batches(self) -> Sequence[Tensor]:
        """Clean training batches, shaped as those of the streams: seen before serving, not among its cost."""
        if self._source is None:
            shape = next(iter(self._streams.values()))[0].inputs.shape  # [B, ...]
            vision = self._model.config.task == "vision"
            train = data.load_vision("train")[0] if vision else data.load_language("prose", "train")
            n = self._study.source_batches * shape.numel()
            batches = train.flatten()[:n].view(-1, *shape)
            self._source = list(batches.to(self._model.position.device))
        return self._source

    def _price(self, name: str, batch: Batch) -> Price:
        """Price of serving and of a step: joules, or operations counted in matrix products.

        On a CPU time is no price, since what a budget allows would differ from run to run.
        """
        if name not in self._prices:
            learner = self._learner(self._adaptations[name], guarded=self._meter is not None)
            logits = learner.answer(batch.inputs, batch.targets).logits
            self._clock.stop()
            measure = self._counted_price if self._meter is None else self._energy_price
            self._prices[name] = measure(learner, batch, logits)
            learner.state.reset(self._model)
        return self._prices[name]

    def _counted_price(self, learner: Learner, batch: Batch, logits: Tensor) -> Price:
        with FlopCounterMode(display=False) as serving:
            learner.answer(batch.inputs, batch.targets)
        with FlopCounterMode(display=False) as adapting:
            learner.learn(batch.inputs, logits)
        self._clock.stop()
        return Price(float(serving.get_total_flops()), float(adapting.get_total_flops()))

    def _energy_price(self, learner: Learner, batch: Batch, logits: Tensor) -> Price:
        for _ in range(PRICED_STEPS):
            learner.answer(batch.inputs, batch.targets)
            learner.learn(batch.inputs, logits)
        cost = self._cost(self._clock.stop())
        return Price(cost[SERVE] / PRICED_STEPS, sum(cost[phase] for phase in ADAPTING) / PRICED_STEPS)

    def _measure_power(self, meter: EnergyMeter, name: str, window_s: float) -> PhasePower:
        """Power under five loads, each mostly of one phase, in the order of the phases."""
        model, clock, adaptation = self._model, self._clock, self._adaptations[name]
        batch = next(iter(self._streams.values()))[0]
        watched, learner = (self._learner(adaptation, guarded) for guarded in (True, False))
        guard, settings = watched.guard, adaptation.make_settings()
        assert guard is not None
        logits = learner.answer(batch.inputs, batch.targets).logits
        learner.learn(batch.inputs, logits)
        clock.stop()
        learner.answer(batch.inputs, batch.targets)
        serve_s = clock.stop()[SERVE]

        def serve() -> None:
            learner.answer(batch.inputs, batch.targets)

        def forward() -> None:
            clock.enter(FORWARD)
            with torch.enable_grad():
                model(batch.inputs)
            clock.enter(HOST)
            clock.wait()

        def update() -> None:
            learner.learn(batch.inputs, logits)
            clock.wait()

        def judge() -> None:
            clock.enter(GUARD)
            guard.step(lambda *_: ttt.Step(selected=1), batch.inputs, logits, settings)
            clock.enter(HOST)
            clock.wait()

        def pause() -> None:
            learner.answer(batch.inputs, batch.targets)
            time.sleep(serve_s)

        power = measure_power(meter, clock, [serve, forward, update, judge, pause], window_s)
        learner.state.reset(model)
        return power
