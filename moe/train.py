"""Train a model: ``python -m moe.train --task vision --size tiny``.

Training is *elastic*: each layer of each step uses a random number of experts per token, so that one set of
weights serves every top-k (Matryoshka MoE, arXiv 2509.26520).
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from moe import data
from moe.checkpoint import TrainingRecord, save_checkpoint
from moe.config import ModelConfig, Size, Task, model_config
from moe.evaluate import quality_by_top_k
from moe.losses import load_balance_loss, router_z_loss
from moe.model import MoEModel, initialise

CHECK_EVERY = 20  # steps between looks at the loss: each one makes the host wait for the device


class TrainingDiverged(RuntimeError):
    """The loss stopped being a finite number."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    batch_size: int
    """Samples per step."""
    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup_steps: int = 100
    balance_coefficient: float = 0.01
    z_coefficient: float = 1e-3
    """Both coefficients as in ST-MoE, arXiv 2202.08906, section 2.2."""


RECIPES: dict[tuple[str, str], Recipe] = {
    ("vision", "tiny"): Recipe(batch_size=256, steps=600, learning_rate=5e-3),
    ("language", "tiny"): Recipe(batch_size=64, steps=600, learning_rate=2e-2),
    ("vision", "base"): Recipe(batch_size=512, steps=800, learning_rate=2e-4),
    ("language", "base"): Recipe(batch_size=128, steps=300, learning_rate=2e-4),
}


def train(
    config: ModelConfig, recipe: Recipe, device: torch.device, seed: int = 0
) -> tuple[MoEModel, TrainingRecord]:
    """Train a model and measure it on the test split.

    On CUDA the arithmetic is bfloat16 with float32 master weights, and the returned model holds its matrices
    in bfloat16; on a CPU everything is float32.

    Raises:
        TrainingDiverged: The loss is not finite.
    """
    model = initialise(_new_model(config, device), torch.Generator(device).manual_seed(seed))
    model.compute_dtype = serving_dtype(device)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe))
    top_k_source = random.Random(seed)
    batches = _batches(config, recipe.batch_size, device, torch.Generator(device).manual_seed(seed + 1))
    model.train()
    progress = tqdm(range(1, recipe.steps + 1), desc=f"train {config.task}", unit="step", mininterval=1.0)
    for step in progress:
        inputs, targets = next(batches)
        top_k = top_k_source.choices(config.top_k_choices, k=config.n_layers)
        answer_loss, loss = _losses(model, inputs, targets, top_k, recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == recipe.steps:
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"the loss is {loss.item()} at step {step}; lower the learning rate "
                    f"({recipe.learning_rate}) or try another seed ({seed}). Nothing was written"
                )
            progress.set_postfix(loss=f"{answer_loss.item():.3f}")
    model.requires_grad_(False).eval().cast_weights(model.compute_dtype)
    record = TrainingRecord(
        config=config.to_dict(),
        seed=seed,
        steps=recipe.steps,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=device_name(device),
        torch=torch.__version__,
        data_sha256=data.data_digest(config.task),
        quality=quality_by_top_k(model, device),
    )
    return model, record


def serving_dtype(device: torch.device) -> torch.dtype:
    """Return the type to compute in: bfloat16 on CUDA, where only it makes grouped_mm fast, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs an NVIDIA GPU and a CUDA build of torch; use --device cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


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
    model: MoEModel, inputs: Tensor, targets: Tensor, top_k: list[int], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return the answer's cross-entropy and the total loss."""
    output = model(inputs, top_k)
    answer_loss = F.cross_entropy(output.logits.flatten(0, -2), targets.flatten())
    balance = sum(load_balance_loss(routing) for routing in output.routing) / len(output.routing)
    z_loss = sum(router_z_loss(routing) for routing in output.routing) / len(output.routing)
    return answer_loss, answer_loss + recipe.balance_coefficient * balance + recipe.z_coefficient * z_loss


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
    out: Path = Path("runs/weights")
    """Folder for TASK-SIZE.safetensors and its JSON."""


def main(arguments: Arguments) -> None:
    """Run the command."""
    recipe = RECIPES[arguments.task, arguments.size]
    if arguments.steps is not None:
        recipe = dataclasses.replace(recipe, steps=arguments.steps)
    config = model_config(arguments.task, arguments.size)
    model, record = train(config, recipe, pick_device(arguments.device), arguments.seed)
    path = arguments.out / f"{arguments.task}-{arguments.size}.safetensors"
    save_checkpoint(model, record, path)
    measures = list(next(iter(record.quality.values())))
    print("top-k  " + "  ".join(f"{name:>24}" for name in measures))
    for top_k, quality in record.quality.items():
        print(f"{top_k:>5}  " + "  ".join(f"{quality[name]:24.4f}" for name in measures))
    print(f"wrote {path} and {path.with_suffix('.json').name}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
