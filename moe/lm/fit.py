"""Train one language model on the corpus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from moe.device.torch_device import serving_dtype
from moe.lm.config import LmConfig, Recipe
from moe.lm.model import LanguageModel, describe, initialise
from moe.lm.muon import Optimiser
from moe.training.fit import TrainingDiverged

_UNTIMED = 5
"""First steps, which load kernels and count in no rate."""
_EVERY = 50
"""Steps between losses that are kept."""


def windows(tokens: Tensor, batch: int, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches, int64, [B, length], without end: every token once per epoch, each cut at another offset.

    Args:
        tokens: the text.  # [N]
        batch: B.
        length: tokens of a window; the text holds at least B + 1 of them.
        generator: on the CPU.
    """
    reach = torch.arange(length, device=tokens.device)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        n = (len(tokens) - offset) // length
        order = torch.randperm(n, generator=generator)
        for chosen in order[: n // batch * batch].split(batch):
            starts = (offset + chosen * length).to(tokens.device, non_blocking=True)
            yield tokens[starts[:, None] + reach].long()


def train(
    config: LmConfig, recipe: Recipe, folder: Path, device: torch.device, seed: int
) -> tuple[LanguageModel, dict[str, Any]]:
    """Train a model from scratch.

    Args:
        config: its shape.
        recipe: how.
        folder: of the corpus.
        device: where.
        seed: of the weights and of the order of the text.

    Returns:
        The model in serving types, and the record of its training: losses as (step, nats per token, seconds).

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
    """
    with device:
        model = LanguageModel(config, serving_dtype(device))
    initialise(model, torch.Generator(device).manual_seed(seed))
    ids = torch.from_numpy(np.load(folder / "train.npy").astype(np.int32)).to(device)
    batches = windows(ids, recipe.batch, recipe.context + 1, torch.Generator().manual_seed(seed + 1))
    optimiser = Optimiser(model, recipe)
    losses: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    untimed_s = 0.0
    for step in trange(recipe.steps, desc="training", unit="step", delay=2.0):
        factor = min(1.0, (step + 1) / recipe.warmup, (1 - step / recipe.steps) / recipe.decay_share)
        answer, total = model.loss(next(batches))
        total.backward()
        optimiser.step(factor, momentum=min(0.95, 0.85 + step * 0.001))
        done = step + 1
        if done == _UNTIMED or done % _EVERY == 0 or done == recipe.steps:
            loss = answer.item()  # waits for the device
            if not np.isfinite(loss):
                raise TrainingDiverged(f"the loss is {loss} at step {done}: lower the learning rates")
            elapsed_s = time.perf_counter() - start
            untimed_s = elapsed_s if done == _UNTIMED else untimed_s
            losses.append((done, round(loss, 4), round(elapsed_s, 2)))
    seconds = time.perf_counter() - start
    tokens_per_step = recipe.batch * recipe.context
    timed = (recipe.steps - _UNTIMED) * tokens_per_step
    record = {
        "recipe": asdict(recipe),
        "model": describe(model),
        "steps": recipe.steps,
        "tokens": recipe.steps * tokens_per_step,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(timed / (seconds - untimed_s)) if timed > 0 else None,
        "epochs": round(recipe.steps * tokens_per_step / len(ids), 3),
        "losses": losses,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if ids.is_cuda else None,
    }
    return model.serve(), record
