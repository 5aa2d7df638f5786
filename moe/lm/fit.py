"""Train one language model on text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe.device.torch_device import serving_dtype
from moe.errors import DataMissingError
from moe.lm.config import LmConfig, Recipe
from moe.lm.model import LanguageModel, initialise
from moe.lm.muon import Optimiser
from moe.lm.routing_loss import RoutingLoss
from moe.training.fit import TrainingDiverged

_UNTIMED = 5
"""First steps, which load kernels and count in no rate."""
_EVERY = 50
"""Steps between looks at the loss: each one makes the host wait for the device."""


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
    config: LmConfig,
    recipe: Recipe,
    text: np.ndarray,
    device: torch.device,
    seed: int = 0,
    limit_s: float = math.inf,
    name: str = "training",
) -> tuple[LanguageModel, dict[str, Any]]:
    """Train a model from scratch.

    Args:
        config: its shape.
        recipe: how.
        text: tokens, uint16.  # [N]
        device: where.
        seed: of the weights and of the order of the text.
        limit_s: where this much time passes sooner than the recipe's steps, the schedule runs by the clock
            and ends then.
        name: shown beside the progress.

    Returns:
        The model in serving types, and the record of its training: steps, tokens, seconds, epochs, tokens/s
        and losses as (step, nats per token, seconds).

    Raises:
        DataMissingError: The text is shorter than a batch.
        TrainingDiverged: The loss is NaN or infinite.
    """
    length = config.context + 1
    if len(text) < (least := (recipe.batch + 1) * length):
        raise DataMissingError(
            f"{len(text):,} tokens of text, a batch needs at least {least:,}; name more folders: --text"
        )
    with device:
        model = LanguageModel(config, serving_dtype(device))
    initialise(model, torch.Generator(device).manual_seed(seed))
    ids = torch.from_numpy(text.view(np.int16)).to(device)  # the vocabulary fits
    batches = windows(ids, recipe.batch, length, torch.Generator().manual_seed(seed + 1))
    optimiser, routing_loss = Optimiser(model, recipe), RoutingLoss(config, recipe, device)
    losses: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    step, share, untimed_s = 0, 0.0, 0.0
    with tqdm(total=recipe.steps, desc=name, unit="step", delay=2.0) as bar:
        while share < 1.0:
            factor = min(1.0, (step + 1) / recipe.warmup, (1.0 - share) / recipe.decay_share)
            answer, decisions = model.loss(next(batches))
            (answer + routing_loss(decisions, share)).backward()
            optimiser.step(factor, momentum=min(0.95, 0.85 + step * 0.001))
            step += 1
            bar.update()
            share = max(step / recipe.steps, (time.perf_counter() - start) / limit_s)
            if step == _UNTIMED or step % _EVERY == 0 or share >= 1.0:
                loss = answer.item()  # waits for the device
                if not math.isfinite(loss):
                    raise TrainingDiverged(f"the loss is {loss} at step {step}: lower the learning rates")
                bar.set_postfix(loss=f"{loss:.3f}")
                elapsed_s = time.perf_counter() - start
                untimed_s = elapsed_s if step == _UNTIMED else untimed_s
                losses.append((step, round(loss, 4), round(elapsed_s, 2)))
    seconds = time.perf_counter() - start
    tokens, timed = recipe.batch * config.context, max(step - _UNTIMED, 0)  # tokens per step
    record = {
        "steps": step,
        "tokens": step * tokens,
        "seconds": round(seconds, 1),
        "epochs": round(step * tokens / len(ids), 3),
        "tokens_per_s": round(timed * tokens / (seconds - untimed_s)) if timed else None,
        "losses": losses,
    } | routing_loss.record()
    return model.serve(), record
