"""What a model answers, whom it asks and what that costs, at every number of experts per token.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe.data import datasets as data
from moe.model.losses import chosen_energy, expected_energy
from moe.model.transformer import MoEModel
from moe.model.usage import load_entropy
from moe.training.evaluate import TEXT_LIMIT, quality_by_top_k

MAX_TOP_K = 8
TOKENS_ROUTED = 1 << 16
"""Test tokens whose routing is counted: a standard error of 0.2 points of a share."""


def energy_report(
    model: MoEModel, device: torch.device, expert_cost: Tensor, cost_source: str
) -> dict[str, Any]:
    """Measure a model on its test split at 1 to 8 experts per token, also at those it is not trained for.

    Args:
        model: Model in eval mode.
        device: Where it is.
        expert_cost: Cost per routed token, in any unit.  # [E]
        cost_source: What measured it.

    Returns:
        The cost, its source, and by top-k: the quality, ``trained`` or not, expected and chosen energy (1 is
        that of an even load), ``cost_per_token`` of a layer in the unit of the cost, load entropy, and the
        share of the tokens of each kind of expert.
    """
    config = model.config
    top_ks = range(1, min(MAX_TOP_K, config.n_experts) + 1)
    quality = quality_by_top_k(model, device, top_ks)
    expert_cost = expert_cost.to(device)
    by_top_k = {
        str(top_k): {"trained": top_k in config.top_k_choices, **quality[str(top_k)]}
        | _routing_of(model, device, expert_cost, top_k)
        for top_k in top_ks
    }
    return {
        "config": config.to_dict(),
        "expert_cost": expert_cost.tolist(),
        "cost_source": cost_source,
        "top_k": by_top_k,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    rows = report["top_k"]
    measures = [name for name, value in rows["1"].items() if isinstance(value, float)]
    names = [*measures, *(f"share of {kind}" for kind in rows["1"]["share"])]
    print(f"cost of the experts: {report['cost_source']}; top-k marked * is not trained")
    print("top-k  " + "  ".join(f"{name:>20}" for name in names))
    for top_k, row in rows.items():
        values = [*(row[name] for name in measures), *row["share"].values()]
        mark = " " if row["trained"] else "*"
        print(f"{top_k:>4}{mark}  " + "  ".join(f"{value:20.4g}" for value in values))


@torch.no_grad()
def _routing_of(model: MoEModel, device: torch.device, expert_cost: Tensor, top_k: int) -> dict[str, Any]:
    counts = torch.zeros(model.config.n_layers, model.config.n_experts, dtype=torch.int64, device=device)
    expected = []
    for batch in _test_inputs(model, device):
        output = model(batch, top_k)
        counts += output.tokens_per_expert
        expected += [expected_energy(routing, expert_cost) for routing in output.routing]
    chosen = chosen_energy(counts, expert_cost).mean()
    share_of_expert = (counts.double() / counts.sum(dim=-1, keepdim=True)).mean(dim=0).tolist()
    kinds = model.config.expert_kinds
    return {
        "expected_energy": torch.stack(expected).mean().item(),
        "chosen_energy": chosen.item(),
        "cost_per_token": (chosen * expert_cost.mean() * top_k).item(),
        "load_entropy": load_entropy(counts).mean().item(),
        "share": {
            kind: sum(share for share, name in zip(share_of_expert, kinds, strict=True) if name == kind)
            for kind in dict.fromkeys(kinds)
        },
    }


def _test_inputs(model: MoEModel, device: torch.device) -> Iterator[Tensor]:
    """Yield equal batches of images, or of disjoint pieces of prose, of the test split."""
    config = model.config
    n_samples = TOKENS_ROUTED // config.tokens_per_sample
    if config.task == "vision":
        inputs = data.load_vision("test")[0][:n_samples]
    else:
        text = data.load_language("prose", "test")[:TEXT_LIMIT]
        inputs = text[: len(text) // config.context_length * config.context_length]
        inputs = inputs.view(-1, config.context_length)[:n_samples]
    batch_size = 256
    yield from inputs[: max(1, len(inputs) // batch_size) * batch_size].to(device).split(batch_size)
