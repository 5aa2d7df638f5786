"""Train a model: ``python -m moe.training --task vision --size tiny``.

Training is *elastic*: each layer of each step uses a random number of experts per token, so that one set of
weights serves every top-k (Matryoshka MoE, arXiv 2509.26520).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from moe.data import datasets as data
from moe.device.torch_device import device_name, pick_device, serving_dtype
from moe.errors import ThermoeError, one_line_errors
from moe.files import refuse_unwritable
from moe.model.config import ModelConfig, Norm, Size, Task, ZeroComputation, model_config
from moe.model.losses import expert_groups, load_balance_loss, router_z_loss, step_balance_bias
from moe.model.router import Router, Routing
from moe.model.transformer import Block, ModelOutput, MoEModel, initialise
from moe.model.usage import tokens_per_expert
from moe.model.variants import (
    even,
    fixed_k,
    with_balance_bias,
    with_norm,
    with_rotation_head,
    with_stem,
    with_zero_computation,
)
from moe.training.augment import augment
from moe.training.checkpoint import SHIPPED_FOLDER, TrainingRecord, save_checkpoint
from moe.training.energy_loss import ASSUMED, EnergyTerm, cost_of_experts, measured_cost
from moe.training.energy_report import energy_report, print_report
from moe.training.evaluate import quality_by_top_k
from moe.training.recipes import RECIPES, Recipe
from moe.ttt.rotation import rotation_loss, turned
from moe.ttt.steps import statistics_held

CHECK_EVERY = 20  # steps between looks at the loss: each one makes the host wait for the device


class TrainingDiverged(ThermoeError):
    """The loss stopped being a finite number."""


def train(
    config: ModelConfig,
    recipe: Recipe,
    device: torch.device,
    seed: int = 0,
    expert_cost: Tensor | None = None,
    cost_source: str = "measured",
) -> tuple[MoEModel, TrainingRecord]:
    """Train a model, as `fit` does, and measure it on the test split for its record."""
    model, energy = fit(config, recipe, device, seed, expert_cost, cost_source)
    record = TrainingRecord(
        config=config.to_dict(),
        seed=seed,
        steps=recipe.steps,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=device_name(device),
        torch=torch.__version__,
        data_sha256=data.data_digest(config.task),
        quality=quality_by_top_k(model, device),
        energy=energy,
    )
    return model, record


def fit(
    config: ModelConfig,
    recipe: Recipe,
    device: torch.device,
    seed: int = 0,
    expert_cost: Tensor | None = None,
    cost_source: str = "measured",
) -> tuple[MoEModel, dict[str, Any] | None]:
    """Train a model; returns it and what `TrainingRecord.energy` holds.

    On CUDA the arithmetic is bfloat16 with float32 master weights, and the returned model holds its matrices
    in bfloat16; on a CPU everything is float32. An energy-aware recipe balances the load among experts of one
    kind only, so that their energy decides between the kinds.

    Args:
        config: Shape of the model.
        recipe: How to train it.
        device: Where to train it.
        seed: Seed of weights, batches and the random top-k.
        expert_cost: Measured cost per routed token of each expert, in any unit, for a recipe that is
            energy-aware; None assumes the experts' widths.  # [E]
        cost_source: What measured it, for the record.

    Raises:
        TrainingDiverged: The loss is not finite. ValueError: Text is to be augmented, or the cost or the
        budget does not fit the model, as `energy_loss.EnergyTerm` says.
    """
    if recipe.augment and config.task == "language":
        raise ValueError("augment is for images: leave it 0 for task 'language'")
    energy = EnergyTerm(config, recipe, expert_cost, cost_source, device) if recipe.energy_aware else None
    groups = expert_groups(config).to(device) if energy is not None else None
    model = initialise(_new_model(config, device), torch.Generator(device).manual_seed(seed))
    model.compute_dtype = serving_dtype(device)
    routers = [block.moe.router for block in cast(Iterable[Block], model.blocks)]
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe))
    top_k_source = random.Random(seed)
    batches = _batches(config, recipe.batch_size, device, torch.Generator(device).manual_seed(seed + 1))
    turns_source = torch.Generator(device).manual_seed(seed + 2)
    changes_source = torch.Generator(device).manual_seed(seed + 3)
    model.train()
    progress = tqdm(range(1, recipe.steps + 1), desc=f"train {config.task}", unit="step", mininterval=1.0)
    for step in progress:
        inputs, targets = next(batches)
        if recipe.augment:
            inputs = augment(inputs, recipe.augment, changes_source)
        top_k = top_k_source.choices(config.top_k_choices, k=config.n_layers)
        optimizer.zero_grad(set_to_none=True)
        if config.rotation_head:
            turns = torch.randint(4, (len(inputs),), device=device, generator=turns_source)  # [B]
            with statistics_held(model):  # the model serves upright images
                turn_loss = rotation_loss(model(turned(inputs, turns), top_k), turns)
                (recipe.rotation_weight * turn_loss).backward()
        output = model(inputs, top_k)
        answer_loss, loss = _losses(output, targets, config, recipe, groups)
        if energy is not None:
            loss = loss + energy.loss(output.routing, [router.balance_bias for router in routers])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if config.balance_bias:
            _balance(routers, output.routing, recipe.balance_rate, groups)
        if step % CHECK_EVERY == 0 or step == recipe.steps:
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"the loss is {loss.item()} at step {step}; lower the learning rate "
                    f"({recipe.learning_rate}) or try another seed ({seed}). Nothing was written"
                )
            progress.set_postfix(loss=f"{answer_loss.item():.3f}")
    model.requires_grad_(False).eval().cast_weights(model.compute_dtype)
    return model, energy.record() if energy is not None else None


def _new_model(config: ModelConfig, device: torch.device) -> MoEModel:
    with device:
        return MoEModel(config)


def _optimizer(model: MoEModel, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def _learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to 2%."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _losses(
    output: ModelOutput, targets: Tensor, config: ModelConfig, recipe: Recipe, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the answer's cross-entropy and the total loss, but for the energy."""
    answer_loss = F.cross_entropy(output.logits.flatten(0, -2), targets.flatten())
    loss = answer_loss
    if not config.balance_bias:
        balance = sum(load_balance_loss(routing, groups) for routing in output.routing) / len(output.routing)
        loss = loss + recipe.balance_coefficient * balance
    z_loss = sum(router_z_loss(routing) for routing in output.routing) / len(output.routing)
    return answer_loss, loss + recipe.z_coefficient * z_loss


def _balance(
    routers: Iterable[Router], decisions: Iterable[Routing], rate: float, groups: Tensor | None
) -> None:
    """Move every router's balance bias by what its step's load asks for."""
    for router, routing in zip(routers, decisions, strict=True):
        assert router.balance_bias is not None
        counts = tokens_per_expert(routing)  # [E]
        router.balance_bias = step_balance_bias(router.balance_bias, counts, rate, groups)


def _batches(
    config: ModelConfig, batch_size: int, device: torch.device, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches without end: images and labels, or bytes and the bytes that follow."""
    if config.task == "vision":
        images, labels = (tensor.to(device) for tensor in data.load_vision("train"))
        while True:
            order = torch.randperm(len(images), device=device, generator=generator)
            for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
                yield mirror(images[chosen], generator), labels[chosen]
    text = data.load_language("prose", "train").to(device)
    window = torch.arange(config.context_length + 1, device=device)  # [S + 1]
    while True:
        last_start = len(text) - len(window)
        start = torch.randint(last_start + 1, (batch_size, 1), device=device, generator=generator)
        piece = text[start + window]  # [B, S + 1]
        yield piece[:, :-1], piece[:, 1:].long()


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror a random half of the images, [B, 28, 28]; in so short a training, shifts too cost accuracy."""
    chosen = torch.rand(len(images), 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(chosen, images.flip(-1), images)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a workload model and save its weights."""

    task: Task
    """What the model does."""
    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    steps: int | None = None
    """Optimizer steps; None means the recipe's."""
    seed: int = 0
    """Seed of weights, batches and the random top-k."""
    energy_lambda: float = 0.0
    """Weight of the experts' energy in the loss, usefully 0 to 1."""
    energy_budget: float | None = None
    """Energy of the chosen experts, as a fraction of that of even routing; finds its own lambda."""
    expert_cost: Path | None = None
    """Profile of this model with the measured cost of its experts; None assumes their widths."""
    balance: Literal["loss", "bias"] = "loss"
    """What keeps the load even: a loss, or a bias of the router (arXiv 2408.15664)."""
    zero_computation: tuple[ZeroComputation, ...] = ()
    """Further experts that compute next to nothing."""
    even: bool = False
    """Experts of one width and as many parameters, a standard Mixture-of-Experts."""
    fixed_k: int | None = None
    """Train for this number of experts per token alone."""
    norm: Norm | None = None
    """Normalisation; None means the shipped model's. Text takes layer or rms."""
    stem: bool = False
    """A convolutional stem, with norms from the first convolution on, for test-time training."""
    augment: float = 0.0
    """Share of the images that are changed at random while training."""
    rotation_head: bool = False
    """A second head that tells how far an image is turned, for test-time training (arXiv 1909.13231)."""
    report: bool = False
    """Show quality, energy and load at every number of experts per token, trained or not, and save it."""
    out: Path = Path("runs/weights")
    """Folder for weights and JSON, named after the task, the size and what differs from the shipped model."""

    def config(self) -> ModelConfig:
        """Return the shape of the model."""
        config = with_zero_computation(model_config(self.task, self.size), self.zero_computation)
        config = even(config) if self.even else config
        config = config if self.fixed_k is None else fixed_k(config, self.fixed_k)
        config = config if self.norm is None else with_norm(config, self.norm)
        config = with_stem(config) if self.stem else config
        config = with_rotation_head(config) if self.rotation_head else config
        return with_balance_bias(config) if self.balance == "bias" else config

    def recipe(self) -> Recipe:
        """Return how to train it."""
        recipe = RECIPES[self.task, self.size]
        return dataclasses.replace(
            recipe,
            steps=recipe.steps if self.steps is None else self.steps,
            augment=self.augment,
            energy_lambda=self.energy_lambda,
            energy_budget=self.energy_budget,
        )

    def path(self) -> Path:
        """Return where the weights go.

        Raises:
            ValueError: That is where the shipped ones are.
        """
        if self.out.resolve() == SHIPPED_FOLDER.resolve():
            raise ValueError(f"--out {self.out} holds the shipped weights; choose another folder")
        parts = [self.task, self.size, *self.zero_computation]
        parts += ["even"] if self.even else []
        parts += [] if self.fixed_k is None else [f"k{self.fixed_k}"]
        norm = self.config().norm
        parts += [] if norm == model_config(self.task, self.size).norm else [norm]
        parts += ["stem"] if self.stem else []
        parts += [f"augment{self.augment:g}"] if self.augment else []
        parts += ["rotation"] if self.rotation_head else []
        parts += ["bias"] if self.balance == "bias" else []
        parts += [f"lambda{self.energy_lambda:g}"] if self.energy_lambda else []
        parts += [] if self.energy_budget is None else [f"budget{self.energy_budget:g}"]
        return self.out / f"{'-'.join(parts)}.safetensors"


def main(arguments: Arguments) -> None:
    """Run the command."""
    config, recipe, path = arguments.config(), arguments.recipe(), arguments.path()
    refuse_unwritable(path)
    device = pick_device(arguments.device)
    cost, source = None, ASSUMED
    if arguments.expert_cost is not None:
        cost, source = measured_cost(arguments.expert_cost, config)
    model, record = train(config, recipe, device, arguments.seed, cost, source)
    save_checkpoint(model, record, path)
    if arguments.report:
        report = energy_report(model, device, cost_of_experts(config, cost), source)
        print_report(report)
        report_path = path.with_suffix(".report.json")
        report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {report_path}")
    else:
        _print_quality(record.quality)
    print(f"wrote {path} and {path.with_suffix('.json').name}")


def _print_quality(quality: dict[str, dict[str, float]]) -> None:
    measures = list(next(iter(quality.values())))
    print("top-k  " + "  ".join(f"{name:>24}" for name in measures))
    for top_k, values in quality.items():
        print(f"{top_k:>5}  " + "  ".join(f"{values[name]:24.4f}" for name in measures))


def cli() -> None:
    """Run the command line."""
    with one_line_errors():
        main(tyro.cli(Arguments))
