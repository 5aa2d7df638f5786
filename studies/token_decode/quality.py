"""Next-token accuracy and bits per byte on held-out text, over top_k, the form of the weights, and budgets.

The second half of every window is scored; the first half is the prompt.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from studies.token_decode.config import LmConfig
from studies.token_decode.corpus import DOMAINS, REMEDY, bytes_per_token
from studies.token_decode.lm import LanguageModel
from studies.token_decode.routing import RoutingKnobs, experts_read
from torch import Tensor
from tqdm import tqdm

from moe.files import read_array

FORMS = (1.0, 0.5, 0.0)
"""Of the weights (`RoutingKnobs.renormalise`): summing to one, divided by the root of the sum, kept."""
TOP_KS = (8, 4, 2, 1, 6, 3, 12)
BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25)
"""Shares of the experts that a layer may read in a step."""
_TOGETHER = 128
"""Windows of one forward pass; groups of running sequences are parts of it."""


class HeldOut:
    """Windows of the held-out files, evenly spaced.

    Attributes:
        tokens: int32.  # [N, S + 1]
        domain: Domain of each target, uint8.  # [N, S]
        n_bytes: Bytes of each token, int64.  # [V]
    """

    def __init__(self, folder: Path, n: int, context: int, device: torch.device) -> None:
        """Cut N = `n` windows of S = `context` from the corpus in `folder`."""
        ids, domain = (read_array(folder / f"held_out{end}.npy", REMEDY) for end in ("", "_domain"))
        starts = np.linspace(0, len(ids) - context - 1, n).astype(np.int64)
        place = starts[:, None] + np.arange(context + 1)  # [N, S + 1]
        self.tokens = torch.from_numpy(ids[place].astype(np.int32)).to(device)
        self.domain = torch.from_numpy(domain[place[:, 1:]]).to(device)
        self.n_bytes = torch.from_numpy(bytes_per_token(folder)).to(device)


@torch.no_grad()
def evaluate(
    model: LanguageModel, text: HeldOut, knobs: RoutingKnobs | None
) -> tuple[dict[str, Any], Tensor]:
    """Score a model under knobs; None as in training.

    Returns:
        The measures, and each window's share of right tokens, float32, [N].
    """
    half = (text.tokens.shape[1] - 1) // 2
    right, nll, read = [], [], []
    for tokens in text.tokens.long().split(_TOGETHER):
        x, decisions = model(tokens[:, :-1], knobs)
        target = tokens[:, 1 + half :]
        logits = model.logits(x[:, half:]).float()  # [B, S / 2, V]
        right.append(logits.argmax(dim=-1) == target)
        nll.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target))
        if knobs is not None and knobs.budget is not None:
            e = model.config.n_experts
            read += [experts_read(d.experts, len(tokens), half, knobs.group, e) for d in decisions]
    right_all, nll_all = torch.cat(right), torch.cat(nll)  # [N, S / 2]
    domain = text.domain[:, half:]
    n_bytes = text.n_bytes[text.tokens[:, 1 + half :].long()].sum()
    measures = {
        "accuracy": round(right_all.float().mean().item(), 5),
        "bits_per_byte": round((nll_all.sum() / math.log(2) / n_bytes).item(), 4),
        "nats_per_token": round(nll_all.mean().item(), 4),
        "by_domain": {
            name: round(right_all[domain == i].float().mean().item(), 4)
            for i, name in enumerate(DOMAINS)
            if (domain == i).any()
        },
    }
    if read:
        measures["experts_read"] = round(torch.cat(read).mean().item(), 2)
    return measures, right_all.float().mean(dim=1)


@torch.no_grad()
def heaviest_shares(model: LanguageModel, text: HeldOut) -> dict[str, float]:
    """Mean part of a token's mix that its 1, 2, 4 heaviest experts have: how much top_k can matter."""
    _, decisions = model(text.tokens[:32, :-1].long())
    weights = torch.cat([d.weights for d in decisions]).sort(dim=-1, descending=True).values  # [L T, K]
    return {
        str(n): round(weights[:, :n].sum(dim=-1).mean().item(), 3)
        for n in (1, 2, 4)
        if n <= model.config.top_k
    }


def knob_grid(config: LmConfig, half: int, groups: tuple[int, ...]) -> list[tuple[str, RoutingKnobs]]:
    """What is measured, each with its kind.

    Kinds: "everywhere" applies top_k to the prompt too, "decode" leaves the prompt at the training's,
    "budget" also limits the experts read in a step of `group` sequences.
    """
    e, trained = config.n_experts, config.top_k
    ks = [k for k in TOP_KS if k <= e]
    cells = [("everywhere", RoutingKnobs(k, form)) for form in FORMS for k in ks]
    cells += [
        ("decode", RoutingKnobs(k, form, decode_from=half, prompt_top_k=trained))
        for form in (1.0, 0.0)
        for k in ks
    ]
    budgets = {k: sorted({max(math.ceil(share * e), k) for share in BUDGETS}) for k in (8, 4, 2) if k <= e}
    cells += [
        ("budget", RoutingKnobs(k, form, budget, group, half, trained))
        for form in (1.0, 0.0)
        for k, some in budgets.items()
        for budget in some
        for group in groups
    ]
    return cells


def measure_quality(model: LanguageModel, text: HeldOut, groups: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure the grid; a dense model has one row.

    Args:
        model: in serving types.
        text: to score. Groups are divisors of its windows, and of the windows of one forward pass.
        groups: running sequences that share a budget.

    Returns:
        Rows of knobs and measures. `minus_standard` is the accuracy's difference from the service as in
        training, paired by window, with its standard error.
    """
    c = model.config
    standard, of_standard = evaluate(model, text, None)
    if not c.n_experts:
        return [{"kind": "dense", **standard}]
    rows: list[dict[str, Any]] = [{"kind": "gate", "share_of_heaviest": heaviest_shares(model, text)}]
    half = (text.tokens.shape[1] - 1) // 2
    for kind, knobs in tqdm(knob_grid(c, half, groups), desc="quality", unit="setting", delay=2.0):
        measures, share = evaluate(model, text, knobs)
        gap = share - of_standard  # [N]
        measures["minus_standard"] = round(gap.mean().item(), 5)
        measures["standard_error"] = round((gap.std() / len(gap) ** 0.5).item(), 5)
        running = knobs.group if kind == "budget" else None
        budget = knobs.budget or c.n_experts
        rows.append(
            {"kind": kind, "top_k": knobs.top_k, "renormalise": knobs.renormalise, "budget": budget,
             "running": running, **measures}
        )  # fmt: skip
    return rows
